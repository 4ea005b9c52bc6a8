"""`push`: a bundle to the Hub, as one commit of what changed, made onto the commit that it was compared with."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tallstore.errors import (
    BundleNotFoundError,
    CardError,
    FormatError,
    HubError,
    IntegrityError,
    NotFetchedError,
    OutputExistsError,
)
from tallstore.files import Written, hash_bytes, hash_file
from tallstore.format import layout
from tallstore.format.manifest import FileEntry, Manifest, TaskTable
from tallstore.format.parsing import MAX_JSON_NBYTES, is_newer_minor, parse, parse_manifest
from tallstore.hub.card import render
from tallstore.hub.changes import Changes, RemoteFile, compare, is_same
from tallstore.hub.repository import Head, Repository
from tallstore.inspecting.summary import Tables, summarise, summarise_task
from tallstore.meter import Progress
from tallstore.verifying import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

README: Final = "README.md"
# Files that go into git, which the client reads into memory when it commits.
_SMALL_NBYTES: Final = 1 << 20
# What a repository may hold and be called empty: what is there for people.
_HARMLESS: Final = re.compile(r"\.[^/]*|LICENSE|NOTICE|.*\.(?:md|txt|pdf|png|jpe?g|gif|svg|webp)", re.IGNORECASE)


def push(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CommitInfo:
    """Push a bundle to the Hub: one commit, which has all of it or is not made.

    The bundle is verified first. What the repository has is not sent again, nor what an interrupted push sent; files of
    a bundle that this one does not list are deleted in the same commit, all other files stay. README.md, the model
    card, is generated between two comments; what is written around them, here or on the Hub, is kept (see
    `tallstore.hub.card`).

    Args:
        path: the bundle's directory.
        repo_id: ``"org/name"``; made where it is not there.
        private: whether a repository that is made is private; by default its owner's setting. An existing public one is
            refused where True is given.
        token: of the Hub; by default the one that is saved (`hf auth login`).
        revision: the branch, main by default; made from main where it is not there. ``"refs/pr/1"`` is a pull request.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: its first line.
        commit_description: its further lines.
        overwrite: push over a bundle of another base or format, or beside files that are no bundle's.
        progress: called with the bytes that were verified and those in all. Uploads are shown by the Hub's client, on a
            terminal alone.

    Returns:
        The commit. Where nothing changed, the one that is there.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        FormatError, IntegrityError: it breaks a rule, or changed while it was pushed. Nothing was committed then.
        NotFetchedError: a task's files are neither here nor in the repository.
        OutputExistsError: the repository has another bundle, or what is none.
        HubAccessError: no token was given, or one that may not write there.
        HubConflictError: somebody else pushed in the meantime.
        HubError: the Hub refuses for another reason, or cannot be reached.
        CardError: README.md cannot be read, here or on the Hub.
        OptionError: *repo_id* is no id, or *revision* no branch.
    """
    planned = plan(
        path,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        overwrite=overwrite,
        progress=progress,
    )
    return planned.carry_out(commit_message, commit_description)


def plan(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PushPlan:
    """What `push` would do; changes nothing. Arguments and errors are those of `push`."""
    local = _LocalBundle(Path(path))
    repository = Repository(repo_id, revision, token)
    request = _Request(private, create_pr, overwrite)
    planned = _compare(local, repository, request)
    _refuse_broken(local.root, progress)
    return planned


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        repository: where to.
        head: the commit that the bundle was compared with; None where the repository has yet to be made.
        changes: file by file.
        message: of the commit, by default.
    """

    repository: Repository
    head: Head | None
    changes: Changes
    message: str
    _local: _LocalBundle
    _request: _Request
    _readme: bytes
    _wanted: tuple[FileEntry, ...]

    def carry_out(self, message: str | None = None, description: str | None = None) -> CommitInfo:
        """Do it; errors are those of `push`."""
        if self.head is None:
            return self._made().carry_out(message, description)
        message = message or self.message
        if self.changes.is_empty:
            return self.repository.unchanged(self.head.commit, message=message, description=description)
        if self.head.is_new_branch and not self._request.create_pr:
            self.repository.create_branch(self.head.commit)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*self._additions(), *self._deletions()]
        return self.repository.commit(
            operations,
            self.head.commit,
            self._is_in,
            message=message,
            description=description,
            create_pr=self._request.create_pr,
        )

    def _made(self) -> PushPlan:
        """The plan for the repository once it is made; whoever was faster may have put something there."""
        self.repository.create(private=self._request.private)
        planned = _compare(self._local, self.repository, self._request)
        if planned.head is None:
            raise HubError(self.repository.where, "was made, and is not there; push again")
        return planned

    def _additions(self) -> list[CommitOperationAdd]:
        """What is to be uploaded, once it is, unless it goes with the commit."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        contents = {README: self._readme, layout.MANIFEST: self._local.raw_manifest}
        additions = []
        for entry in self.changes.upload:
            content = contents.get(entry.path) or self._local.content(entry)
            additions.append(CommitOperationAdd(entry.path, content))
        self.repository.upload(additions, create_pr=self._request.create_pr)
        for entry, addition in zip(self.changes.upload, additions, strict=True):
            if addition.upload_info.sha256.hex() != entry.sha256:
                raise _changed(entry)
        return additions

    def _deletions(self) -> list[CommitOperationDelete]:
        from huggingface_hub import CommitOperationDelete  # noqa: PLC0415

        return [CommitOperationDelete(file.path, is_folder=False) for file in self.changes.delete]

    def _is_in(self, commit: str) -> bool:
        return compare(self._wanted, self.repository.files(commit), self._local.git_oid).is_empty


@dataclass(frozen=True)
class _Request:
    """What was asked for."""

    private: bool | None
    create_pr: bool
    overwrite: bool


class _LocalBundle:
    """The bundle here.

    Attributes:
        root: its directory.
        manifest, raw_manifest: tallstore.json.
        files: what it lists, by path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self.raw_manifest = layout.read_bounded(root, layout.MANIFEST, MAX_JSON_NBYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleNotFoundError(f"{root}: there is no bundle (no {layout.MANIFEST}); check the path") from None
        self.manifest = parse_manifest(self.raw_manifest, layout.MANIFEST)
        self.files = {file.path: file for file in self.manifest.files}

    def readme(self) -> str | None:
        """The model card here, None where there is none."""
        try:
            return _decode((self.root / README).read_bytes(), str(self.root / README))
        except FileNotFoundError:
            return None

    def git_oid(self, entry: FileEntry) -> str | None:
        """The git blob id of a file here, which is read; None where it is not here."""
        try:
            return hash_file(layout.resolve(self.root, entry.path)).git_oid
        except FileNotFoundError:
            return None

    def content(self, entry: FileEntry) -> Path | bytes:
        """What is to be uploaded of a file: where it is; for git, the bytes, which are the right ones.

        Raises:
            IntegrityError: they are not, any more.
        """
        place = layout.resolve(self.root, entry.path)
        if entry.git_oid is None or entry.size > _SMALL_NBYTES:
            return place
        raw = place.read_bytes()
        if hash_bytes(raw).sha256 != entry.sha256:
            raise _changed(entry)
        return raw


def _changed(entry: FileEntry) -> IntegrityError:
    return IntegrityError("FILE-2", entry.path, "changed while it was pushed, and was not committed; push again")


def _refuse_broken(root: Path, progress: Progress | None) -> None:
    problems = verify(root, progress=progress)
    if problems:
        first = problems[0]
        more = f"; {len(problems)} problems in all, which verify lists" if len(problems) > 1 else ""
        raise FormatError(first.rule, f"{root}/{first.where}", f"{first.message}{more}; not pushed")


def _compare(local: _LocalBundle, repository: Repository, request: _Request) -> PushPlan:
    """The bundle beside what the repository has.

    Raises:
        OutputExistsError, NotFetchedError, CardError, HubError: as `push`.
    """
    head = repository.head()
    there: Mapping[str, RemoteFile] = {}
    known: Mapping[str, bytes] = {}
    manifest = None
    if head is not None:
        _refuse_options(repository, head, request)
        there = repository.files(head.commit)
        tables = [path for path in _missing_tables(local) if is_same(local.files[path], there.get(path), local.git_oid)]
        known = repository.read([path for path in (README, layout.MANIFEST, *tables) if path in there], head.commit)
        manifest = _remote_manifest(repository, there, known, local, overwrite=request.overwrite)
    raw_readme = _card(local, repository, known)
    wanted = (
        *local.manifest.files,
        _entry(README, hash_bytes(raw_readme)),
        _entry(layout.MANIFEST, hash_bytes(local.raw_manifest)),
    )
    changes = compare(wanted, there, local.git_oid)
    _refuse_missing(local, repository, changes)
    return PushPlan(
        repository=repository,
        head=head,
        changes=changes,
        message=_message(local.manifest, manifest),
        _local=local,
        _request=request,
        _readme=raw_readme,
        _wanted=wanted,
    )


def _refuse_options(repository: Repository, head: Head, request: _Request) -> None:
    if request.private and not head.private:
        raise HubError(repository.id, "is public, where private=True was given; make it private in its settings first")
    if head.is_new_branch and request.create_pr:
        raise HubError(repository.where, "is no branch that a pull request can be opened against; give another")


def _remote_manifest(
    repository: Repository,
    there: Mapping[str, RemoteFile],
    known: Mapping[str, bytes],
    local: _LocalBundle,
    *,
    overwrite: bool,
) -> Manifest | None:
    """The manifest of the bundle that is there; None where there is none, or none that is read here.

    Raises:
        OutputExistsError: what is there would be overwritten, and *overwrite* is False.
    """
    manifest = None
    if layout.MANIFEST in there:
        try:
            manifest = parse_manifest(known[layout.MANIFEST], layout.MANIFEST)
            problem = _other_bundle(local.manifest, manifest)
        except FormatError as error:
            problem = f"has a bundle that cannot be read ({error})"
    else:
        foreign = next((path for path in sorted(there) if not _HARMLESS.fullmatch(path)), None)
        problem = None if foreign is None else f"has {foreign!r}, and no bundle"
    if problem is not None and not overwrite:
        raise OutputExistsError(f"{repository.where}: {problem}; choose another repository, or give overwrite=True")
    return manifest


def _other_bundle(ours: Manifest, theirs: Manifest) -> str | None:
    """Why one bundle is not pushed over another; None where nothing speaks against it."""
    if ours.format_version.partition(".")[0] != theirs.format_version.partition(".")[0]:
        return f"has a bundle of format {theirs.format_version}, and this one's is {ours.format_version}"
    if _base_table(ours) != _base_table(theirs):
        return f"has a bundle of another base ({theirs.base.repo_id or 'of no name'})"
    return None


def _base_table(manifest: Manifest) -> str | None:
    """The sha256 of base.json, in which the hash of every tensor is."""
    return next((file.sha256 for file in manifest.files if file.path == layout.BASE_TABLE), None)


def _refuse_missing(local: _LocalBundle, repository: Repository, changes: Changes) -> None:
    for entry in changes.upload:
        if entry.path in {README, layout.MANIFEST} or os.path.lexists(local.root / entry.path):
            continue
        slug = entry.path.split("/")[1] if entry.path.startswith("tasks/") else None
        name = next((task.name for task in local.manifest.tasks if task.slug == slug), None)
        if name is None:
            raise NotFetchedError(
                f"{local.root}: {entry.path} is not here, nor in {repository.where}; fetch the whole bundle first"
            )
        raise NotFetchedError(
            f"{local.root}: task {name!r} was not fetched, and {repository.where} does not have it as it is"
            f" ({entry.path}); fetch the task first"
        )


def _missing_tables(local: _LocalBundle) -> list[str]:
    """The tables of tasks that were not fetched: the card says of them what it said before."""
    tables = [layout.task_table(task.slug) for task in local.manifest.tasks]
    return [path for path in tables if path in local.files and not os.path.lexists(local.root / path)]


def _card(local: _LocalBundle, repository: Repository, known: Mapping[str, bytes]) -> bytes:
    """README.md.

    Args:
        local: the bundle.
        repository: where it goes.
        known: files of the repository: its README.md, and tables of tasks that are not here.
    """
    summary, tables = summarise(local.root), Tables(local.root)
    entries = {task.slug: task for task in local.manifest.tasks}
    tasks = []
    for task in summary.tasks:
        path = layout.task_table(task.slug)
        if path in known:
            table = parse(known[path], TaskTable, path, newer_minor=is_newer_minor(local.manifest))
            task = summarise_task(tables, entries[task.slug], table, fetched=False)
        tasks.append(task)
    remote = _decode(known[README], f"{repository.where}, {README}") if README in known else None
    whole = dataclasses.replace(summary, tasks=tuple(tasks))
    return render(whole, repository.id, local.readme(), remote, repository.licence_of).encode()


def _entry(path: str, written: Written) -> FileEntry:
    return FileEntry(path=path, size=written.size, sha256=written.sha256, git_oid=written.git_oid)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CardError(where, f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _message(ours: Manifest, theirs: Manifest | None) -> str:
    """A commit's first line: how many tasks there are, and what changed."""
    names = {task.name for task in ours.tasks}
    text = f"Bundle of {len(names)} task{'' if len(names) == 1 else 's'}"
    if theirs is None:
        return text
    before = {task.name for task in theirs.tasks}
    counts = {"added": len(names - before), "removed": len(before - names)}
    changed = ", ".join(f"{count} {verb}" for verb, count in counts.items() if count)
    return f"{text}: {changed}" if changed else text
