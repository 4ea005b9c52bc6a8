"""`verify`: every rule that a bundle breaks, not the first. Needs no torch, and the memory of a few chunks."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Container, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from tallstore.errors import (
    BundleChangedError,
    BundleNotFoundError,
    FormatError,
    IntegrityError,
    TallstoreError,
    one_line,
)
from tallstore.files import hash_file
from tallstore.format import layout
from tallstore.format.manifest import (
    MAX_NUMEL,
    BaseTable,
    FileEntry,
    GroupEntry,
    GroupTable,
    Manifest,
    TaskEntry,
    TaskTable,
)
from tallstore.format.parsing import MAX_JSON_NBYTES, Table, is_newer_minor, own_sha256, parse, parse_manifest
from tallstore.format.payloads import BaseTensors, Vectors, base_tensors, group_payloads, group_vectors, task_payloads
from tallstore.format.shard_reader import LocalFile
from tallstore.format.tables import check_base, check_embedded_base, check_group, check_manifest, check_task
from tallstore.meter import Meter, Progress
from tallstore.verifying.base_checks import check_base_files
from tallstore.verifying.findings import Problems, attempt
from tallstore.verifying.shard_checks import OwnedShards, check_scales, check_shards

_COMPANIONS = "files"
_HASHING_THREADS = 2  # sha256 is slower than a disk


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule that a bundle breaks.

    Attributes:
        rule: its id in ``spec/tallstore-1.md``, such as ``"IDX-3"``.
        where: the file, and the tensor or key in it.
        message: what is wrong there.
    """

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.message} [{self.rule}]")


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> list[Problem]:
    """Check every file of a bundle against every rule of the specification.

    Reads every byte twice: once for the sha256 of its file, once for what it means. A task none of whose files are here
    was not fetched, and that is no problem; nor are the missing files of a group that no task here belongs to.

    Args:
        path: the bundle's directory.
        progress: called with bytes done and bytes in all, from several threads, one at a time.

    Returns:
        what was found, each once: the manifest's first, then the files', the base's, and group by group its own and its
        tasks'. Empty for a sound bundle.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        BundleChangedError: somebody changed it meanwhile: what was found is of two bundles.
    """
    root = Path(path)
    before = _manifest_bytes(root)
    problems = listed(_check(root, progress))
    if problems and _manifest_bytes(root) != before:
        raise BundleChangedError(f"{root}: was changed while it was verified; verify it again")
    return problems


def _manifest_bytes(root: Path) -> bytes | None:
    """None where they cannot be read, which is for the checks to say."""
    try:
        return _read_manifest(root)
    except (TallstoreError, OSError):
        return None


def listed(problems: Problems) -> list[Problem]:
    """What was found, each once."""
    return list(dict.fromkeys(Problem(error.rule, error.where, error.problem) for error in problems))


@dataclass(frozen=True, slots=True)
class _Bundle:
    """What the checks share.

    Attributes:
        root: the bundle's directory.
        manifest: tallstore.json.
        files: what it lists, by path.
        places: the listed files that are here and plain files.
        absent: the listed paths where nothing is.
        meter: of the bytes of *places*, to be read twice.
        referred: the paths that something in the bundle refers to; grows as tables are read.
        unread: the directories for which that is not known, since a table is not here or broken; grows likewise.
    """

    root: Path
    manifest: Manifest
    files: Mapping[str, FileEntry]
    places: Mapping[str, Path]
    absent: frozenset[str]
    meter: Meter
    referred: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)

    def open_file(self, place: Path, where: str) -> LocalFile:
        """One of *places*, to be read."""
        return LocalFile(place, where, self.meter.advance)


def _check(root: Path, progress: Progress | None) -> Problems:
    manifest = yield from check_manifest_file(root)
    if manifest is None:
        return  # it alone says what the other files are
    bundle = yield from _find_files(root, manifest, progress)
    hashing = ThreadPoolExecutor(_HASHING_THREADS)
    try:
        hashed = hashing.map(partial(_check_hashes, bundle), bundle.places)
        contents = [*_check_contents(bundle)]
        for problems in hashed:
            yield from problems
    finally:
        hashing.shutdown(cancel_futures=True)
    bundle.meter.end_phase()
    yield from _check_missing(bundle)
    yield from _check_referred(bundle)
    yield from _check_unlisted(bundle)
    yield from contents


# --- tallstore.json ---------------------------------------------------------------------------------------------------


def check_manifest_file(root: Path) -> Generator[FormatError, None, Manifest | None]:
    """The manifest of the bundle in *root*, and what is wrong with it; None where it cannot be understood.

    Raises:
        BundleNotFoundError: there is none.
    """
    raw = yield from attempt(layout.MANIFEST, partial(_read_manifest, root))
    manifest = None if raw is None else (yield from _parse_manifest(raw))
    if manifest is not None:
        yield from check_manifest(manifest)
        yield from check_embedded_base(manifest)
    return manifest


def _read_manifest(root: Path) -> bytes:
    try:
        return layout.read_bounded(root, layout.MANIFEST, MAX_JSON_NBYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleNotFoundError(f"{root}: there is no bundle (no {layout.MANIFEST}); check the path") from None


def _parse_manifest(raw: bytes) -> Generator[FormatError, None, Manifest | None]:
    """The manifest, also where it breaks no rule but that it was changed."""
    try:
        return parse_manifest(raw, layout.MANIFEST)
    except IntegrityError as error:
        yield error
    except FormatError as error:
        yield error
        return None
    recorded = json.loads(raw)["manifest_sha256"]
    digest = own_sha256(raw, recorded)
    if digest is None:
        return None
    sealed = raw.replace(recorded.encode(), digest.encode())
    return (yield from attempt(layout.MANIFEST, partial(parse_manifest, sealed, layout.MANIFEST)))


# --- files ------------------------------------------------------------------------------------------------------------


def _find_files(root: Path, manifest: Manifest, progress: Progress | None) -> Generator[FormatError, None, _Bundle]:
    """PATH-2: which of the listed files are here."""
    files = {file.path: file for file in manifest.files}
    places, absent = dict[str, Path](), set[str]()
    for path in filter(layout.is_bundle_path, files):
        try:
            places[path] = layout.resolve(root, path)
        except FileNotFoundError:  # noqa: PERF203 - each file is tried on its own
            absent.add(path)
        except FormatError as error:
            yield error
        except OSError as error:
            yield layout.unreadable(path, error)
    meter = Meter(progress, [2 * sum(files[path].size for path in places)])
    return _Bundle(root, manifest, files, places, frozenset(absent), meter)


def _check_hashes(bundle: _Bundle, path: str) -> list[FormatError]:
    """FILE-1, FILE-2, FILE-5: one file against what the manifest says."""
    entry, place = bundle.files[path], bundle.places[path]
    try:
        size = place.stat().st_size
        if size != entry.size:
            return [IntegrityError("FILE-1", entry.path, f"has {size} bytes, the manifest says {entry.size}")]
        written = hash_file(place, bundle.meter.advance)
    except ConnectionError:  # a broken pipe: who showed the progress went away
        raise
    except OSError as error:
        return [layout.unreadable(entry.path, error)]
    if written.sha256 != entry.sha256:
        return [IntegrityError("FILE-2", entry.path, "changed since it was written (another sha256)")]
    if entry.git_oid not in {None, written.git_oid}:
        return [FormatError("FILE-5", entry.path, f"its git blob id is {written.git_oid}, the manifest says another")]
    return []


def _check_missing(bundle: _Bundle) -> Problems:
    """FILE-4: a partial bundle lacks whole tasks, and what only they need."""
    due = due_directories(bundle.manifest, bundle.absent)
    companions = {path for path in bundle.referred if _directory(path) == _COMPANIONS}
    for path in sorted(bundle.absent):
        if _directory(path) in due or path in companions:
            yield FormatError("FILE-4", path, "is missing; fetch it again")


def due_directories(manifest: Manifest, absent: Container[str]) -> set[str]:
    """The directories of which no listed file may be absent, where others are: those of the tasks that are there."""
    here = {_directory(file.path) for file in manifest.files if file.path not in absent}
    due = {"", layout.BASE_DIRECTORY}
    for task in manifest.tasks:
        if layout.task_directory(task.slug) in here:
            due |= {layout.task_directory(task.slug), layout.group_directory(task.group)}
    return due


def _check_referred(bundle: _Bundle) -> Problems:
    """MAN-3: every listed file is somebody's."""
    for path in filter(layout.is_bundle_path, bundle.files):
        if path not in bundle.referred and _directory(path) not in bundle.unread:
            yield FormatError("MAN-3", layout.MANIFEST, f"lists {path}, which nothing in the bundle refers to")


def _check_unlisted(bundle: _Bundle) -> Problems:
    """FILE-3: nothing is in the bundle's own directories that the manifest does not list."""
    directories = {parent.as_posix() for path in bundle.files for parent in PurePosixPath(path).parents}
    for folder, folders, names in os.walk(bundle.root):
        folders.sort()
        inside = Path(folder).relative_to(bundle.root)
        folders[:] = [name for name in folders if layout.is_own_place(f"{(inside / name).as_posix()}/any")]
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for path in sorted((inside / name).as_posix() for name in names + links):
            # A link in the place of a listed file's directory was reported with the file.
            if path not in bundle.files and layout.is_own_place(path) and path not in directories:
                shown = os.fsencode(path).decode("utf-8", "backslashreplace")
                yield FormatError("FILE-3", shown, "is not listed in the manifest; remove it")


def _directory(path: str) -> str:
    return path.rpartition("/")[0]


# --- contents ---------------------------------------------------------------------------------------------------------


def _check_contents(bundle: _Bundle) -> Problems:
    """Tables, shards and the embedded base."""
    bundle.referred.add(layout.BASE_TABLE)
    table = yield from _read_table(bundle, layout.BASE_TABLE, BaseTable)
    base = None
    if table is not None:
        yield from check_base(table)
        base = base_tensors(table)
    if bundle.manifest.base.embedded:
        embedded = [path for path in bundle.files if _directory(path) == layout.BASE_DIRECTORY]
        bundle.referred.update(embedded)
        if base is not None and embedded:
            yield from check_base_files(base, bundle.root, embedded, bundle.places, bundle.open_file)
    tasks = defaultdict[str, list[TaskEntry]](list)
    for task in bundle.manifest.tasks:
        tasks[task.group].append(task)
    for group in bundle.manifest.groups:
        yield from _check_group(bundle, group, tasks.pop(group.id, []), base)
    for task in chain.from_iterable(tasks.values()):  # of groups that are not listed
        yield from _check_task(bundle, task, base, None)


def _check_group(bundle: _Bundle, entry: GroupEntry, tasks: Iterable[TaskEntry], base: BaseTensors | None) -> Problems:
    """A group and its tasks."""
    directory, path = layout.group_directory(entry.id), layout.group_table(entry.id)
    bundle.referred.add(path)
    table = yield from _read_table(bundle, path, GroupTable)
    if table is None:
        bundle.unread.add(directory)
        for task in tasks:
            yield from _check_task(bundle, task, base, None)
        return
    yield from check_group(table, entry, base, bundle.files)
    with closing(OwnedShards(directory, table.shards, bundle.places, bundle.open_file)) as shared:
        bundle.referred.update(shared.paths)
        payloads = list(group_payloads(table, base or {}))
        known = all(vector.tensor in (base or {}) for vector in table.vectors)
        yield from check_shards(shared, payloads, complete=known)
        group = _Group(group_vectors(table), shared)
        for task in tasks:
            yield from _check_task(bundle, task, base, group)


@dataclass(frozen=True, slots=True)
class _Group:
    """What the tasks of a group need of it."""

    vectors: Vectors
    shards: OwnedShards


def _check_task(bundle: _Bundle, entry: TaskEntry, base: BaseTensors | None, group: _Group | None) -> Problems:
    directory, path = layout.task_directory(entry.slug), layout.task_table(entry.slug)
    bundle.referred.add(path)
    table = yield from _read_table(bundle, path, TaskTable)
    if table is None:
        bundle.unread.update({directory, _COMPANIONS})
        return
    yield from check_task(table, entry, base, group.vectors if group else None, bundle.files)
    bundle.referred.update(layout.companion_path(file.sha256) for file in table.files)
    with closing(OwnedShards(directory, table.shards, bundle.places, bundle.open_file)) as owned:
        bundle.referred.update(owned.paths)
        payloads = list(task_payloads(table))
        # Extended rows that do not fit (TAB-4) leave further rows of no size; some sizes are over the limit (LIM-1).
        sound = [stored for stored in payloads if 0 < stored.numel <= MAX_NUMEL]
        yield from check_shards(owned, sound, complete=len(sound) == len(payloads))
        if base is not None and group is not None:
            yield from check_scales(table, base, group.vectors, owned, group.shards)


def _read_table(bundle: _Bundle, path: str, kind: type[Table]) -> Generator[FormatError, None, Table | None]:
    """A table, parsed; None where it is not here, or breaks a rule."""
    if path not in bundle.places:
        return None
    return (
        yield from attempt(
            path,
            lambda: parse(
                layout.read_bounded(bundle.root, path, MAX_JSON_NBYTES),
                kind,
                path,
                newer_minor=is_newer_minor(bundle.manifest),
            ),
        )
    )
