"""The JSON files of a bundle: what is read, and every refusal with its rule and its place."""

from __future__ import annotations

import hashlib
import json
import time
import warnings

import msgspec
import pytest

from tallstore.caller_warnings import NewerFormatWarning
from tallstore.errors import FormatError, IntegrityError, UnsupportedFeatureError, UnsupportedVersionError
from tallstore.format import parsing, versions
from tallstore.format.manifest import BaseTable, GroupTable, Manifest, MaskCode, TaskTable
from tallstore.format.parsing import own_sha256, parse, parse_manifest, serialise, serialise_manifest

XXH3 = "0123456789abcdef" * 2
SHA256 = "0123456789abcdef" * 4
WHERE = "here.json"

MANIFEST = {
    "format": "tallstore",
    "format_version": "1.0",
    "manifest_sha256": "0" * 64,
    "generator": "tallstore 0.1.0",
    "required_features": [],
    "base": {"repo_id": "org/name", "revision": "ab" * 20, "embedded": False},
    "next_group": 2,
    "groups": [
        {"id": "g0001", "method": {"name": "tall-mask", "parameters": {"mask_lambda": [0.2, 0.4], "merge": "sum"}}}
    ],
    "tasks": [
        {"name": "Ünï code", "slug": "uni-code", "group": "g0001", "parameters": 12, "cosine": 0.5, "gain": None}
    ],
    "files": [
        {"path": "base.json", "size": 12, "sha256": SHA256, "git_oid": "ab" * 20},
        {"path": "groups/g0001/merged-00001-of-00001.safetensors", "size": 12, "sha256": SHA256, "git_oid": None},
    ],
}
BASE = {
    "format": "tallstore.base",
    "tensors": [
        {"name": "w", "dtype": "F32", "shape": [3, 4], "chunks": [XXH3]},
        {"name": "tied", "dtype": "F32", "shape": [3, 4], "chunks": [], "alias_of": "w"},
    ],
}
SHARD = {
    "file": "merged-00001-of-00001.safetensors",
    "header_xxh3": XXH3,
    "index_xxh3": XXH3,
    "pool": {"nbytes": 64, "codec": "raw", "at": 0},
}
PAYLOAD = {"shard": 0, "codec": "zstd", "at": 1}
POOLED = {"shard": 0, "codec": "pooled", "at": 8}
GROUP = {
    "format": "tallstore.group",
    "id": "g0001",
    "required_features": [],
    "method": {"name": "signed-mask", "parameters": {"threshold": 1.2}},
    "shards": [SHARD],
    "vectors": [
        {"tensor": "w", "role": "merged", "dtype": "LOG4", "row_axes": 1, "values": PAYLOAD, "step": POOLED},
        {"tensor": "v", "role": "merged", "dtype": "F32", "values": PAYLOAD},
    ],
}
TASK = {
    "format": "tallstore.task",
    "name": "Ünï code",
    "slug": "uni-code",
    "group": "g0001",
    "required_features": [],
    "shards": [SHARD],
    "tensors": [
        {"kind": "mask", "name": "w", "dtype": "BF16", "shape": [3, 4], "gain": 0.5, "row_axes": 1, "bits": PAYLOAD},
        {"kind": "signed", "name": "v", "base": "u", "dtype": "F32", "shape": [3], "gains": POOLED, "fields": PAYLOAD},
        {"kind": "private", "name": "p", "dtype": "I64", "shape": [], "values": POOLED},
        {"kind": "private", "name": "none", "dtype": "I64", "shape": [0], "values": None},
        {
            "kind": "extended",
            "name": "e",
            "dtype": "F32",
            "shape": [5, 2],
            "rows": 3,
            "leading": {"kind": "mask", "gain": 1, "bits": PAYLOAD},
            "further": PAYLOAD,
        },
        {"kind": "extended", "name": "f", "dtype": "F32", "shape": [3], "rows": 3, "leading": {"kind": "same"}},
        {"kind": "same", "name": "s", "dtype": "F32", "shape": [1]},
        {"kind": "alias", "name": "a", "of": "w"},
        {"kind": "dropped", "name": "d"},
    ],
    "files": [{"name": "config.json", "sha256": SHA256, "size": 612}],
    "fidelity": {"cosine": 0.5, "gain": None, "score": 0.9, "estimates": {"sign": {"cosine": 0.7, "bits": 1.0}}},
}
TABLES = [(BASE, BaseTable), (GROUP, GroupTable), (TASK, TaskTable)]


def sealed(document):
    """The bytes of a manifest with its own hash, whatever else is in it."""
    raw = json.dumps({**document, "manifest_sha256": "0" * 64}).encode()
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode())


def changed(document, *path, to):
    """A copy of *document* with the value at *path* set, or left out where it is `None` spelt `...`."""
    copy = json.loads(json.dumps(document))
    *parents, last = path
    place = copy
    for step in parents:
        place = place[step]
    if to is ...:
        del place[last]
    else:
        place[last] = to
    return copy


def refusal(raw, table=Manifest):
    with pytest.raises(FormatError) as caught:
        parse_manifest(raw, WHERE) if table is Manifest else parse(raw, table, WHERE)
    error = caught.value
    assert error.where == WHERE
    assert str(error).startswith(f"{WHERE}: ")
    assert "\n" not in str(error)
    return error


def refused_manifest(document):
    return refusal(sealed(document))


def refused_task(*path, to):
    return refusal(json.dumps(changed(TASK, *path, to=to)).encode(), TaskTable)


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_manifest_round_trips():
    manifest = parse_manifest(sealed(MANIFEST), WHERE)
    raw = serialise_manifest(manifest)
    again = parse_manifest(raw, WHERE)
    assert msgspec.structs.replace(again, manifest_sha256=manifest.manifest_sha256) == manifest
    assert serialise_manifest(again) == raw
    assert again.manifest_sha256 == own_sha256(raw, again.manifest_sha256)
    assert json.loads(raw) | {"manifest_sha256": "0" * 64} == MANIFEST


@pytest.mark.parametrize(("document", "table"), TABLES)
def test_a_table_round_trips(document, table):
    parsed = parse(json.dumps(document).encode(), table, WHERE)
    raw = serialise(parsed)
    assert raw.endswith(b"}\n")
    assert parse(raw, table, WHERE) == parsed
    assert serialise(parse(raw, table, WHERE)) == raw


def test_what_is_left_out_has_its_default():
    table = parse(json.dumps(TASK).encode(), TaskTable, WHERE)
    mask, signed, private, _, extended, *_ = table.tensors
    assert (mask.base, mask.base_name, mask.gains) == (None, "w", None)
    assert (signed.base_name, signed.gain, signed.row_axes) == ("u", None, 1)
    assert private.shape == ()
    assert isinstance(extended.leading, MaskCode)
    assert extended.leading.gain == 1.0
    assert type(extended.leading.gain) is float


def test_whitespace_and_the_order_of_keys_do_not_matter():
    turned = json.dumps(dict(reversed(TASK.items())), indent=4).encode()
    assert parse(turned, TaskTable, WHERE) == parse(json.dumps(TASK).encode(), TaskTable, WHERE)


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"{}x",
        b"[]",
        b"null",
        b'"text"',
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": 01}',
        b'{"a": "\n"}',
        b'{"a": \xff}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\xed\xa0\x80"}',  # a surrogate in UTF-8
        b'{"a": "\\ud800"}',
        b'{"\\udc00": 1}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": -1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("table", [Manifest, TaskTable])
def test_what_is_no_json_object_is_refused(raw, table):
    assert refusal(raw, table).rule == "JSON-1"


def test_a_pair_of_escaped_surrogates_is_text():
    raw = json.dumps(changed(TASK, "name", to="\N{GRINNING FACE}"), ensure_ascii=True).encode()
    assert b"\\ud83d\\ude00" in raw
    assert parse(raw, TaskTable, WHERE).name == "\N{GRINNING FACE}"


def nested(depth):
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize("depth", [33, 100, 10_000, 1_000_000])
def test_deep_nesting_is_refused(depth):
    error = refusal(nested(depth), TaskTable)
    assert error.rule == "JSON-1"
    assert "nested more than 32 deep" in error.problem


def test_nesting_up_to_the_limit_is_no_reason():
    assert refusal(nested(32), TaskTable).rule == "JSON-3"


@pytest.mark.parametrize(
    "raw", [b'{"a": 1, "b": 2, "a": 1}', b'{"b": {"a": 1, "a": 1}}', b'{"b": [[{"a": 1, "a": 2}]]}']
)
@pytest.mark.parametrize("table", [Manifest, BaseTable])
def test_a_key_that_stands_twice_is_refused(raw, table):
    error = refusal(raw, table)
    assert error.rule == "JSON-2"
    assert "'a'" in error.problem


def test_a_key_that_stands_twice_is_found_quickly_and_shown_shortly():
    keys = b",".join(b'"%d": 0' % number for number in range(200_000))
    started = time.perf_counter()
    refusal(b"{" + keys + b', "199999": 0}', TaskTable)
    assert time.perf_counter() - started < 5
    long_name = b"x" * 10_000
    assert len(str(refusal(b'{"%b": 0, "%b": 0}' % (long_name, long_name), TaskTable))) < 200


@pytest.mark.parametrize(("document", "table"), TABLES)
def test_one_key_that_stands_twice_in_what_is_otherwise_as_it_is_written(document, table):
    raw = serialise(parse(json.dumps(document).encode(), table, WHERE))
    first = raw[1 : raw.index(b",") + 1]
    with pytest.raises(FormatError, match=r"has the key 'format' twice in one object \[JSON-2\]"):
        parse(b"{" + first + raw[1:], table, WHERE)


@pytest.mark.parametrize(("document", "table"), TABLES)
def test_what_is_as_it_is_written_needs_no_closer_look(monkeypatch, document, table):
    parsed = parse(json.dumps(document).encode(), table, WHERE)
    written = serialise_manifest(parse_manifest(sealed(MANIFEST), WHERE))
    monkeypatch.setattr(parsing, "_document", None)
    assert parse(serialise(parsed), table, WHERE) == parsed
    assert serialise_manifest(parse_manifest(written, WHERE)) == written


def test_a_file_over_the_limit_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(parsing, "MAX_JSON_NBYTES", 10)
    assert refusal(b" " * 11).rule == "JSON-4"
    assert refusal(b" " * 11, TaskTable).rule == "JSON-4"
    assert refusal(b" " * 10).rule == "JSON-1"


def test_what_no_reader_takes_is_not_written(monkeypatch):
    table = parse(json.dumps(TASK).encode(), TaskTable, WHERE)
    monkeypatch.setattr(parsing, "MAX_JSON_NBYTES", 100)
    with pytest.raises(FormatError, match=r"^tallstore\.task: has .* over the limit of 100 \[JSON-4\]$"):
        serialise(table)


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in MANIFEST if key not in {"format", "format_version", "manifest_sha256"}])
def test_a_missing_field_of_the_manifest_is_named(key):
    error = refused_manifest(changed(MANIFEST, key, to=...))
    assert error.rule == "JSON-3"
    assert key in error.problem


@pytest.mark.parametrize(("document", "table"), TABLES)
def test_a_missing_field_of_a_table_is_named(document, table):
    for key in document:
        error = refusal(json.dumps(changed(document, key, to=...)).encode(), table)
        assert error.rule == "JSON-3"
        assert key in error.problem


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("base", "repo_id"), "no spaces", "$.base.repo_id"),
        (("base", "repo_id"), "a/b/c", "$.base.repo_id"),
        (("base", "revision"), "main", "$.base.revision"),
        (("base", "embedded"), 1, "$.base.embedded"),
        (("next_group",), 0, "$.next_group"),
        (("next_group",), 10_000_001, "$.next_group"),
        (("next_group",), 2.0, "$.next_group"),
        (("next_group",), True, "$.next_group"),
        (("groups", 0, "id"), "g1", "$.groups[0].id"),
        (("groups", 0, "id"), "g0001\n", "$.groups[0].id"),
        (("groups", 0, "method", "parameters", "x"), {}, "$.groups[0].method.parameters"),
        (("tasks", 0, "name"), "", "$.tasks[0].name"),
        (("tasks", 0, "name"), "a\nb", "$.tasks[0].name"),
        (("tasks", 0, "name"), "a\n", "$.tasks[0].name"),
        (("tasks", 0, "name"), "a\x7f", "$.tasks[0].name"),
        (("tasks", 0, "name"), "a\x85", "$.tasks[0].name"),
        (("tasks", 0, "slug"), "", "$.tasks[0].slug"),
        (("tasks", 0, "slug"), "../up", "$.tasks[0].slug"),
        (("tasks", 0, "slug"), "Upper", "$.tasks[0].slug"),
        (("tasks", 0, "slug"), "x" * 65, "$.tasks[0].slug"),
        (("tasks", 0, "slug"), "uni-code\n", "$.tasks[0].slug"),
        (("tasks", 0, "parameters"), -1, "$.tasks[0].parameters"),
        (("tasks", 0, "parameters"), 1.0, "$.tasks[0].parameters"),
        (("tasks", 0, "parameters"), True, "$.tasks[0].parameters"),
        (("tasks", 0, "parameters"), "12", "$.tasks[0].parameters"),
        (("tasks", 0, "cosine"), "high", "$.tasks[0].cosine"),
        (("files", 1, "sha256"), SHA256[:-1], "$.files[1].sha256"),
        (("files", 1, "sha256"), SHA256.upper(), "$.files[1].sha256"),
        (("files", 1, "sha256"), SHA256 + "\n", "$.files[1].sha256"),
        (("files", 1, "git_oid"), SHA256, "$.files[1].git_oid"),
        (("files", 1, "size"), None, "$.files[1].size"),
        (("files",), {}, "$.files"),
        (("files", 0), [], "$.files[0]"),
    ],
)
def test_a_wrong_value_in_the_manifest_is_refused_at_its_place(path, value, place):
    error = refused_manifest(changed(MANIFEST, *path, to=value))
    assert error.rule == "JSON-3"
    assert f"`{place}`" in error.problem or f"`{place}[...]`" in error.problem


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("format",), "tallstore.group", "$.format"),
        (("tensors", 0, "kind"), "hologram", "$.tensors[0].kind"),
        (("tensors", 0, "kind"), None, "$.tensors[0].kind"),
        (("tensors", 0, "kind"), ..., "$.tensors[0]"),
        (("tensors", 0, "name"), "", "$.tensors[0].name"),
        (("tensors", 0, "name"), "a\0b", "$.tensors[0].name"),
        (("tensors", 0, "name"), "a\n", "$.tensors[0].name"),
        (("tensors", 0, "dtype"), "F8_E8M0", "$.tensors[0].dtype"),
        (("tensors", 0, "shape"), [-1], "$.tensors[0].shape[0]"),
        (("tensors", 0, "shape"), [2**63], "$.tensors[0].shape[0]"),
        (("tensors", 0, "shape"), [10**400], "$.tensors[0].shape[0]"),
        (("tensors", 0, "shape"), "3", "$.tensors[0].shape"),
        (("tensors", 0, "gain"), "1", "$.tensors[0].gain"),
        (("tensors", 0, "row_axes"), -1, "$.tensors[0].row_axes"),
        (("tensors", 0, "bits"), None, "$.tensors[0].bits"),
        (("tensors", 0, "bits"), ..., "$.tensors[0]"),
        (("tensors", 0, "bits", "codec"), "gzip", "$.tensors[0].bits.codec"),
        (("tensors", 0, "bits", "at"), -8, "$.tensors[0].bits.at"),
        (("tensors", 4, "leading", "kind"), "private", "$.tensors[4].leading.kind"),
        (("tensors", 4, "leading"), None, "$.tensors[4].leading"),
        (("tensors", 7, "of"), ..., "$.tensors[7]"),
        (("shards", 0, "header_xxh3"), SHA256, "$.shards[0].header_xxh3"),
        (("shards", 0, "pool", "codec"), "planes-zstd", "$.shards[0].pool.codec"),
        (("fidelity", "estimates", "sign", "bits"), None, "$.fidelity.estimates"),
    ],
)
def test_a_wrong_value_in_a_table_is_refused_at_its_place(path, value, place):
    error = refused_task(*path, to=value)
    assert error.rule == "JSON-3"
    assert f"`{place}" in error.problem


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tensors", 0, "shape"), [1] * 17),
        (("tensors", 0, "name"), "x" * 1025),
        (("name",), "x" * 257),
        (("shards",), [SHARD] * 100_000),
    ],
)
def test_what_is_over_a_limit_is_refused(path, value):
    assert refused_task(*path, to=value).rule == "LIM-1"


def test_what_is_at_a_limit_is_read():
    table = changed(TASK, "tensors", 0, "shape", to=[1] * 16)
    table = changed(table, "tensors", 0, "name", to="x" * 1024)
    table = changed(table, "name", to="x" * 256)
    parse(json.dumps(table).encode(), TaskTable, WHERE)


# --- versions and features --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "rule"),
    [
        ("2.0", "VER-1"),
        ("0.9", "VER-1"),
        ("2.0-draft", "VER-1"),
        ("1", "VER-1"),
        ("1.0.0", "VER-1"),
        ("01.0", "VER-1"),
        ("1.0-beta", "VER-1"),
        (" 1.0", "VER-1"),
        ("1.0\n", "VER-1"),
        ("1.0-draft\n", "VER-1"),
        ("", "VER-1"),
        (1.0, "VER-1"),
        (None, "VER-1"),
        (["1.0"], "VER-1"),
        ("x" * 10_000, "VER-1"),
        ("1.1-draft", "VER-2"),
        ("1.2-draft", "VER-2"),
    ],
)
def test_other_versions_are_refused(version, rule):
    error = refused_manifest(changed(MANIFEST, "format_version", to=version))
    assert error.rule == rule
    assert isinstance(error, UnsupportedVersionError)
    assert len(str(error)) < 200


def test_a_refused_version_names_both_sides():
    error = refused_manifest(changed(MANIFEST, "format_version", to="2.3"))
    assert error.problem == "format_version is 2.3, this reader reads 1.x; update tallstore"
    error = refused_manifest(changed(MANIFEST, "format_version", to="0.1"))
    assert error.problem == "format_version is 0.1, this reader reads 1.x; pack the bundle again"


@pytest.mark.parametrize("found", ["tallstore.task", None, 1])
def test_what_is_no_manifest_is_refused(found):
    assert refused_manifest(changed(MANIFEST, "format", to=found)).rule == "JSON-3"
    assert refused_manifest(changed(MANIFEST, "format", to=...)).rule == "JSON-3"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("extra",), "$.extra"),
        (("base", "extra"), "$.base.extra"),
        (("tasks", 0, "extra"), "$.tasks[0].extra"),
        (("groups", 0, "method", "extra"), "$.groups[0].method.extra"),
        (("tasks", 0, "kind"), "$.tasks[0].kind"),
    ],
)
def test_an_unknown_key_is_refused_at_its_place(path, place):
    error = refused_manifest(changed(MANIFEST, *path, to={"a": [1]}))
    assert (error.rule, error.problem) == ("VER-3", f"has the unknown key {place}")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("format_version",), "$.format_version"),
        (("tensors", 0, "fields"), "$.tensors[0].fields"),
        (("tensors", 0, "bits", "extra"), "$.tensors[0].bits.extra"),
        (("tensors", 4, "leading", "name"), "$.tensors[4].leading.name"),
        (("tensors", 4, "leading", "bits", "extra"), "$.tensors[4].leading.bits.extra"),
        (("shards", 0, "pool", "extra"), "$.shards[0].pool.extra"),
        (("fidelity", "estimates", "sign", "extra"), "$.fidelity.estimates.sign.extra"),
    ],
)
def test_an_unknown_key_of_a_table_is_refused_at_its_place(path, place):
    error = refused_task(*path, to=1)
    assert (error.rule, error.problem) == ("VER-3", f"has the unknown key {place}")


# reader's version, bundle's, and the rule of the refusal; None where it is read, "newer" where unknown keys are ignored
READERS = [
    ("1.0-draft", "1.0-draft", None),
    ("1.0-draft", "1.1-draft", "VER-2"),
    ("1.0-draft", "1.0", "VER-2"),
    ("1.0-draft", "1.1", "VER-2"),
    ("1.0", "1.0-draft", "VER-2"),
    ("1.0", "1.1-draft", "VER-2"),
    ("1.0", "1.0", None),
    ("1.0", "1.1", "newer"),
    ("1.0", "1.10", "newer"),
    ("1.0", "1.999999", "newer"),
    ("1.0", "2.0", "VER-1"),
    ("1.2", "1.0", None),
    ("1.2", "1.10", "newer"),
    ("1.2", "1.0-draft", "VER-2"),
    ("1.2", "1.2-draft", "VER-2"),
    ("1.2-draft", "1.2-draft", None),
    ("1.2-draft", "1.1", None),
    ("1.2-draft", "1.0", None),
    ("1.2-draft", "1.0-draft", "VER-2"),
    ("1.2-draft", "1.2", "VER-2"),
    ("1.2-draft", "1.3", "VER-2"),
    ("1.2-draft", "2.0-draft", "VER-1"),
]


@pytest.mark.parametrize(("reader", "found", "outcome"), READERS)
def test_which_versions_a_reader_reads(monkeypatch, reader, found, outcome):
    monkeypatch.setattr(versions, "FORMAT_VERSION", reader)
    raw = sealed(changed(MANIFEST, "format_version", to=found))
    if outcome in {None, "newer"}:
        assert parsing.is_newer_minor(parse_manifest(raw, WHERE)) == (outcome == "newer")
    else:
        error = refusal(raw)
        assert error.rule == outcome
        assert found in error.problem
        assert reader.partition(".")[0] in error.problem


def test_a_bundle_of_the_draft_is_to_be_packed_again(monkeypatch):
    monkeypatch.setattr(versions, "FORMAT_VERSION", "1.0")
    error = refused_manifest(changed(MANIFEST, "format_version", to="1.0-draft"))
    assert error.problem == "format_version is 1.0-draft, a draft; this reader reads 1.0; pack the bundle again"


def test_unknown_keys_of_a_newer_minor_version_are_ignored_with_a_warning(monkeypatch):
    monkeypatch.setattr(versions, "FORMAT_VERSION", "1.0")
    newer = changed(changed(MANIFEST, "format_version", to="1.1"), "tasks", 0, "color", to="blue")
    with pytest.warns(NewerFormatWarning, match=r"^here\.json: ignores the unknown key \$\.tasks\[0\]\.color"):
        manifest = parse_manifest(sealed(newer), WHERE)
    assert parsing.is_newer_minor(manifest)
    table = json.dumps(changed(TASK, "tensors", 0, "color", to="blue")).encode()
    with pytest.warns(NewerFormatWarning, match="color"):
        parse(table, TaskTable, WHERE, newer_minor=True)
    assert refusal(table, TaskTable).rule == "VER-3"


def test_one_warning_a_file_names_the_first_keys():
    table = json.loads(json.dumps(TASK))
    for tensor in table["tensors"]:
        tensor["future"] = 1
    with pytest.warns(NewerFormatWarning) as caught:
        parse(json.dumps(table).encode(), TaskTable, WHERE, newer_minor=True)
    places = ", ".join(f"$.tensors[{number}].future" for number in range(3))
    expected = f"{WHERE}: ignores {len(TASK['tensors'])} unknown keys ({places}, …) of a newer version"
    assert [str(warning.message) for warning in caught] == [expected]


@pytest.mark.parametrize("key", ["two\nlines", "\x1b[2J", "\u202egnp", "a b", "", "x" * 100_000])
def test_a_key_is_shown_on_one_line_and_shortly(key):
    error = refused_task("tensors", 0, key, to=1)
    assert error.rule == "VER-3"
    assert str(error).isprintable()
    assert len(str(error)) < 200


def test_a_feature_is_shown_on_one_line_and_shortly():
    for feature in ("two\nlines", "\x1b[2J", "x" * 100_000):
        error = refused_task("required_features", to=[feature])
        assert error.rule == "VER-4"
        assert str(error).isprintable()
        assert len(str(error)) < 250


def test_what_would_be_lost_is_not_changed(monkeypatch):
    monkeypatch.setattr(versions, "FORMAT_VERSION", "1.0")
    newer = changed(MANIFEST, "format_version", to="1.1")
    assert parse_manifest(sealed(newer), WHERE, to_change=True).format_version == "1.1"
    with pytest.raises(
        UnsupportedVersionError, match=r"here\.json: has the unknown key \$\.color of a newer"
    ) as caught:
        parse_manifest(sealed(changed(newer, "color", to="blue")), WHERE, to_change=True)
    assert caught.value.rule == "WRITE-5"
    table = json.dumps(changed(TASK, "tensors", 0, "color", to="blue")).encode()
    with pytest.raises(UnsupportedVersionError, match=r"color.* update tallstore") as caught:
        parse(table, TaskTable, WHERE, newer_minor=True, to_change=True)
    assert caught.value.rule == "WRITE-5"
    assert parse(json.dumps(TASK).encode(), TaskTable, WHERE, to_change=True).name == TASK["name"]


def test_a_newer_minor_version_without_unknown_keys_says_nothing(monkeypatch):
    monkeypatch.setattr(versions, "FORMAT_VERSION", "1.0")
    document = changed(MANIFEST, "format_version", to="1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_manifest(sealed(changed(MANIFEST, "format_version", to="1.7")), WHERE)
    assert not parsing.is_newer_minor(parse_manifest(sealed(document), WHERE))


def test_a_required_feature_is_refused_by_name_before_the_rest_is_looked_at():
    error = refused_manifest(changed(changed(MANIFEST, "required_features", to=["holograms"]), "extra", to=1))
    assert error.rule == "VER-4"
    assert isinstance(error, UnsupportedFeatureError)
    assert "'holograms'" in error.problem
    table = changed(TASK, "required_features", to=["holograms"])
    table["tensors"][0]["kind"] = "hologram"
    error = refusal(json.dumps(table).encode(), TaskTable)
    assert error.rule == "VER-4"
    assert "'holograms'" in error.problem


@pytest.mark.parametrize("features", [None, "sign", [1], [None]])
def test_features_that_are_no_list_of_names_are_refused(features):
    assert refused_task("required_features", to=features).rule in {"JSON-3", "VER-4"}


# --- the manifest's own hash ------------------------------------------------------------------------------------------


def test_a_manifest_of_other_bytes_is_refused():
    raw = sealed(MANIFEST).replace(b'"parameters": 12', b'"parameters": 13')
    error = refusal(raw)
    assert error.rule == "MAN-1"
    assert isinstance(error, IntegrityError)


def test_a_hash_that_stands_twice_is_refused():
    """Zeroing one of two places would let the other be changed."""
    raw = sealed(MANIFEST)
    digest = json.loads(raw)["manifest_sha256"].encode()
    assert own_sha256(raw + b"  " + digest, digest.decode()) is None
    assert refusal(raw.replace(SHA256.encode(), digest, 1)).rule == "MAN-1"


@pytest.mark.parametrize("value", [None, "", "0" * 63, "A" * 64, "0" * 64 + "\n", 0, ["0" * 64]])
def test_a_hash_that_is_none_is_refused(value):
    raw = json.dumps(changed(MANIFEST, "manifest_sha256", to=value)).encode()
    assert refusal(raw).rule == "JSON-3"


def test_every_flip_of_every_bit_of_a_manifest_is_refused():
    raw = serialise_manifest(parse_manifest(sealed(MANIFEST), WHERE))
    for position in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            assert refusal(bytes(flipped)).rule in {"JSON-1", "JSON-2", "JSON-3", "VER-1", "VER-2", "VER-4", "MAN-1"}


def test_a_manifest_that_is_cut_or_followed_by_anything_is_refused():
    raw = sealed(MANIFEST)
    for length in range(len(raw)):
        refusal(raw[:length])
    assert refusal(raw + b" ").rule == "MAN-1"
    assert refusal(raw + b"{}").rule == "JSON-1"
