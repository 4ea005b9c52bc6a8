"""`push`: a bundle to the Hub, as one commit of what changed, made onto the commit that it was compared with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tallstore.errors import HubError
from tallstore.hub.local_bundle import LocalBundle, changed
from tallstore.hub.planning import PushPlan, Request, make_plan
from tallstore.hub.repository import Repository
from tallstore.meter import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete


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
    plots: bool = True,
    progress: Progress | None = None,
) -> CommitInfo:
    """Push a bundle to the Hub: one commit, which has all of it or is not made.

    The bundle is verified first. What the repository has is not sent again, nor what an interrupted push sent; files of
    a bundle that this one does not list are deleted in the same commit, all other files stay. README.md, the model
    card, is generated between two comments; what is written around them, here or on the Hub, is kept (see
    `tallstore.hub.card`).

    With matplotlib (the extra ``report``), the card shows up to three plots: sizes, fidelity, what the masks have in
    common. They are pictures of some 50 kB each under ``plots/`` in the repository, in the same commit. To draw them,
    every mask is read once, and time grows with the square of the number of tasks; they are drawn again only where the
    bundle changed. Without matplotlib, or where tasks' files are not here, the plots of another bundle are taken away.

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
        overwrite: push over a bundle of another base or format or with tasks of others, or beside files that are no
            bundle's.
        plots: show plots on the card. A file of such a name that is somebody else's is left alone, with a warning.
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
        HubConflictError: somebody else pushed in the meantime; or added a task after this bundle was pulled, which
            would be removed.
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
        plots=plots,
        progress=progress,
    )
    return carry_out(planned, commit_message, commit_description)


def plan(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    plots: bool = True,
    progress: Progress | None = None,
) -> PushPlan:
    """What `push` would do; changes nothing. Arguments and errors are those of `push`."""
    local = LocalBundle(Path(path), progress)
    planned = make_plan(local, Repository(repo_id, revision, token), Request(private, create_pr, overwrite, plots))
    local.refuse_broken()
    return planned


def carry_out(planned: PushPlan, message: str | None = None, description: str | None = None) -> CommitInfo:
    """Do what was planned; arguments and errors are those of `push`."""
    if planned.head is None:
        planned = _made(planned)
    message, head, repository = message or planned.message, planned.head, planned.repository
    if head is None:
        raise HubError(repository.where, "was made, and is not there; push again")
    if head.is_new_branch:
        repository.create_branch(head.commit)
    if planned.changes.is_empty:
        return repository.unchanged(head.commit, message=message, description=description)
    made = repository.commit(
        [*_upload(planned), *_deletions(planned)],
        head.commit,
        planned.is_in,
        message=message,
        description=description,
        create_pr=planned.request.create_pr,
    )
    if not planned.request.create_pr:
        planned.local.remember(repository.id, made.oid)
    return made


def _made(planned: PushPlan) -> PushPlan:
    """The plan for the repository once it is made; whoever was faster may have put something there."""
    planned.repository.create(private=planned.request.private)
    return make_plan(planned.local, planned.repository, planned.request)


def _upload(planned: PushPlan) -> list[CommitOperationAdd]:
    """What is to be added, once it is uploaded, unless it goes with the commit.

    Raises:
        IntegrityError: a file changed since it was verified.
    """
    from huggingface_hub import CommitOperationAdd  # noqa: PLC0415 - takes long to import

    local, files = planned.local, planned.changes.upload
    contents = planned.contents
    additions = [CommitOperationAdd(file.path, contents.get(file.path) or local.content(file)) for file in files]
    planned.repository.upload(additions, create_pr=planned.request.create_pr)
    for file, addition in zip(files, additions, strict=True):
        if addition.upload_info.sha256.hex() != file.sha256:
            raise changed(file)
    return additions


def _deletions(planned: PushPlan) -> list[CommitOperationDelete]:
    from huggingface_hub import CommitOperationDelete  # noqa: PLC0415

    return [CommitOperationDelete(file.path, is_folder=False) for file in planned.changes.delete]
