"""The JSON files of a bundle, and the headers of safetensors files."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import safetensors
from safetensors import SafetensorError

from tallstore.errors import FormatError, TallstoreError
from tallstore.format import parsing, tables
from tallstore.format.manifest import BaseTable, FileEntry, GroupEntry, GroupTable, Manifest, TaskEntry, TaskTable
from tallstore.format.payloads import BaseTensors, Vectors, base_tensors, group_vectors
from tallstore.format.safetensors_header import HeaderProblem, parse_header
from tests.fuzz import seeds
from tests.fuzz.bundles import seal_manifest
from tests.fuzz.outcomes import Broken, check_message, typed

WARNED = frozenset({"newer-minor"})
KINDS = (BaseTable, GroupTable, TaskTable)


def manifest(data: bytes) -> None:
    """A manifest, as it is and with its hash mended: parsed, checked, and the same once it is written again."""
    for raw in {data, seal_manifest(data)}:
        parsed = typed(lambda raw=raw: parsing.parse_manifest(raw, "tallstore.json"))
        if isinstance(parsed, Manifest):
            for problem in [*tables.check_manifest(parsed), *tables.check_embedded_base(parsed)]:
                check_message(str(problem))
            again = parsing.parse_manifest(parsing.serialise_manifest(parsed), "tallstore.json")
            if _plain(again) != _plain(parsed):
                raise Broken("written again, the manifest says something else")
            agrees_with_slow_parser(raw, parsed)


def _plain(parsed: Manifest) -> Any:
    return parsing.msgspec.structs.replace(parsed, manifest_sha256="")


def agrees_with_slow_parser(raw: bytes, parsed: Manifest) -> None:
    """What is taken for exactly as tallstore writes it is what a close look finds, too."""
    document, newer = parsing._document(raw, "tallstore.json"), parsing.is_newer_minor(parsed)
    slow = parsing._convert(document, Manifest, "tallstore.json", newer_minor=newer, to_change=False)
    if slow != parsed:
        raise Broken("the fast and the slow parser disagree")


@cache
def _context() -> tuple[dict[str, TaskEntry], dict[str, GroupEntry], dict[str, FileEntry], BaseTensors, Vectors]:
    """What a table is checked against: that of the vector that has a tensor of most kinds."""
    bundle = seeds.VECTORS / "valid" / "unbroken-kernel" / "bundle"
    found = parsing.parse_manifest((bundle / "tallstore.json").read_bytes(), "tallstore.json")
    base = parsing.parse((bundle / "base.json").read_bytes(), BaseTable, "base.json")
    group = parsing.parse((bundle / "groups/g0001/group.json").read_bytes(), GroupTable, "group.json")
    return (
        {task.slug: task for task in found.tasks},
        {entry.id: entry for entry in found.groups},
        {file.path: file for file in found.files},
        base_tensors(base),
        group_vectors(group),
    )


def table_seeds() -> list[bytes]:
    """Tables of all three kinds behind a byte that says which."""
    names = ("base.json", "group.json", "task.json")
    return [bytes([number]) + raw for number, name in enumerate(names) for raw in seeds.jsons(name)]


def any_table(data: bytes) -> None:
    """base.json, group.json or task.json, by the first byte: parsed, and checked as loaders and `verify` do."""
    kind, raw = KINDS[data[0] % 3 if data else 0], data[1:]
    parsed = typed(lambda: parsing.parse(raw, kind, "table.json"))
    if isinstance(parsed, TallstoreError):
        return
    slow = parsing._convert(
        parsing._document(raw, "table.json"), kind, "table.json", newer_minor=False, to_change=False
    )
    if slow != parsed or parsing.parse(parsing.serialise(parsed), kind, "table.json") != parsed:
        raise Broken("two ways to parse the table disagree")
    tasks, groups, files, base, vectors = _context()
    if isinstance(parsed, BaseTable):
        problems = list(tables.check_base(parsed))
    elif isinstance(parsed, GroupTable):
        problems = [
            found for each in (base, None) for found in tables.check_group(parsed, groups["g0001"], each, files)
        ]
    else:
        entry = next(iter(tasks.values()))
        contexts = ((base, vectors), (base, None), (None, None))
        problems = [found for one, two in contexts for found in tables.check_task(parsed, entry, one, two, files)]
    for problem in problems:
        check_message(str(problem))


def header(data: bytes) -> None:
    """A safetensors file: what our parser takes, the library takes too, and sees the same tensors in it."""
    try:
        ours = parse_header(data, len(data))
    except HeaderProblem as problem:
        check_message(str(FormatError(problem.rule, "file", problem.problem)))
        return
    try:
        theirs = dict(safetensors.deserialize(data))
    except SafetensorError as error:
        raise Broken(f"the library refuses what our parser takes: {error}") from None
    seen = {name: (row["dtype"], tuple(row["shape"]), bytes(row["data"])) for name, row in theirs.items()}
    expected = {
        name: (entry.dtype, entry.shape, data[entry.start : entry.stop]) for name, entry in ours.tensors.items()
    }
    if seen != expected:
        raise Broken("our parser and the library see other tensors")
    json.dumps(dict(ours.metadata))
