"""Where things are in a bundle: the closed grammar of its paths, the slugs of its tasks, and how to stay inside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from tallstore.errors import FormatError

MANIFEST = "tallstore.json"
BASE_TABLE = "base.json"
BASE_DIRECTORY = "base"
# Where nothing may lie that the manifest does not list (FILE-3); what is elsewhere is the user's.
_OWN_DIRECTORIES = frozenset({BASE_DIRECTORY, "groups", "tasks", "files"})

_DEVICE = r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])"
_SLUG = rf"(?!{_DEVICE}(?:/|$))[a-z0-9][a-z0-9_-]{{0,63}}"
_SEGMENT = rf"(?!(?i:{_DEVICE})(?:\.|$))[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}(?<!\.)"
_GROUP = r"g(?:[0-9]{4}|[1-9][0-9]{4,6})"
_SHARD = r"[0-9]{5}-of-[0-9]{5}\.safetensors"

_MAX_SLUG = 64
_ENDS_WITH_GROUP = re.compile(rf"-{_GROUP}$")
_SLUG_PATTERN = re.compile(_SLUG)
_SEGMENT_PATTERN = re.compile(_SEGMENT)
_PATH_PATTERN = re.compile(
    rf"tasks/{_SLUG}/(?:task\.json|(?:mask|private)-{_SHARD})"
    r"|files/[0-9a-f]{64}"
    rf"|groups/{_GROUP}/(?:group\.json|merged-{_SHARD})"
    rf"|{BASE_DIRECTORY}/{_SEGMENT}"
    rf"|{re.escape(BASE_TABLE)}"
)
_MAX_COMPANION_SEGMENTS = 3


def group_id(number: int) -> str:
    """The id of the group *number*."""
    return f"g{number:04d}"


def group_number(group: str) -> int:
    """The number in a group's id."""
    return int(group[1:])


def group_directory(group: str) -> str:
    """A group's directory in the bundle."""
    return f"groups/{group}"


def group_table(group: str) -> str:
    """A group's table in the bundle."""
    return f"groups/{group}/group.json"


def task_directory(slug: str) -> str:
    """A task's directory in the bundle."""
    return f"tasks/{slug}"


def task_table(slug: str) -> str:
    """A task's table in the bundle."""
    return f"tasks/{slug}/task.json"


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of shard *number* (from 1) of *count*."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def companion_path(sha256: str) -> str:
    """Where a companion file is stored."""
    return f"files/{sha256}"


def is_bundle_path(path: str) -> bool:
    """Whether *path* is one that a manifest may list (PATH-1)."""
    return _PATH_PATTERN.fullmatch(path) is not None


def is_own_place(path: str) -> bool:
    """Whether *path* is one where only what the manifest lists may lie (FILE-3)."""
    first, *rest = path.split("/")
    return first in _OWN_DIRECTORIES and bool(rest) and not any(part.startswith(".") for part in rest)


def is_slug(slug: str) -> bool:
    """Whether *slug* can name a task's directory on every file system."""
    return _SLUG_PATTERN.fullmatch(slug) is not None


def is_companion_name(name: str) -> bool:
    """Whether *name* is a relative path of at most three plain segments, safe to write anywhere."""
    segments = name.split("/")
    return len(segments) <= _MAX_COMPANION_SEGMENTS and all(_SEGMENT_PATTERN.fullmatch(part) for part in segments)


def clashes(names: Iterable[str]) -> dict[str, str]:
    """The paths that cannot lie beside an earlier one of *names* on every system, and that one (PATH-3).

    Two of them differ in the case of letters alone, in the names of their folders too, or one is the folder of another.
    """
    taken: dict[str, tuple[str, str]] = {}  # by what a system without case calls it: as it is called, and by whom
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        parts = name.split("/")
        steps = ["/".join(parts[:count]) + "/" for count in range(1, len(parts))] + [name]
        for step in steps:
            there, owner = taken.get(step.rstrip("/").lower(), (step, name))
            if there != step:
                found[name] = owner
                break
        else:
            for step in steps:
                taken.setdefault(step.rstrip("/").lower(), (step, name))
    return found


def slugify(name: str, taken: Container[str], group: int = 1) -> str:
    """A slug for the task *name* of the group number *group* that is not in *taken*.

    Letters lose their accents and their case, what is left over becomes hyphens. Where nothing readable remains, or the
    slug is taken, a few digits of the name's sha256 are added; the result depends on the arguments alone. It ends with
    the group's id in all groups but the first, and there too where the name by itself gives such an end: so no two
    tasks of different groups ever have the same, whichever of them are there at a time (WRITE-2).
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-_")[:_MAX_SLUG].rstrip("-_")
    suffix = f"-{group_id(group)}" if group > 1 or _ENDS_WITH_GROUP.search(slug) else ""
    room = _MAX_SLUG - len(suffix)
    candidate = slug[:room].rstrip("-_") + suffix
    if is_slug(candidate) and candidate not in taken:
        return candidate
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    for length in range(8, room):
        candidate = f"{slug[: room - 1 - length]}-{digest[:length]}".strip("-") + suffix
        if is_slug(candidate) and candidate not in taken:
            return candidate
    raise FormatError("MAN-2", f"task {name!r}", "has no slug left that is not taken")


def resolve(root: Path, path: str) -> Path:
    """The file at *path* of the bundle in *root*, which is a regular file and no link.

    In a snapshot of the Hub's cache, files are links into the blobs of its repository: those are followed.

    Raises:
        FormatError: PATH-1, *path* is outside the grammar; PATH-2, something on the way or at its end is not a plain
            directory or file; FILE-4, the system cannot tell.
        FileNotFoundError: there is nothing at *path*.
    """
    if path != MANIFEST and not is_bundle_path(path):
        raise FormatError("PATH-1", repr(path)[:200], "is not a path that a bundle can have")
    place = root
    segments = path.split("/")
    for depth, segment in enumerate(segments, start=1):
        place = place / segment
        with readable(path):
            mode = os.lstat(place).st_mode
        is_last = depth == len(segments)
        expected = stat.S_ISREG(mode) if is_last else stat.S_ISDIR(mode)
        if not expected and not (is_last and stat.S_ISLNK(mode) and _leads_to_blob(root, path)):
            raise FormatError("PATH-2", path, f"{segment!r} is a {_file_kind(mode)}, not a plain file or directory")
    return place


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """What the system refuses inside the block becomes an error of the file at *path* of the bundle.

    Raises:
        FormatError: FILE-4, in the place of an OSError; that nothing is there stays what it is.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ConnectionError):  # a broken pipe: who showed the progress went away
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(where: str, error: OSError) -> FormatError:
    """The problem that the system cannot read a file (FILE-4)."""
    return FormatError("FILE-4", where, f"cannot be read ({error.strerror})")


def is_here(root: Path | str, path: str) -> bool:
    """Whether there is a file at *path*, which is of the grammar; what is on the way to it is not looked at.

    Raises:
        FormatError: FILE-4, the system cannot tell.
    """
    place = f"{root}/{path}"  # joining hundreds of names takes pathlib longer than looking them up
    try:
        mode = os.lstat(place).st_mode
        return stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and _leads_to_blob(Path(root), path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None


def _leads_to_blob(root: Path, path: str) -> bool:
    """Whether the link at *path* is one that the Hub's client makes in a snapshot.

    It leads to a file in ``blobs`` of the same repository, or on from there into the blobs that all repositories share:
    ``<cache>/<repository>/snapshots/<commit>/<path>`` to ``<cache>/<repository>/blobs/<name>`` to
    ``<cache>/blobs/<xx>/<name>``.

    Raises:
        FileNotFoundError: it leads nowhere.
    """
    snapshot = root.resolve()
    if snapshot.parent.name != "snapshots":
        return False
    repository = snapshot.parent.parent
    blob = _target(snapshot / path)
    if blob.parent != repository / "blobs":
        return False
    mode = os.lstat(blob).st_mode
    if not stat.S_ISLNK(mode):
        return stat.S_ISREG(mode)
    shared = _target(blob)
    return shared.parent.parent == repository.parent / "blobs" and stat.S_ISREG(os.lstat(shared).st_mode)


def _target(link: Path) -> Path:
    """Where a link leads in one step, in a directory without links."""
    target = Path(os.path.normpath(link.parent / link.readlink()))
    return target.parent.resolve() / target.name


def read_bounded(root: Path, path: str, limit: int, *, rule: str = "JSON-4") -> bytes:
    """All bytes of a file of the bundle, refused under *rule* if they are more than *limit*.

    Raises:
        FormatError: as `resolve`, or *rule*; FILE-4, the system cannot read it.
        FileNotFoundError, NotADirectoryError: there is nothing at *path*.
    """
    with readable(path), resolve(root, path).open("rb") as file:
        raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(raw) > limit:
        raise FormatError(rule, path, f"is over the limit of {limit} bytes")
    return raw


def _file_kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "symbolic link"),
        (stat.S_ISDIR, "directory"),
        (stat.S_ISREG, "file"),
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "device")
