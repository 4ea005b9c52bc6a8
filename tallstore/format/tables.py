"""What must hold inside the tables of a bundle and between them, beyond what their types say.

Every ``check_…`` is a generator of problems: a loader raises the first one (`refuse`), `verify` reports them all.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import TypeVar

from tallstore.errors import FormatError
from tallstore.format import layout
from tallstore.format.dtypes import CODED, chunk_count
from tallstore.format.manifest import (
    MAX_NUMEL,
    AliasTensor,
    BasedTensor,
    BaseTable,
    BaseTensor,
    CodedTensor,
    DroppedTensor,
    ExtendedTensor,
    FileEntry,
    GroupEntry,
    GroupTable,
    Manifest,
    Payload,
    PrivateTensor,
    SameTensor,
    Shard,
    Sparse,
    TaskEntry,
    TaskTable,
    Tensor,
    Vector,
    Whole,
)
from tallstore.format.payloads import (
    BaseTensors,
    Coded,
    Shape,
    Stored,
    Vectors,
    base_tensors,
    coded_part,
    group_payloads,
    group_vectors,
    task_payloads,
)
from tallstore.format.r13 import is_r13_number
from tallstore.format.shards import POOL_ALIGNMENT

MAX_NAME_NBYTES = 1024
STEPPED = frozenset({"I8", "LOG4"})

Problems = Iterator[FormatError]
Named = TypeVar("Named", bound=Hashable)


def refuse(problems: Problems) -> None:
    """Raise the first of *problems*, if there is one."""
    for problem in problems:
        raise problem


# --- tallstore.json ---------------------------------------------------------------------------------------------------


def check_manifest(manifest: Manifest) -> Problems:
    """MAN-2, MAN-3, MAN-5, MAN-6, PATH-1, PATH-3, FILE-2, FILE-5: names and paths, and what they refer to."""
    where = layout.MANIFEST
    for noun, names in (
        ("group", [group.id for group in manifest.groups]),
        ("task", [task.name for task in manifest.tasks]),
        ("slug", [task.slug for task in manifest.tasks]),
        ("path", [file.path for file in manifest.files]),
    ):
        for name in _repeated(names):
            yield FormatError("MAN-2", where, f"lists the {noun} {name[:200]!r} twice")
    if any(after.path < before.path for before, after in pairwise(manifest.files)):
        yield FormatError("MAN-2", where, "does not list its files sorted by path")
    for group in manifest.groups:
        if layout.group_number(group.id) >= manifest.next_group:
            yield FormatError(
                "MAN-6", where, f"its next_group is {manifest.next_group}, and it lists the group {group.id!r}"
            )
    embedded = (file.path for file in manifest.files if file.path.startswith(f"{layout.BASE_DIRECTORY}/"))
    for name, other in layout.clashes(embedded).items():  # all other paths are in small letters
        problem = f"lists {other[:200]!r} and {name[:200]!r}, which cannot lie beside each other on every system"
        yield FormatError("PATH-3", where, problem)
    paths = {file.path for file in manifest.files}
    yield from _check_tasks(manifest, paths)
    for group in manifest.groups:
        yield from _check_listed(layout.group_table(group.id), paths, where)
    yield from _check_listed(layout.BASE_TABLE, paths, where)
    for file in manifest.files:
        yield from _check_file(file)


def check_base_weights(manifest: Manifest) -> Problems:
    """BASE-4: the embedded base is of safetensors files, whatever else lies in its directory."""
    single = f"{layout.BASE_DIRECTORY}/model.safetensors"
    if not {single, f"{single}.index.json"} & {file.path for file in manifest.files}:
        problem = "has neither model.safetensors nor model.safetensors.index.json"
        yield FormatError("BASE-4", layout.BASE_DIRECTORY, problem)


def check_embedded_base(manifest: Manifest) -> Problems:
    """MAN-5: a base that is embedded has files; who brings a base of their own needs none."""
    directory = f"{layout.BASE_DIRECTORY}/"
    if manifest.base.embedded and not any(file.path.startswith(directory) for file in manifest.files):
        yield FormatError("MAN-5", layout.MANIFEST, f"embeds the base, and lists no file of {directory}")


def _check_tasks(manifest: Manifest, paths: set[str]) -> Problems:
    groups = {group.id for group in manifest.groups}
    for task in manifest.tasks:
        where = f"{layout.MANIFEST}, task {task.name!r}"
        if not layout.is_slug(task.slug):
            yield FormatError("PATH-1", where, f"its slug {task.slug!r} cannot name a directory on every system")
            continue
        if task.group not in groups:
            yield FormatError("MAN-3", where, f"is of the group {task.group!r}, which is not listed")
        yield from _check_listed(layout.task_table(task.slug), paths, where)


def _check_file(file: FileEntry) -> Problems:
    if not layout.is_bundle_path(file.path):
        yield FormatError("PATH-1", _listed(file), "is not a path that a bundle can have")
    if file.path.startswith("files/") and file.path != layout.companion_path(file.sha256):
        yield FormatError("FILE-2", _listed(file), "is not named after its sha256")
    if (file.git_oid is None) is not file.path.endswith(".safetensors"):
        yield FormatError(
            "FILE-5", _listed(file), "has a git_oid where it must be null, or null where it must have one"
        )


def _listed(file: FileEntry) -> str:
    return f"{layout.MANIFEST}, file {file.path[:200]!r}"


def _check_listed(path: str, paths: set[str], where: str) -> Problems:
    if path not in paths:
        yield FormatError("MAN-5", where, f"{path} is not among the files that the manifest lists")


# --- base.json --------------------------------------------------------------------------------------------------------


def check_base(table: BaseTable) -> Problems:
    """TAB-8, LIM-1, BASE-2, BASE-3: names once each, as many hashes as chunks, aliases of real tensors."""
    where = layout.BASE_TABLE
    tensors = base_tensors(table)
    for name in _repeated([tensor.name for tensor in table.tensors]):
        yield FormatError("TAB-8", where, f"lists the tensor {name!r} twice")
    for tensor in table.tensors:
        place = _place(where, tensor.name)
        yield from _check_limits(tensor.name, tensor.shape, place)
        if tensor.alias_of is not None:
            target = tensors.get(tensor.alias_of)
            if target is None or target.alias_of is not None:
                yield FormatError("BASE-3", place, f"is an alias of {tensor.alias_of!r}, which is no tensor of its own")
            elif (target.dtype, target.shape) != (tensor.dtype, tensor.shape):
                yield FormatError("BASE-3", place, f"is an alias of {tensor.alias_of!r}, of another dtype or shape")
            if tensor.chunks:
                yield FormatError("BASE-3", place, "is an alias, and has hashes of its own")
        elif len(tensor.chunks) != chunk_count(math.prod(tensor.shape)):
            due = chunk_count(math.prod(tensor.shape))
            yield FormatError("BASE-2", place, f"has {len(tensor.chunks)} hashes for {due} chunks")


# --- groups/<id>/group.json -------------------------------------------------------------------------------------------


def check_group(
    table: GroupTable, entry: GroupEntry, base: BaseTensors | None, files: Mapping[str, FileEntry]
) -> Problems:
    """MAN-4, MAN-5, PATH-1, LIM-1, TAB-1, TAB-2, TAB-6, TAB-7, TAB-8, COD-4, IDX-2.

    Args:
        table: the group's.
        entry: the manifest's for this group.
        base: the tensors of base.json; None where it cannot be read: what needs it is not checked then.
        files: the manifest's by path.
    """
    where = layout.group_table(entry.id)
    if (table.id, table.method) != (entry.id, entry.method):
        yield FormatError("MAN-4", where, "its id or method is not the one in the manifest")
    yield from _check_shards(table.shards, layout.group_directory(entry.id), files, where)
    for tensor, role in _repeated([(vector.tensor, vector.role) for vector in table.vectors]):
        yield FormatError("TAB-8", where, f"has the {role} vector of {tensor!r} twice")
    if base is None:
        return
    vectors = group_vectors(table)
    for vector in table.vectors:
        yield from _check_vector(vector, base.get(vector.tensor), _place(where, vector.tensor))
        if vector.role == "merged_lo":
            yield from _check_steps_agree(vector, vectors.get((vector.tensor, "merged")), _place(where, vector.tensor))
    yield from _check_payloads(list(group_payloads(table, base)), table.shards, where)


def _check_vector(vector: Vector, tensor: BaseTensor | None, where: str) -> Problems:
    if tensor is None:
        yield FormatError("TAB-2", where, "has a shared vector, and the base has no such tensor")
        return
    if tensor.dtype not in CODED or 0 in tensor.shape:
        yield FormatError("TAB-1", where, f"has a shared vector, and is {_described(tensor.dtype, tensor.shape)}")
    yield from _check_row_axes(vector.row_axes, tensor.shape, where)
    if (vector.step is not None) is not (vector.dtype in STEPPED):
        problem = "lacks its steps" if vector.step is None else "has steps, which are for I8 and LOG4"
        yield FormatError("TAB-6", where, f"its {vector.role} vector of {vector.dtype} {problem}")


def _check_steps_agree(lower: Vector, upper: Vector | None, where: str) -> Problems:
    if upper is None or upper.step is None or lower.step is None or upper.row_axes == lower.row_axes:
        return
    problem = f"its merged vector has steps over {upper.row_axes} axes, its merged_lo over {lower.row_axes}"
    yield FormatError("TAB-7", where, problem)


# --- tasks/<slug>/task.json -------------------------------------------------------------------------------------------


def check_task(
    table: TaskTable,
    entry: TaskEntry,
    base: BaseTensors | None,
    vectors: Vectors | None,
    files: Mapping[str, FileEntry],
) -> Problems:
    """MAN-4, MAN-5, PATH-1, PATH-3, LIM-1, NUM-1, COD-4, IDX-2, and TAB-1 to TAB-10.

    Args:
        table: the task's.
        entry: the manifest's for this task.
        base: the tensors of base.json; None where it cannot be read.
        vectors: those of the task's group; None where its table cannot be read. What needs either is not checked then.
        files: the manifest's by path.
    """
    where = layout.task_table(entry.slug)
    yield from _check_entry(table, entry, where)
    yield from _check_shards(table.shards, layout.task_directory(entry.slug), files, where)
    for kind, names in (
        ("a tensor", [tensor.name for tensor in table.tensors if not isinstance(tensor, DroppedTensor)]),
        ("a dropped tensor", [tensor.name for tensor in table.tensors if isinstance(tensor, DroppedTensor)]),
        ("a file", [file.name for file in table.files]),
    ):
        for name in _repeated(names):
            yield FormatError("TAB-8", where, f"has {kind} {name!r} twice")
    targets = {tensor.name for tensor in table.tensors if isinstance(tensor, Whole)}
    for tensor in table.tensors:
        yield from _check_tensor(tensor, targets, base, vectors, _place(where, tensor.name))
    yield from _check_payloads(list(task_payloads(table)), table.shards, where)
    yield from _check_companions(table, files, where)


def _check_entry(table: TaskTable, entry: TaskEntry, where: str) -> Problems:
    parameters = sum(math.prod(tensor.shape) for tensor in table.tensors if isinstance(tensor, Whole))
    for field, found, listed in (
        ("name", table.name, entry.name),
        ("slug", table.slug, entry.slug),
        ("group", table.group, entry.group),
        ("parameters", parameters, entry.parameters),
        ("cosine", table.fidelity.cosine, entry.cosine),
        ("gain", table.fidelity.gain, entry.gain),
    ):
        if found != listed:
            yield FormatError("MAN-4", where, f"its {field} is {found!r}, the manifest says {listed!r}")


def _check_tensor(
    tensor: Tensor, targets: set[str], base: BaseTensors | None, vectors: Vectors | None, where: str
) -> Problems:
    match tensor:
        case DroppedTensor():
            if base is not None and tensor.name not in base:
                yield FormatError("TAB-2", where, "is dropped, and the base has no such tensor")
        case AliasTensor():
            if tensor.of not in targets:
                yield FormatError("TAB-3", where, f"is an alias of {tensor.of!r}, which is no tensor of its own")
        case PrivateTensor():
            yield from _check_limits(tensor.name, tensor.shape, where)
            yield from _check_null(tensor.values, math.prod(tensor.shape), where)
            if base is not None and tensor.base is not None and tensor.base not in base:
                yield FormatError("TAB-2", where, f"the base has no tensor {tensor.base!r}")
        case _:
            yield from _check_limits(tensor.name, tensor.shape, where)
            if base is None:
                return
            source = base.get(tensor.base_name)
            if source is None:
                yield FormatError("TAB-2", where, f"the base has no tensor {tensor.base_name!r}")
                return
            yield from _check_based(tensor, source, vectors, where)


def _check_based(
    tensor: CodedTensor | SameTensor | ExtendedTensor, source: BaseTensor, vectors: Vectors | None, where: str
) -> Problems:
    if isinstance(tensor, ExtendedTensor):
        if not _extends(tensor, source):
            yield FormatError(
                "TAB-4", where, f"{tensor.rows} leading rows of {list(tensor.shape)} do not fit {list(source.shape)}"
            )
            return
        yield from _check_null(tensor.further, tensor.shape[0] - tensor.rows, where)
    elif tensor.shape != source.shape:
        yield FormatError("TAB-1", where, f"is {list(tensor.shape)}, the base's is {list(source.shape)}")
    coded = coded_part(tensor)
    yield from _check_dtypes(tensor, source, where, cast_only=coded is None)
    if coded is not None:
        yield from _check_code(coded, vectors, where)


def _extends(tensor: ExtendedTensor, source: BaseTensor) -> bool:
    return (
        len(tensor.shape) == len(source.shape) >= 1
        and 0 not in tensor.shape
        and tensor.shape[1:] == source.shape[1:]
        and tensor.rows == min(tensor.shape[0], source.shape[0]) >= 1
    )


def _check_dtypes(tensor: BasedTensor, source: BaseTensor, where: str, *, cast_only: bool) -> Problems:
    """A code needs floats; a tensor that is only cast may be of any dtype, as long as it keeps it."""
    if cast_only and tensor.dtype == source.dtype:
        return
    if not {tensor.dtype, source.dtype} <= CODED:
        yield FormatError("TAB-1", where, f"cannot be {tensor.dtype} over a base tensor of {source.dtype}")


def _check_code(coded: Coded, vectors: Vectors | None, where: str) -> Problems:
    code = coded.code
    if 0 in coded.shape:
        yield FormatError("TAB-1", where, "is coded, and has no elements")
    if (code.gain is None) is (code.gains is None):
        yield FormatError("TAB-7", where, "has either a gain or gains, not both and not neither")
    if code.gain is not None and not is_r13_number(code.gain):
        yield FormatError("NUM-1", where, f"its gain {code.gain!r} is not an r13 number")
    yield from _check_row_axes(code.row_axes, coded.shape, where)
    if isinstance(code, Sparse):
        yield from _check_sparse(code, coded.numel, where)
    if vectors is None:
        return
    for role in coded.roles:
        vector = vectors.get((coded.base_name, role))
        if vector is None:
            yield FormatError("TAB-5", where, f"its group has no {role} vector for {coded.base_name!r}")
        elif code.gains is not None and vector.step is not None and code.row_axes != vector.row_axes:
            problem = f"has gains over {code.row_axes} axes, its {role} vector has steps over {vector.row_axes}"
            yield FormatError("TAB-7", where, problem)


def _check_sparse(code: Sparse, numel: int, where: str) -> Problems:
    yield from _check_null(code.values, code.count, where)
    if code.count > numel:
        yield FormatError("TAB-9", where, f"says that {code.count} of its {numel} bits are set")
    if math.frexp(code.unit)[0] != 0.5 or not is_r13_number(code.unit):
        yield FormatError("TAB-10", where, f"its unit {code.unit!r} is no power of two from 2^-60 to 2^60")


def _check_companions(table: TaskTable, files: Mapping[str, FileEntry], where: str) -> Problems:
    for name, other in layout.clashes(file.name for file in table.files).items():
        problem = (
            f"has the files {other[:200]!r} and {name[:200]!r}, which cannot lie beside each other on every system"
        )
        yield FormatError("PATH-3", where, problem)
    for file in table.files:
        if not layout.is_companion_name(file.name):
            yield FormatError("PATH-1", where, f"the file name {file.name[:200]!r} is not one that can be written")
        listed = files.get(layout.companion_path(file.sha256))
        if listed is None:
            yield FormatError("MAN-5", where, f"the file {file.name!r} is not among those that the manifest lists")
        elif listed.size != file.size:
            yield FormatError(
                "MAN-4", where, f"the file {file.name!r} has {file.size} bytes, the manifest says {listed.size}"
            )


# --- what the tables share --------------------------------------------------------------------------------------------


def _check_shards(shards: tuple[Shard, ...], directory: str, files: Mapping[str, FileEntry], where: str) -> Problems:
    for name in _repeated([shard.file for shard in shards]):
        yield FormatError("MAN-2", where, f"lists the shard {name!r} twice")
    for shard in shards:
        path = f"{directory}/{shard.file}"
        if not layout.is_bundle_path(path) or not shard.file.endswith(".safetensors"):
            yield FormatError("PATH-1", where, f"{shard.file[:200]!r} is not the name of a shard")
        elif path not in files:
            yield FormatError("MAN-5", where, f"{path} is not among the files that the manifest lists")


def _check_payloads(payloads: list[Stored], shards: tuple[Shard, ...], where: str) -> Problems:
    """TAB-6, COD-4, IDX-2: every payload is in a shard, and has bytes or index records of its own there."""
    for stored in payloads:
        if stored.payload.shard >= len(shards):
            problem = f"{stored.key!r} is in shard {stored.payload.shard}, there are {len(shards)}"
            yield FormatError("TAB-6", where, problem)
        if stored.payload.codec == "planes-zstd" and not stored.encoding.is_float:
            problem = f"{stored.key!r} is in planes-zstd, which is for floating-point payloads"
            yield FormatError("COD-4", where, problem)
    members = defaultdict[int, list[Stored]](list)
    for stored in payloads:
        members[stored.payload.shard].append(stored)
    for number, shard in enumerate(shards):
        yield from _check_pool(members[number], shard, where)
        yield from _check_records(members[number], shard, where)


def _check_pool(members: list[Stored], shard: Shard, where: str) -> Problems:
    taken = 0
    pooled = [stored for stored in members if stored.payload.codec == "pooled"]
    for stored in sorted(pooled, key=attrgetter("payload.at")):
        start = stored.payload.at
        stop = start + stored.encoding.nbytes(stored.numel)
        if start % POOL_ALIGNMENT or shard.pool is None or stop > shard.pool.nbytes:
            problem = f"{stored.key!r} takes bytes {start} to {stop}, which are not in the shard's pool, or not aligned"
            yield FormatError("TAB-6", where, problem)
        elif start < taken:
            yield FormatError("TAB-6", where, f"{stored.key!r} begins inside another payload of the pool")
        taken = max(taken, stop)


def _check_records(members: list[Stored], shard: Shard, where: str) -> Problems:
    spans = [(stored.payload.at, stored.records, stored.key) for stored in members if stored.payload.codec != "pooled"]
    if shard.pool is not None:
        spans.append((shard.pool.at, chunk_count(shard.pool.nbytes), "pool"))
    taken = 0
    for at, records, key in sorted(spans, key=itemgetter(0)):
        if at < taken:
            yield FormatError("IDX-2", where, f"{key!r} takes an index record that another payload has")
        taken = max(taken, at + records)


def _check_limits(name: str, shape: Shape, where: str) -> Problems:
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_NBYTES:
        yield FormatError("LIM-1", where, f"its name has more than {MAX_NAME_NBYTES} bytes")
    if math.prod(shape) > MAX_NUMEL:
        yield FormatError("LIM-1", where, f"has more than {MAX_NUMEL} elements")


def _check_row_axes(row_axes: int, shape: Shape, where: str) -> Problems:
    if row_axes > max(1, len(shape)):
        yield FormatError("TAB-7", where, f"has rows over {row_axes} axes of {len(shape)}")


def _check_null(payload: Payload | None, count: int, where: str) -> Problems:
    if (payload is None) is not (count == 0):
        problem = "has no bytes for its elements" if payload is None else "has bytes for no elements"
        yield FormatError("TAB-6", where, problem)


def _repeated(names: Iterable[Named]) -> list[Named]:
    return [name for name, count in Counter(names).items() if count > 1]


def _place(where: str, name: str) -> str:
    return f"{where}, tensor {name[:200]!r}"


def _described(dtype: str, shape: Shape) -> str:
    return f"{dtype} {list(shape)}"
