"""The invalid vectors: one bundle, broken in one place each. A vector's name begins with the rule that it breaks."""

from __future__ import annotations

import hashlib
import math
from functools import partial

from second.breaking import (
    BASE_JSON,
    COMPANION_PATH,
    FALSE_SHA256,
    GROUP_JSON,
    MASK_SHARD,
    MERGED_SHARD,
    PRIVATE_SHARD,
    REMOVE,
    TASK_JSON,
    Invalid,
    add_entry,
    again,
    anywhere,
    assign,
    base_bytes,
    base_copy,
    base_file,
    base_name,
    by_reference,
    companion_too,
    drop_w,
    empty_rows,
    entry,
    extra,
    file_edit,
    float_vector,
    given_base,
    group_twelve,
    header,
    header_text,
    large_window,
    late,
    length_field,
    listed,
    load,
    mask_row,
    misname_companion,
    negate_w,
    numbers,
    other_base,
    parameters,
    present,
    private_row,
    put,
    recast_w,
    rename_index,
    repool,
    reshape_w,
    rewrite,
    same_digest_twice,
    set_bits,
    set_byte,
    set_record,
    setup,
    shard,
    stored,
    swap,
    text,
    two_chunks,
    unfetched_task,
    unlisted,
    verify,
    whole,
    with_step,
    without,
)
from second.bundles import MANIFEST
from second.content import codes, singles
from second.elements import Json, pack
from second.frames import frame
from second.shards import ALIGNMENT, FORMAT_VERSION, Payload, Record, compact

manifest, base_table, group_table, task_table = (
    partial(put, path) for path in (MANIFEST, BASE_JSON, GROUP_JSON, TASK_JSON)
)
tensor = partial(put, TASK_JSON, "tensors")
vector = partial(put, GROUP_JSON, "vectors")

VERSIONS = {
    "ver-1-major": anywhere("another major version", manifest("format_version", value="2.0")),
    "ver-1-zero": anywhere("an older major version", manifest("format_version", value="0.9")),
    "ver-1-one-number": anywhere("no minor version", manifest("format_version", value="1")),
    "ver-1-suffix": anywhere("an unknown suffix", manifest("format_version", value="1.0-rc1")),
    "ver-1-leading-zero": anywhere("a leading zero", manifest("format_version", value="1.00")),
    "ver-2-other-draft": anywhere("another draft", manifest("format_version", value="1.999-draft")),
    "ver-3-manifest": anywhere("an unknown key", manifest("extra", value=1)),
    "ver-3-manifest-file": anywhere("an unknown key of a listed file", manifest("files", BASE_JSON, "mode", value=420)),
    "ver-3-base": load("an unknown key", base_table("tensors", "w", "strides", value=[5, 1])),
    "ver-3-group": load("an unknown key", vector("w", "offset", value=0)),
    "ver-3-task": load("an unknown key", tensor("w", "threshold", value=0.5)),
    "ver-4-manifest": anywhere(
        "an unknown feature of the bundle", manifest("required_features", value=["time-travel"])
    ),
    "ver-4-group": load("an unknown feature of the group", group_table("required_features", value=["time-travel"])),
    "ver-4-task": load("an unknown feature of the task", task_table("required_features", value=["time-travel"])),
    "ver-4-before-kind": load(
        "an unknown feature, and a kind that needs it",
        task_table("required_features", value=["time-travel"]),
        tensor("w", "kind", value="yesterday"),
    ),
    "ver-4-before-key": load(
        "an unknown feature, and a key that needs it",
        group_table("required_features", value=["time-travel"]),
        group_table("epoch", value=1970),
    ),
    "ver-4-kind": load("a kind of this version is no feature", task_table("required_features", value=["mask"])),
}

DEEP = "[" * 40 + "]" * 40
JSON_FILES = {
    "json-1-not-utf-8": load("a byte that is not UTF-8", text(TASK_JSON, '"mnist"', b'"mn\xffst"')),
    "json-1-bom": anywhere("a byte order mark", rewrite(MANIFEST, lambda old: b"\xef\xbb\xbf" + old)),
    "json-1-array": load("an array", rewrite(BASE_JSON, lambda old: b"[" + old + b"]")),
    "json-1-trailing": anywhere("more than one value", rewrite(MANIFEST, lambda old: old + b"{}")),
    "json-1-truncated": load("the end is missing", rewrite(TASK_JSON, lambda old: old[:-3])),
    "json-1-nan": load("NaN", text(TASK_JSON, '"cosine":0.875', '"cosine":NaN')),
    "json-1-infinity": load("-Infinity", text(TASK_JSON, '"cosine":0.875', '"cosine":-Infinity')),
    "json-1-overflow": load("a number beyond float64", text(TASK_JSON, '"score":null', '"score":1e999')),
    "json-1-depth": load("nested 40 deep", text(TASK_JSON, '"score":null', f'"score":{DEEP}')),
    "json-1-surrogate": load("half a surrogate pair", text(GROUP_JSON, '"signed-mask"', '"signed-mask \\ud800"')),
    "json-2-manifest": anywhere("a key twice", text(MANIFEST, '"generator"', '"generator": "other",\n "generator"')),
    "json-2-nested": load("a key twice", text(TASK_JSON, '"gain":1.5', '"gain":1.5,"gain":1.5')),
    "json-2-escaped": load("a key twice, once escaped", text(TASK_JSON, '"gain":1.5', '"gain":1.5,"g\\u0061in":1.25')),
    "json-3-format": anywhere("another format", manifest("format", value="zarr")),
    "json-3-missing": anywhere("a missing field", manifest("generator", value=REMOVE)),
    "json-3-bool": load("a bool for an integer", task_table("files", 0, "size", value=True)),
    "json-3-fraction": load("a fraction for an integer", task_table("files", 0, "size", value=15.0)),
    "json-3-negative": load("a negative length", tensor("head", "shape", value=[-2, -8])),
    "json-3-string": load("text for a number", tensor("w", "gain", value="1.5")),
    "json-3-sha256": anywhere("capital digits", manifest("files", BASE_JSON, "sha256", value="F" * 64)),
    "json-3-slug": anywhere("a capital in a slug", manifest("tasks", 0, "slug", value="Mnist")),
    "json-3-group": anywhere("a short group id", manifest("groups", 0, "id", value="g1")),
    "json-3-group-zero-in-front": anywhere(
        "a group's five digits begin with 0", manifest("groups", 0, "id", value="g00001")
    ),
    "json-3-group-long": anywhere("a group's eight digits", manifest("groups", 0, "id", value="g10000000")),
    "json-3-next-group-missing": anywhere("no next group", manifest("next_group", value=REMOVE)),
    "json-3-next-group-zero": anywhere("a next group of 0", manifest("next_group", value=0)),
    "json-3-next-group-large": anywhere("a next group beyond 10,000,000", manifest("next_group", value=10_000_001)),
    "json-3-next-group-text": anywhere("an id for the next group's number", manifest("next_group", value="g0002")),
    "json-3-revision": anywhere("a branch for a commit", manifest("base", "revision", value="main")),
    "json-3-task-name": anywhere("a control character", manifest("tasks", 0, "name", value="a\nb")),
    "json-3-task-name-line": anywhere("a line separator", manifest("tasks", 0, "name", value="a\u2028b")),
    "json-3-task-name-direction": anywhere("an override of direction", manifest("tasks", 0, "name", value="a\u202eb")),
    "json-3-generator": anywhere("an escape character", manifest("generator", value="\x1b[2J")),
    "json-3-parameter": anywhere(
        "an integer of 65 bits", manifest("groups", 0, "method", "parameters", value={"seed": 1 << 63})
    ),
    "json-3-method-name": anywhere("an escape character", manifest("groups", 0, "method", "name", value="\x1b[2J")),
    "json-3-metadata": anywhere("a number in the metadata", manifest("metadata", value={"year": 2026})),
    "json-3-metadata-task": anywhere("a list for metadata", manifest("tasks", 0, "metadata", value=[])),
    "json-3-repo-id-dots": anywhere("a path for an id", manifest("base", "repo_id", value="../..")),
    "json-3-repo-id-dashes": anywhere("two dashes in an id", manifest("base", "repo_id", value="org/a--b")),
    "json-3-repo-id-dot": anywhere("a hidden name in an id", manifest("base", "repo_id", value="org/.cache")),
    "json-3-dtype": load("not a dtype's name", tensor("head", "dtype", value="float32")),
    "json-3-kind": load("an unknown kind", tensor("w", "kind", value="maske")),
    "json-3-role": load("an unknown role", vector("w", "role", value="mean")),
    "json-3-codec": load("an unknown codec", tensor("w", "bits", "codec", value="lz4")),
    "json-3-pool-codec": load("planes of a pool", task_table("shards", 0, "pool", "codec", value="planes-zstd")),
    "json-4-manifest": anywhere("over 64 MiB", setup(grow=[MANIFEST, (64 << 20) + 1])),
    "json-4-task": load("over 64 MiB", setup(grow=[TASK_JSON, (64 << 20) + 1])),
}


MANIFESTS = {
    "man-1-changed": anywhere(
        "one letter was changed",
        late(lambda files: files.update({MANIFEST: files[MANIFEST].replace(b"make_vectors", b"made_vectors")})),
    ),
    "man-1-twice": anywhere("the digest occurs twice", rewrite(MANIFEST, same_digest_twice)),
    "man-2-task": anywhere("two tasks of one name", unfetched_task(name="mnist")),
    "man-2-slug": anywhere(
        "two tasks of one slug",
        lambda draft: draft.manifest["tasks"].append(draft.manifest["tasks"][0] | {"name": "other"}),
    ),
    "man-2-group": anywhere("a group twice", again(MANIFEST, "groups", 0)),
    "man-2-path": anywhere("a path twice", again(MANIFEST, "files", -1)),
    "man-2-order": anywhere(
        "files out of order", lambda draft: draft.listing.append(lambda document: document["files"].reverse())
    ),
    "man-2-shard": load("a shard twice", again(TASK_JSON, "shards", 0)),
    "man-3-group": anywhere("a task of no group", unfetched_task(group="g0002")),
    "man-3-file": verify("a file of no task", listed("tasks/other/task.json")),
    "man-3-shard": verify("a shard that no table names", present(MERGED_SHARD.replace("-00001-", "-00002-"), b"\0")),
    "man-3-companion": verify(
        "a companion that no task names", present(f"files/{hashlib.sha256(b'x').hexdigest()}", b"x")
    ),
    "man-3-base": verify("a file of a base that is not embedded", present("base/config.json", b"{}\n"), by_reference),
    "man-4-name": load("another name", task_table("name", value="svhn")),
    "man-4-slug": load("another slug", task_table("slug", value="svhn")),
    "man-4-group": load("another group", task_table("group", value="g0002")),
    "man-4-parameters": load("another count", manifest("tasks", 0, "parameters", value=99)),
    "man-4-cosine": load("another cosine", manifest("tasks", 0, "cosine", value=0.5)),
    "man-4-gain": load("another gain", manifest("tasks", 0, "gain", value=None)),
    "man-4-group-id": load("another id", group_table("id", value="g0002")),
    "man-4-method": load("another method", group_table("method", "name", value="emr")),
    "man-4-companion": load("another size of a companion", task_table("files", 0, "size", value=16)),
    "man-5-base": anywhere("base.json is not listed", unlisted(BASE_JSON)),
    "man-5-embedded": load("the embedded base is not listed", unlisted("base/model.safetensors")),
    "man-5-group": anywhere("group.json is not listed", unlisted(GROUP_JSON)),
    "man-5-task": anywhere("task.json is not listed", unlisted(TASK_JSON)),
    "man-5-shard": load("a shard of the task is not listed", unlisted(MASK_SHARD)),
    "man-5-merged": load("a shard of the group is not listed", unlisted(MERGED_SHARD)),
    "man-5-companion": load("a companion file is not listed", unlisted(COMPANION_PATH)),
    "man-6-next-group": anywhere("the next group's number is a listed group's", manifest("next_group", value=1)),
    "man-6-grown": anywhere("the next group's number is below a listed group's", group_twelve),
}

PATHS = {
    f"path-1-{name}": anywhere(f"the path {path!r}", listed(path))
    for name, path in {
        "parent": "../outside.json",
        "parent-inside": "tasks/../base.json",
        "absolute": "/etc/passwd",
        "backslash": "tasks\\mnist\\task.json",
        "drive": "C:/base.json",
        "dot": "./base.json",
        "double-slash": "tasks//task.json",
        "device": "base/con.json",
        "device-case": "base/Aux",
        "end-dot": "base/model.",
        "hidden": "base/.hidden",
        "control": "base/model\n",
        "number": "tasks/mnist/mask-1-of-1.safetensors",
        "foreign": "tasks/mnist/notes.txt",
        "long": "base/" + "a" * 129,
    }.items()
} | {
    "path-1-slug-device": anywhere("the slug 'nul'", unfetched_task(slug="nul")),
    "path-1-shard": load(
        "a shard elsewhere", task_table("shards", 0, "file", value="../other/mask-00001-of-00001.safetensors")
    ),
    "path-1-shard-role": load(
        "a merged shard in a task", task_table("shards", 0, "file", value="merged-00001-of-00001.safetensors")
    ),
    "path-1-companion": load("a companion elsewhere", task_table("files", 0, "name", value="../config.json")),
    "path-1-companion-depth": load("a companion four deep", task_table("files", 0, "name", value="a/b/c/config.json")),
    "path-3-case": load("companions that differ in case", companion_too("Config.json")),
    "path-3-folder": load("a companion that is the folder of another", companion_too("config.json/labels.json")),
    "path-3-folder-case": load(
        "folders that differ in case", companion_too("a/config.json"), companion_too("A/labels.json")
    ),
    "path-3-base": anywhere("files of the base that differ in case", listed("base/Model.safetensors")),
    "path-2-file": load(
        "a shard is a symbolic link to itself, elsewhere",
        late(lambda files: files.update({"../outside/mask": files.pop(MASK_SHARD)})),
        setup(symlink=[MASK_SHARD, "../../../outside/mask"]),
    ),
    "path-2-directory": load(
        "the task's directory is a symbolic link to itself, elsewhere",
        late(
            lambda files: [
                files.update({f"../outside/{path.rpartition('/')[2]}": files.pop(path)})
                for path in [*files]
                if path.startswith("tasks/mnist/")
            ]
        ),
        setup(symlink=["tasks/mnist", "../../outside"]),
    ),
    "path-2-not-a-file": verify("a companion is a directory", without(COMPANION_PATH), setup(mkdir=COMPANION_PATH)),
}

FILES = {
    "file-1-json": load("task.json has another size", manifest("files", TASK_JSON, "size", value=7)),
    "file-1-shard": verify("a shard has another size", manifest("files", MASK_SHARD, "size", value=7)),
    "file-2-json": load("group.json has another sha256", manifest("files", GROUP_JSON, "sha256", value=FALSE_SHA256)),
    "file-2-base-json": load(
        "base.json has another sha256", manifest("files", BASE_JSON, "sha256", value=FALSE_SHA256)
    ),
    "file-2-shard": verify("a shard has another sha256", manifest("files", MASK_SHARD, "sha256", value=FALSE_SHA256)),
    "file-2-companion": verify(
        "one bit of a companion", late(lambda files: files.update({COMPANION_PATH: b'{"labels": 11}\n'}))
    ),
    "file-2-name": anywhere("a companion is not named after its sha256", misname_companion),
    "file-3-foreign": verify(
        "a file that is not listed", late(lambda files: files.update({"tasks/notes.txt": b"x\n"}))
    ),
    "file-3-left-over": verify(
        "an old shard that is not listed",
        late(lambda files: files.update({MASK_SHARD.replace("mask-00001", "mask-00002"): files[MASK_SHARD]})),
    ),
    "file-4-base": load("base.json is missing", without(BASE_JSON)),
    "file-4-embedded": load("the embedded base is missing", without("base/model.safetensors")),
    "file-4-group": load("group.json is missing", without(GROUP_JSON)),
    "file-4-merged": load("a shard of the group is missing", without(MERGED_SHARD)),
    "file-4-companion": verify("a companion file is missing", without(COMPANION_PATH)),
    "file-5-wrong": verify("another git blob id", manifest("files", TASK_JSON, "git_oid", value="f" * 40)),
    "file-5-missing": anywhere("no git blob id", manifest("files", TASK_JSON, "git_oid", value=None)),
    "file-5-lfs": anywhere(
        "a git blob id of a file under LFS", manifest("files", MASK_SHARD, "git_oid", value="f" * 40)
    ),
}


SHARDS = {
    "st-1-over-limit": load("a header over the limit", shard(MASK_SHARD, length_field(100_000_001))),
    "st-1-not-json": load("not JSON", shard(MASK_SHARD, header_text(lambda old: old.replace(b":", b"=", 1)))),
    "st-1-space-first": load("white space first", shard(MASK_SHARD, header_text(lambda old: b" " + old))),
    "st-1-twice": load(
        "a tensor twice", shard(MASK_SHARD, header_text(lambda old: old[:-1] + b"," + old[old.index(b'"bits/w"') :]))
    ),
    "st-1-keys": load("an unknown key of an entry", entry(MASK_SHARD, "bits/w", strides=[1])),
    "st-1-dtype": load("an unknown dtype", entry(MASK_SHARD, "bits/w", dtype="U1")),
    "st-1-offsets": load("offsets that descend", entry(MASK_SHARD, "bits/w", data_offsets=[64, 0])),
    "st-1-size": load("a shape of another size", entry(MASK_SHARD, "bits/w", shape=[63])),
    "st-2-no-header": load("shorter than its header", shard(MASK_SHARD, length_field(4096))),
    "st-2-empty": load("seven bytes", shard(MASK_SHARD, file_edit(lambda content: content[:7]))),
    "st-2-truncated": load("the end is missing", shard(MASK_SHARD, file_edit(lambda content: content[:-1]))),
    "st-2-trailing": load("a byte too many", shard(MASK_SHARD, file_edit(lambda content: content + b"\0"))),
    "st-2-hole": load("a hole", shard(MASK_SHARD, add_entry(None, bytes(64)))),
    "st-2-overlap": load("an overlap", entry(MASK_SHARD, "fields/v", data_offsets=[0, 64])),
    "st-1-base": verify("the embedded base's header is not JSON", base_bytes(lambda old: old.replace(b":", b"=", 1))),
    "st-2-base": verify("the embedded base is truncated", base_bytes(lambda old: old[:-1])),
    "st-3-dtype": load("I8 for U8", entry(MASK_SHARD, "bits/w", dtype="I8")),
    "st-3-dimensions": load("two dimensions", entry(MASK_SHARD, "bits/w", shape=[8, 8])),
    "st-3-header": load(
        "data off the boundary",
        shard(MASK_SHARD, header_text(lambda old: old + b" " * (-len(old) % ALIGNMENT))),
        shard(MASK_SHARD, assign(header_alignment=1)),
    ),
    "st-3-payload": load(
        "a payload of 72 bytes",
        shard(
            MASK_SHARD,
            lambda target: vars(target.entries[0]).update(shape=[72], data=target.entries[0].data + bytes(8)),
        ),
    ),
    "st-4-missing": load("no metadata", shard(MASK_SHARD, assign(metadata=None))),
    "st-4-other-key": load("another key", shard(MASK_SHARD, assign(metadata={"format": "pt"}))),
    "st-4-not-text": load("a number", shard(MASK_SHARD, assign(metadata={"tallstore": 1}))),
    "st-4-two-keys": load(
        "two keys", shard(MASK_SHARD, assign(metadata={"tallstore": FORMAT_VERSION, "format": "pt"}))
    ),
    "st-5-task": load("another header hash", task_table("shards", 0, "header_xxh3", value="f" * 32)),
    "st-5-group": load("another header hash", group_table("shards", 0, "header_xxh3", value="f" * 32)),
    "st-6-missing": load(
        "no key for a payload",
        header(
            MASK_SHARD, lambda fields: {("bits/W" if key == "bits/w" else key): value for key, value in fields.items()}
        ),
    ),
    "st-6-unexpected": verify("a key that nothing refers to", shard(MASK_SHARD, add_entry("bits/x", b""))),
}

INDEXES = {
    "idx-1-task": load("another index hash", task_table("shards", 0, "index_xxh3", value="f" * 32)),
    "idx-1-group": load("another index hash", group_table("shards", 0, "index_xxh3", value="f" * 32)),
    "idx-1-shape": load("records of 16 bytes", shard(MASK_SHARD, assign(index_columns=16))),
    "idx-1-first": load("not the last tensor", shard(PRIVATE_SHARD, assign(index_position=0))),
    "idx-1-missing": load("no index", header(MASK_SHARD, rename_index)),
    "idx-2-descending": load(
        "the first chunk ends behind the second", two_chunks, shard(PRIVATE_SHARD, set_record(0, end=100))
    ),
    "idx-2-empty-chunk": load("a chunk of no bytes", two_chunks, shard(PRIVATE_SHARD, set_record(0, end=0))),
    "idx-2-beyond": load("an end beyond the payload", shard(MASK_SHARD, set_record(0, end=65))),
    "idx-2-long-chunk": load(
        "1,100 bytes for a chunk of 5", swap("bits/w", stored=(pack(codes("w bits", 35, 0, 2), 1) + bytes(1095),))
    ),
    "idx-2-huge": load("an end of 2^64 - 1", shard(MASK_SHARD, set_record(0, end=(1 << 64) - 1))),
    "idx-2-short": load(
        "a payload longer than its last end says",
        shard(
            MASK_SHARD,
            lambda target: vars(target.entries[0]).update(shape=[128], data=target.entries[0].data + bytes(64)),
        ),
    ),
    "idx-2-at": load("a first record that is not there", tensor("w", "bits", "at", value=9)),
    "idx-2-at-huge": load("a first record of 2^53", tensor("w", "bits", "at", value=1 << 53)),
    "idx-2-unused": verify(
        "a record that no payload uses", shard(MASK_SHARD, lambda target: target.records.append(Record(bytes(16), 5)))
    ),
    "idx-2-shared": load(
        "two payloads of one record",
        whole("twin", 16),
        whole("other twin", 16),
        tensor("other twin", "values", "at", value=1),
    ),
    "idx-3-bits": load("another chunk hash", shard(MASK_SHARD, set_record(0, digest=bytes(16)))),
    "idx-3-pool": load("another hash of the pool", shard(PRIVATE_SHARD, set_record(-1, digest=bytes(16)))),
    "idx-3-merged": load("another chunk hash", shard(MERGED_SHARD, set_record(0, digest=bytes(16)))),
    "idx-3-second-chunk": load(
        "another hash of a second chunk", two_chunks, shard(PRIVATE_SHARD, set_record(1, digest=bytes(16)))
    ),
    "idx-4-payload": verify("a bit set behind a payload", shard(MASK_SHARD, set_byte("bits/w", 63, 1))),
    "idx-4-pool": verify(
        "a bit set between two members of a pool",
        lambda draft: draft.edits.append(lambda sealed: repool(sealed.shards[PRIVATE_SHARD])),
    ),
    "idx-5-rank": load("a rank, and nothing sparse", shard(MASK_SHARD, set_record(0, rank=1))),
}


SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
CODECS = {
    "cod-1-absent": load("no declared size", stored("values/head", partial(frame, declared=None, window_log=17))),
    "cod-1-other": load("another declared size", stored("values/head", lambda raw: frame(raw + b"\0"))),
    "cod-1-bomb": load("a frame of 16 MiB", stored("values/head", lambda raw: frame(raw + bytes(16 << 20)))),
    "cod-2-trailing": load("a byte behind the frame", stored("values/head", lambda raw: frame(raw) + b"\0")),
    "cod-2-two-frames": load("a second frame", stored("values/head", lambda raw: frame(raw) + frame(b"more"))),
    "cod-2-skippable-first": load("a skippable frame first", stored("values/head", lambda raw: SKIPPABLE + frame(raw))),
    "cod-2-skippable-last": load("a skippable frame behind", stored("values/head", lambda raw: frame(raw) + SKIPPABLE)),
    "cod-2-dictionary": load("a dictionary", stored("values/head", partial(frame, dictionary=7))),
    "cod-2-window": load("a window of 16 MiB", stored("values/head", large_window)),
    "cod-3-magic": load("no zstd frame", stored("values/head", lambda raw: raw)),
    "cod-3-block": load(
        "a block of the reserved type", stored("values/head", lambda raw: frame(raw)[:9] + b"\x07\0\0")
    ),
    "cod-3-truncated": load("the end is missing", stored("values/head", lambda raw: frame(raw)[:-1])),
    "cod-3-longer": load(
        "more content than declared", stored("values/head", lambda raw: frame(raw + b"\0", declared=len(raw)))
    ),
    "cod-3-shorter": load(
        "less content than declared", stored("values/head", lambda raw: frame(raw[:-1], declared=len(raw)))
    ),
    "cod-3-checksum": load(
        "another checksum", stored("values/head", lambda raw: frame(raw, checksum=True)[:-4] + bytes(4))
    ),
    "cod-4-bits": load("planes of bits", swap("bits/w", codec="planes-zstd", stored=(b"x",))),
    "cod-4-codes": load("planes of int8 codes", swap("merged/w", codec="planes-zstd")),
    "cod-4-integers": load("planes of int64", swap("values/steps", codec="planes-zstd")),
    "cod-5-short": load("a byte too few", swap("bits/w", stored=(pack(codes("w bits", 35, 0, 2), 1)[:4],))),
    "cod-5-long": load("a byte too many", swap("bits/w", stored=(pack(codes("w bits", 35, 0, 2), 1) + b"\0",))),
}


CONTENTS = {
    "bit-1-bits": load("a bit behind element 34", set_bits("bits/w", -1, 0x80)),
    "bit-1-fields": load("a field behind element 12", set_bits("fields/v", -1, 0x04)),
    "bit-1-log4": load("a code behind element 12", set_bits("merged/v", -1, 0x10)),
    "bit-1-pooled": load("a bit behind element 3, pooled", set_bits("bits/u", -1, 0x10)),
    "bit-1-leading": load("a bit behind the leading rows", set_bits("bits/e", -1, 0x10)),
    "field-1-signed": load("code 3", set_bits("fields/v", 0, 0x0C)),
    "int8-1-merged": load("code -128", swap("merged/w", raw=b"\x80" + bytes(34))),
    "bool-1-private": load("a bool of 2", swap("values/flags", raw=b"\1\0\2")),
    "num-1-gain": load("14 significant bits", tensor("w", "gain", value=1 + 2.0**-13)),
    "num-1-gain-decimal": load("0.1", tensor("w", "gain", value=0.1)),
    "num-1-gain-negative-zero": load("-0.0", tensor("w", "gain", value=-0.0)),
    "num-1-gain-small": load("2^-61", tensor("w", "gain", value=2.0**-61)),
    "num-1-gain-large": load("2^61", tensor("w", "gain", value=2.0**61)),
    "num-1-gains": load("14 significant bits", numbers("gains/u", 1 + 2.0**-13)),
    "num-1-gains-nan": load("NaN", numbers("gains/u", math.nan)),
    "num-1-gains-negative-zero": load("-0.0", numbers("gains/u", -0.0)),
    "num-1-step": load("14 significant bits", numbers("merged.step/w", 1 + 2.0**-13)),
    "num-1-step-negative-zero": load("-0.0", numbers("merged.step/w", -0.0)),
    "num-1-step-small": load("2^-61", numbers("merged.step/v", 2.0**-61)),
    "num-2-infinity": load("infinity", numbers("merged/u", math.inf)),
    "num-2-nan": load("NaN", numbers("merged/u", math.nan)),
    "num-2-negative-zero": load("-0.0", numbers("merged/u", -0.0)),
    "num-2-small": load("2^-61", numbers("merged/u", 1.0, -(2.0**-61))),
    "num-2-subnormal": load("a subnormal", numbers("merged/u", 2.0**-149)),
    "num-2-float16": load("a float16 NaN", swap("merged/e", raw=b"\x01\x7c" + bytes(22))),
    "num-3-scale": load("2^40 times 2^40", tensor("w", "gain", value=2.0**40), numbers("merged.step/w", 2.0**40)),
    "num-4-step": load("a negative step", numbers("merged.step/w", -0.5)),
}

FIRST: Json = {"shard": 0, "codec": "raw", "at": 0}
TABLES = {
    "tab-1-integer-base": load(
        "a mask over int64",
        extra("tensors", mask_row("ids") | {"bits": Payload("bits/ids", "bits", 3, b"\5")}),
        tensor(4, value=REMOVE),
    ),
    "tab-1-integer-result": load("a mask that gives int32", tensor("w", "dtype", value="I32")),
    "tab-1-shape": load("a mask of another shape", tensor("w", "shape", value=[5, 7])),
    "tab-1-same-shape": load("the same, of another shape", tensor("ids", "shape", value=[1, 3])),
    "tab-1-same-dtype": load("int64 that is the same as float32", tensor("ids", "dtype", value="F32")),
    "tab-1-vector": load("a shared vector over int64", extra("vectors", float_vector("ids", 3))),
    "tab-2-private": load("whole, and of a base tensor that is not there", tensor("head", "base", value="w2")),
    "tab-2-base": load("a base tensor that is not there", tensor("w", "base", value="W")),
    "tab-2-dropped": load("dropped, and not in the base", tensor("gone", "name", value="went")),
    "tab-2-vector": load("a shared vector over nothing", extra("vectors", float_vector("U", 4))),
    "tab-3-nothing": load("tied to nothing", tensor("tied", "of", value="Head")),
    "tab-3-alias": load("tied to itself", tensor("tied", "of", value="tied")),
    "tab-3-dropped": load("tied to a dropped tensor", tensor("tied", "of", value="gone")),
    "tab-4-more": load("more leading rows than the base has", tensor("e", "rows", value=5)),
    "tab-4-fewer": load("fewer leading rows than there are", tensor("e", "rows", value=3)),
    "tab-4-none": load("no leading row", tensor("e", "rows", value=0)),
    "tab-4-empty": load("leading rows without an element", empty_rows),
    "tab-4-other": load("another second dimension", tensor("e", "shape", value=[6, 4]), parameters(6)),
    "tab-5-no-vector": load("no merged vector", lambda draft: draft.documents[GROUP_JSON]["vectors"].pop(2)),
    "tab-6-shard": load("a shard that is not there", tensor("w", "bits", "shard", value=2)),
    "tab-6-pool-range": load("beyond the pool", tensor("flags", "values", "at", value=1 << 20)),
    "tab-6-pool-alignment": load("off the boundary", tensor("steps", "values", "at", value=4)),
    "tab-6-pool-overlap": load("two members of one byte", tensor("steps", "values", "at", value=0)),
    "tab-6-no-pool": load("no pool", task_table("shards", 0, "pool", value=None)),
    "tab-6-null": load("a tensor of six elements, and no values", tensor("flags", "values", value=None)),
    "tab-6-empty": load("values of an empty tensor", tensor("flags", "shape", value=[0]), parameters(-3)),
    "tab-6-no-further": load("two further rows, and no payload", tensor("e", "further", value=None)),
    "tab-6-no-step": load("int8 without steps", vector("w", "step", value=None)),
    "tab-6-step": load("float32 with a step", with_step),
    "tab-7-both": load("gain and gains", tensor("u", "gain", value=1.0)),
    "tab-7-neither": load("neither gain nor gains", tensor("w", "gain", value=REMOVE)),
    "tab-7-row-axes": load("three row axes of two", tensor("w", "row_axes", value=3)),
    "tab-7-vector-row-axes": load("three row axes of two", vector("w", "row_axes", value=3)),
    "tab-7-disagree": load(
        "gains by other rows than the steps",
        lambda draft: draft.documents[TASK_JSON]["tensors"][0].update(
            gains=Payload("gains/w", "F32", 1, singles([1.5]), "pooled"), row_axes=0
        ),
        tensor("w", "gain", value=REMOVE),
    ),
    "tab-8-tensor": load("a tensor twice", tensor("tied", "name", value="head")),
    "tab-8-dropped": load("dropped twice", again(TASK_JSON, "tensors", -1)),
    "tab-8-vector": load("a vector twice", again(GROUP_JSON, "vectors", 0)),
    "tab-8-base": load("a base tensor twice", again(BASE_JSON, "tensors", 0)),
    "tab-8-companion": load("a companion twice", again(TASK_JSON, "files", 0)),
}


WEIGHT_MAP: Json = {
    "metadata": {},
    "weight_map": {
        name: f"model-0000{2 if name == 'w' else 1}-of-00002.safetensors"
        for name in ("w", "v", "u", "e", "ids", "gone")
    },
}
ALIAS: Json = {"dtype": "F32", "shape": [7, 5], "chunks": []}
BASES = {
    "base-1-missing": load("w is missing", base_file(drop_w)),
    "base-1-dtype": load("w is float16", base_file(recast_w)),
    "base-1-shape": load("w is 1-D", base_file(reshape_w)),
    "base-1-given": given_base("the base that is given lacks w", other_base(drop_w)),
    "base-2-embedded": load("one bit of w", base_file(negate_w)),
    "base-2-given": given_base("the base that is given has one other bit", other_base(negate_w)),
    "base-3-nothing": load(
        "an alias of nothing", base_table("tensors", -1, value=ALIAS | {"name": "t", "alias_of": "W"})
    ),
    "base-3-itself": load(
        "an alias of itself", base_table("tensors", -1, value=ALIAS | {"name": "t", "alias_of": "t"})
    ),
    "base-3-shape": load(
        "an alias of another shape",
        base_table("tensors", -1, value=ALIAS | {"name": "t", "alias_of": "w", "shape": [5, 7]}),
    ),
    "base-3-chunks": load(
        "an alias with hashes",
        base_table("tensors", -1, value=ALIAS | {"name": "t", "alias_of": "w", "chunks": ["f" * 32]}),
    ),
    "base-4-index": verify(
        "an index that places a tensor in a file that is not there",
        lambda draft: draft.others.update({"base/model.safetensors.index.json": compact(WEIGHT_MAP)}),
        base_name("model-00001-of-00002.safetensors"),
    ),
    "base-4-twice": verify(
        "a tensor in two files of the index",
        base_copy("model-00002-of-00002.safetensors"),
        base_name("model-00001-of-00002.safetensors"),
        lambda draft: draft.others.update({"base/model.safetensors.index.json": compact(WEIGHT_MAP)}),
    ),
    "base-4-name": verify(
        "no file of a name that a reader looks for",
        base_name("weights.safetensors"),
    ),
    "base-2-fewer": load("no hash of w", base_table("tensors", "w", "chunks", value=[])),
    "base-2-more": load("two hashes of one chunk", base_table("tensors", "w", "chunks", value=["f" * 32] * 2)),
}

LIMITS = {
    "lim-1-dimensions": load("17 dimensions", private_row("x", [1] * 16 + [0])),
    "lim-1-elements": load("2^41 elements", private_row("x", [1 << 41], FIRST)),
    "lim-1-product": load(
        "2^62 float32 elements, whose bytes are 0 in 64 bits", private_row("x", [1 << 31, 1 << 31], FIRST)
    ),
    "lim-1-name": load("a name of 1,026 bytes", private_row("é" * 513, [0])),
    "lim-1-task-name": anywhere("a name of 257 characters", unfetched_task(name="n" * 257)),
}

INVALID: dict[str, Invalid] = {
    **VERSIONS,
    **JSON_FILES,
    **MANIFESTS,
    **PATHS,
    **FILES,
    **SHARDS,
    **INDEXES,
    **CODECS,
    **CONTENTS,
    **TABLES,
    **BASES,
    **LIMITS,
}
