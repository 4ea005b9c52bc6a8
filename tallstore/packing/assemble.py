"""What makes payloads a bundle: base.json, the tables of group and tasks, companion files, and last the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import xxhash

import tallstore
from tallstore import files
from tallstore.checkpoints import Checkpoint, HubRef
from tallstore.checkpoints import writer as checkpoint_writer
from tallstore.errors import DamagedCheckpointError, InputError
from tallstore.files import Written
from tallstore.fit import Method
from tallstore.format import layout, parsing
from tallstore.format import manifest as tables
from tallstore.format.bits import Bytes
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.packing.companions import companions_of, reading
from tallstore.packing.fidelity import combine
from tallstore.packing.group import GroupPacker, GroupTask
from tallstore.packing.task_progress import TaskProgress


def base_table(base: Checkpoint) -> tables.BaseTable:
    """What the base must be. Reads and hashes all of it."""
    tensors = []
    for name in base.names:
        spec = base.spec(name)
        alias = base.aliases.get(name)
        hashes = () if alias else tuple(xxhash.xxh3_128_hexdigest(chunk.data) for chunk in _chunks(base, name))
        tensors.append(tables.BaseTensor(name=name, dtype=spec.dtype, shape=spec.shape, chunks=hashes, alias_of=alias))
    return tables.BaseTable(format="tallstore.base", tensors=tuple(tensors))


def write_base(base: Checkpoint, table: tables.BaseTable, root: Path, *, embed: bool) -> dict[str, Written]:
    """Write base.json and, if asked, the base itself in Hugging Face layout; the files by their path in the bundle."""
    raw = parsing.serialise(table)
    written = {layout.BASE_TABLE: files.write_file(root / layout.BASE_TABLE, raw)}
    if embed:
        directory = root / layout.BASE_DIRECTORY
        directory.mkdir()
        specs = {name: base.spec(name) for name in base.names if name not in base.aliases}
        hashes = {tensor.name: tensor.chunks for tensor in table.tensors}
        for name, file in checkpoint_writer.write_checkpoint(
            directory, specs, lambda name: _hashed_chunks(base, name, hashes[name])
        ).items():
            written[f"{layout.BASE_DIRECTORY}/{name}"] = file
        for name, path in companions_of(base, base.where).items():
            if "/" not in name:  # base/ is flat
                with reading(path, base.where):
                    written[f"{layout.BASE_DIRECTORY}/{name}"] = files.write_file(directory / name, path)
    return written


def _chunks(checkpoint: Checkpoint, name: str) -> Iterator[Bytes]:
    numel = checkpoint.spec(name).numel
    for start in range(0, numel, CHUNK_NUMEL):
        yield checkpoint.read_bytes(name, start, min(start + CHUNK_NUMEL, numel))


def _hashed_chunks(base: Checkpoint, name: str, hashes: Iterable[str]) -> Iterator[bytes]:
    """The chunks that base.json has the hashes of.

    Raises:
        DamagedCheckpointError: they are others by now.
    """
    for chunk, expected in zip(_chunks(base, name), hashes, strict=True):
        if xxhash.xxh3_128_hexdigest(chunk.data) != expected:
            raise DamagedCheckpointError(base.where, f"tensor {name!r} was changed while it was read; start again")
        yield chunk.tobytes()


def write_group(group: GroupPacker, method: tables.Method, root: Path) -> dict[str, Written]:
    """Finish the shared vectors' shards and write group.json; the files by their path in the bundle."""
    shards, by_name = group.writer.finish()
    table = tables.GroupTable(
        format="tallstore.group",
        id=group.id,
        required_features=(),
        method=method,
        shards=shards,
        vectors=tuple(group.vectors),
    )
    directory = layout.group_directory(group.id)
    written = {f"{directory}/{name}": file for name, file in by_name.items()}
    path = layout.group_table(group.id)
    return written | {path: files.write_file(root / path, parsing.serialise(table))}


def recorded_method(method: Method) -> tables.Method:
    """The method as group.json and the manifest record it."""
    return tables.Method(name=method.name, parameters=method.parameters)


def write_task(
    task: GroupTask,
    group: str,
    root: Path,
    shards: tuple[tables.Shard, ...],
    by_name: Mapping[str, Written],
    *,
    score: float | None,
    chosen: Mapping[str, float],
) -> tuple[tables.TaskTable, dict[str, Written]]:
    """Store one task's companion files, write task.json; its table, and the files by path.

    *shards* and *by_name* are what its writer finished with.
    """
    slug = task.slug
    written = {f"{layout.task_directory(slug)}/{name}": file for name, file in by_name.items()}
    carried = []
    for name, source in companions_of(task.expert.checkpoint, task.expert.where).items():
        with reading(source, task.expert.where):
            file = files.hash_file(source)
            stored = layout.companion_path(file.sha256)
            if not (root / stored).exists():
                (root / stored).parent.mkdir(exist_ok=True)
                if files.write_file(root / stored, source) != file:
                    raise InputError(task.expert.where, f"{name} was changed while it was read; start again")
        written[stored] = file
        carried.append(tables.CompanionFile(name=name, sha256=file.sha256, size=file.size))
    estimates = {"sign": combine(task.sign), "signed": combine(task.signed)}
    table = tables.TaskTable(
        format="tallstore.task",
        name=task.expert.task,
        slug=slug,
        group=group,
        required_features=(),
        shards=shards,
        tensors=(*_entries(task), *(tables.DroppedTensor(name=name) for name in task.expert.dropped)),
        files=tuple(carried),
        chosen=dict(chosen),
        fidelity=tables.Fidelity(
            cosine=_rounded(task.sums.cosine),
            gain=_rounded(task.sums.gain),
            score=score,
            estimates={name: estimate for name, estimate in estimates.items() if estimate is not None},
        ),
    )
    path = layout.task_table(slug)
    return table, written | {path: files.write_file(root / path, parsing.serialise(table))}


def _entries(task: TaskProgress) -> Iterator[tables.Tensor]:
    """In the order of the expert's names, ties included."""
    aliases = task.expert.aliases
    for name in task.expert.checkpoint.names:
        if name in aliases:
            yield tables.AliasTensor(name=name, of=aliases[name])
        else:
            yield task.entries[name]


def parameters(checkpoint: Checkpoint) -> int:
    """Elements of all tensors of a checkpoint, ties counted once."""
    return sum(checkpoint.spec(name).numel for name in checkpoint.names if name not in checkpoint.aliases)


def write_manifest(
    root: Path,
    base: tables.BasePin,
    groups: tuple[tables.GroupEntry, ...],
    tasks: tuple[tables.TaskEntry, ...],
    written: Mapping[str, Written],
) -> tables.Manifest:
    """Seal the bundle; nothing is written after this."""
    listed = tuple(
        tables.FileEntry(
            path=path,
            size=file.size,
            sha256=file.sha256,
            git_oid=None if path.endswith(".safetensors") else file.git_oid,
        )
        for path, file in sorted(written.items())
    )
    manifest = tables.Manifest(
        format="tallstore",
        format_version=tables.FORMAT_VERSION,
        manifest_sha256="0" * 64,
        generator=f"tallstore {tallstore.__version__}",
        required_features=(),
        base=base,
        next_group=max((layout.group_number(group.id) for group in groups), default=0) + 1,
        groups=groups,
        tasks=tasks,
        files=listed,
    )
    raw = parsing.serialise_manifest(manifest)
    files.write_file(root / layout.MANIFEST, raw)
    return parsing.parse_manifest(raw, layout.MANIFEST)


def pin(base: Checkpoint, reference: HubRef | None, *, embed: bool) -> tables.BasePin:
    """Where a reader may get the base: where it was said to be, or where it was downloaded from."""
    hub = reference or base.hub
    return tables.BasePin(repo_id=hub.repo_id if hub else None, revision=hub.revision if hub else None, embedded=embed)


def task_entry(table: tables.TaskTable, numel: int) -> tables.TaskEntry:
    """The manifest's entry of a task of *numel* parameters."""
    return tables.TaskEntry(
        name=table.name,
        slug=table.slug,
        group=table.group,
        parameters=numel,
        cosine=table.fidelity.cosine,
        gain=table.fidelity.gain,
    )


def record_scores(root: Path, scores: Mapping[str, float]) -> tables.Manifest:
    """Enter the user's scores into the tables of the bundle at *root*, and seal it again."""
    raw = (root / layout.MANIFEST).read_bytes()
    manifest = parsing.parse_manifest(raw, layout.MANIFEST)
    listed = {file.path: file for file in manifest.files}
    for entry in manifest.tasks:
        path = layout.task_table(entry.slug)
        table = parsing.parse((root / path).read_bytes(), tables.TaskTable, path)
        fidelity = msgspec.structs.replace(table.fidelity, score=scores[entry.name])
        raw = parsing.serialise(msgspec.structs.replace(table, fidelity=fidelity))
        file = files.write_file(root / path, raw)
        listed[path] = tables.FileEntry(path=path, size=file.size, sha256=file.sha256, git_oid=file.git_oid)
    sealed = msgspec.structs.replace(manifest, files=tuple(listed[file.path] for file in manifest.files))
    files.write_file(root / layout.MANIFEST, parsing.serialise_manifest(sealed))
    return sealed


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
