"""What a push would do: the bundle here beside the repository as it is."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Final

from tallstore.errors import (
    FormatError,
    HubConflictError,
    HubError,
    NotFetchedError,
    OutputExistsError,
    UnsupportedFeatureError,
)
from tallstore.files import hash_bytes
from tallstore.format import layout
from tallstore.format.manifest import FileEntry, Manifest, TaskTable
from tallstore.format.parsing import is_newer_minor, parse, parse_manifest
from tallstore.hub import card_plots
from tallstore.hub.card import render
from tallstore.hub.card_plots import CardPlots
from tallstore.hub.changes import Changes, RemoteFile, compare, is_same
from tallstore.hub.local_bundle import README, LocalBundle, decode
from tallstore.hub.repository import Head, Repository
from tallstore.inspecting.summary import Tables, TaskSummary, summarise, summarise_task

# What a repository may hold and be called empty: what is there for people.
_HARMLESS: Final = re.compile(r"\.[^/]*|LICENSE|NOTICE|.*\.(?:md|txt|pdf|png|jpe?g|gif|svg|webp)", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What was asked for; see `tallstore.push`."""

    private: bool | None
    create_pr: bool
    overwrite: bool
    plots: bool


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        local: what is pushed.
        repository: where to.
        request: what was asked for.
        head: the commit that the bundle was compared with; None where the repository has yet to be made.
        changes: file by file.
        message: the commit's first line, by default.
        contents: by path, what is pushed and is no file of the bundle here: the card and its plots; and the manifest.
        wanted: every file that the repository will have of the bundle, and those plots.
        no_plots: why no plots are drawn; None where they are, or were.
    """

    local: LocalBundle
    repository: Repository
    request: Request
    head: Head | None
    changes: Changes
    message: str
    contents: Mapping[str, bytes]
    wanted: tuple[FileEntry, ...]
    no_plots: str | None

    def is_in(self, commit: str) -> bool:
        """Whether a commit, by its sha, has all of it."""
        return compare(self.wanted, self.repository.files(commit), self.local.git_oid).is_empty


def make_plan(local: LocalBundle, repository: Repository, request: Request) -> PushPlan:
    """Compare; reads the repository's manifest and card, and sends nothing.

    Raises:
        OutputExistsError, NotFetchedError, CardError, HubConflictError, HubError: as `tallstore.push`.
    """
    head = repository.head()
    there: Mapping[str, RemoteFile] = {}
    known: Mapping[str, bytes] = {}
    manifest = None
    if head is not None:
        _refuse_options(repository, head, request)
        there = repository.files(head.commit)
        tables = [path for path in local.absent_tables() if is_same(local.files[path], there.get(path), local.git_oid)]
        paths = [path for path in (README, layout.MANIFEST, *tables) if path in there]
        known = repository.read([*paths, *card_plots.readable_paths(there)], head.commit)
        manifest = _remote_manifest(repository, there, known, local, overwrite=request.overwrite)
        if manifest is not None and not request.overwrite:
            _refuse_losses(local, repository, head, manifest)
    plots, readme = _card(local, repository, there, known, wanted=request.plots)
    contents = {**plots.contents, README: readme, layout.MANIFEST: local.raw_manifest}
    wanted = (*local.manifest.files, *(_entry(path, content) for path, content in contents.items()))
    changes = compare(wanted, there, local.git_oid)
    changes = dataclasses.replace(changes, delete=(*changes.delete, *plots.outdated))
    _refuse_missing(local, repository, changes, contents)
    return PushPlan(
        local=local,
        repository=repository,
        request=request,
        head=head,
        changes=changes,
        message=_message(local.manifest, manifest),
        contents=contents,
        wanted=wanted,
        no_plots=plots.reason,
    )


def _refuse_options(repository: Repository, head: Head, request: Request) -> None:
    if request.private and not head.private:
        raise HubError(repository.id, "is public, where private=True was given; make it private in its settings first")
    if head.is_new_branch and request.create_pr:
        raise HubError(repository.where, "is no branch that a pull request can be opened against; give another")


def _remote_manifest(
    repository: Repository,
    there: Mapping[str, RemoteFile],
    known: Mapping[str, bytes],
    local: LocalBundle,
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


def _refuse_losses(local: LocalBundle, repository: Repository, head: Head, theirs: Manifest) -> None:
    """Tasks that others added since the bundle here was pulled are not meant by leaving them out.

    Raises:
        HubConflictError: there are some.
    """
    origin = local.origin()
    if origin is None or origin.repo_id != repository.id or origin.sha == head.commit:
        return
    left_out = {task.name for task in theirs.tasks} - {task.name for task in local.manifest.tasks}
    if not left_out:
        return
    pulled = repository.read([layout.MANIFEST], origin.sha).get(layout.MANIFEST)
    before = set() if pulled is None else {task.name for task in parse_manifest(pulled, layout.MANIFEST).tasks}
    added = sorted(left_out - before)
    if added:
        raise HubConflictError(
            repository.where,
            f"task {added[0]!r} was added there after this bundle was pulled, and the push would remove it; "
            "pull again, or give overwrite=True",
        )


def _refuse_missing(local: LocalBundle, repository: Repository, changes: Changes, contents: Container[str]) -> None:
    for entry in changes.upload:
        if entry.path in contents or os.path.lexists(local.root / entry.path):
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


def _card(
    local: LocalBundle,
    repository: Repository,
    there: Mapping[str, RemoteFile],
    known: Mapping[str, bytes],
    *,
    wanted: bool,
) -> tuple[CardPlots, bytes]:
    """The plots of the card, and README.md.

    Args:
        local: the bundle.
        repository: where it goes.
        there: the repository's files.
        known: the contents of some: its README.md, its manifest, plots, and tables of tasks that are not here.
        wanted: whether there are to be plots.
    """
    summary, tables = summarise(local.root), Tables(local.root)
    entries = {task.slug: task for task in local.manifest.tasks}

    def described(task: TaskSummary) -> TaskSummary:
        path = layout.task_table(task.slug)
        if path not in known:
            return task
        entry = entries[task.slug]
        try:
            table = parse(known[path], TaskTable, path, newer_minor=is_newer_minor(local.manifest))
        except UnsupportedFeatureError as error:
            return summarise_task(tables, entry, None, fetched=False, unreadable=str(error))
        return summarise_task(tables, entry, table, fetched=False)

    remote = decode(known[README], f"{repository.where}, {README}") if README in known else None
    whole = dataclasses.replace(summary, tasks=tuple(map(described, summary.tasks)))
    is_same = known.get(layout.MANIFEST) == local.raw_manifest
    plots = CardPlots(local, repository.where, there, known, wanted=wanted, card=remote or "", is_same_bundle=is_same)
    readme = render(whole, repository.id, local.readme(), remote, repository.licence_of, plots=plots.blocks)
    return plots, readme.encode()


def _entry(path: str, content: bytes) -> FileEntry:
    written = hash_bytes(content)
    return FileEntry(path=path, size=written.size, sha256=written.sha256, git_oid=written.git_oid)


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
