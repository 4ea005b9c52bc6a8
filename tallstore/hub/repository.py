"""One repository on the Hub, as a push sees it: requests that may pass are made again, and a failure is one line."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from tallstore.errors import CardError, HubAccessError, HubConflictError, HubError, OptionError
from tallstore.hub.changes import RemoteFile
from tallstore.hub.refusals import Reason, may_pass, refusal_of
from tallstore.hub.retrying import patiently

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

Answer = TypeVar("Answer")

_WAITS: Final = (1.0, 4.0)  # seconds before a request is made again, beside what the client waits itself
_ID: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SHA: Final = re.compile(r"[0-9a-f]{40}")
_TOKEN: Final = re.compile(r"[!-~]+")
_ADVICE: Final = "give a token that may write there (`hf auth login`, or token=…)"
_PROBLEMS: Final[dict[Reason, str]] = {
    "gated": f"the Hub refuses access (HTTP {{status}}); {_ADVICE}",
    "no access": f"the Hub refuses access (HTTP {{status}}); {_ADVICE}",
    "no repository": f"is not on the Hub (HTTP {{status}}), or not for this token; {_ADVICE}",
    "no revision": "has no such branch any more; push again",
    "invalid id": "is no id that the Hub takes; give 'org/name'",
    "stale parent": "somebody else pushed in the meantime; pull what is there now, and push again",
    "unreachable": "the Hub cannot be reached ({name}); push again later: what it has by now is not sent twice",
    "warning": "the Hub's client has warnings ({name}), which are errors here; let them pass, and push again",
    "other": "the Hub's client failed ({name}); push again: what the Hub has by now is not sent twice",
}
_DENIED: Final = frozenset({401, 403})


@dataclass(frozen=True)
class Head:
    """What a push goes onto.

    Attributes:
        commit: its sha.
        private: whether the repository is.
        is_new_branch: whether the branch that was asked for has yet to be made, from `commit`.
    """

    commit: str
    private: bool
    is_new_branch: bool = False


class Repository:
    """A model's repository, and the branch of it that is pushed to.

    Attributes:
        id: ``"org/name"``.
        revision: a branch or ``"refs/pr/1"``, None for main.
    """

    def __init__(self, repo_id: str, revision: str | None, token: str | None) -> None:
        """Reach nothing yet.

        Raises:
            OptionError: *repo_id* is no ``org/name``, *revision* is a commit, or *token* is none.
        """
        import huggingface_hub  # noqa: PLC0415 - takes long to import

        if _ID.fullmatch(repo_id) is None:
            raise OptionError(f"repo_id is {repo_id!r}; give 'org/name'")
        if revision is not None and _SHA.fullmatch(revision):
            raise OptionError(f"revision is {revision!r}, a commit; give a branch")
        if isinstance(token, str) and _TOKEN.fullmatch(token) is None:  # the client would quote it
            raise OptionError(
                "token: is empty, or has a blank, a line end or the like in it; give it as the Hub shows it"
            )
        self.id, self.revision = repo_id, revision
        self._api = huggingface_hub.HfApi(token=token, library_name="tallstore")

    @property
    def where(self) -> str:
        """The repository, and its branch where one was asked for."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    # --- reading ---

    def head(self) -> Head | None:
        """The commit that a push goes onto; None where there is no such repository, or none that the token may see.

        Raises:
            OptionError: the revision is a tag.
            HubError: the Hub refuses, or cannot be reached.
        """
        from huggingface_hub.errors import RepositoryNotFoundError  # noqa: PLC0415

        try:
            is_new = self.revision is not None and not self._has_branch(self.revision)
            found = self._ask(lambda: self._api.model_info(self.id, revision=None if is_new else self.revision))
        except RepositoryNotFoundError:
            return None
        if found.sha is None:
            raise HubError(self.where, "has no commit yet; make the first one on the Hub")
        return Head(found.sha, bool(found.private), is_new)

    def _has_branch(self, revision: str) -> bool:
        refs = self._ask(lambda: self._api.list_repo_refs(self.id, include_pull_requests=True))
        if revision in {tag.name for tag in refs.tags}:
            raise OptionError(f"revision is {revision!r}, a tag of {self.id}; give a branch")
        requests = {request.ref for request in refs.pull_requests or ()}
        return revision in requests or revision in {branch.name for branch in refs.branches}

    def files(self, commit: str) -> Mapping[str, RemoteFile]:
        """The files of a commit by path."""
        from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415 - early 1.x exports it nowhere else

        listed = self._ask(lambda: list(self._api.list_repo_tree(self.id, recursive=True, revision=commit)))
        return {
            file.path: RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in listed
            if isinstance(file, RepoFile)
        }

    def read(self, paths: Collection[str], commit: str) -> Mapping[str, bytes]:
        """Files of a commit by path; those that are not there are left out."""
        if not paths:
            return {}
        with tempfile.TemporaryDirectory() as folder, _bars(shown=False):
            self._ask(
                lambda: self._api.snapshot_download(
                    self.id, revision=commit, allow_patterns=list(paths), local_dir=folder
                )
            )
            return {path: (Path(folder) / path).read_bytes() for path in paths if (Path(folder) / path).is_file()}

    def licence_of(self, repo_id: str, revision: str | None) -> Mapping[str, str]:
        """What another model's card says of its licence; nothing where that cannot be read."""
        try:
            data = self._api.model_info(repo_id, revision=revision, timeout=10).card_data
            found = {} if data is None else data.to_dict()  # type: ignore[no-untyped-call]
        except Exception:  # noqa: BLE001 - whatever it is, the card says less
            return {}
        keys = ("license", "license_name", "license_link")
        return {key: value for key in keys if isinstance(value := found.get(key), str)}

    # --- writing ---

    def create(self, *, private: bool | None) -> None:
        """Make the repository, unless it is there."""
        self._do(lambda: self._api.create_repo(self.id, private=private, exist_ok=True))

    def create_branch(self, commit: str) -> None:
        """Make the branch, from *commit*, unless it is there."""
        branch = self.revision or "main"
        self._do(lambda: self._api.create_branch(self.id, branch=branch, revision=commit, exist_ok=True))

    def upload(self, additions: Sequence[CommitOperationAdd], *, create_pr: bool) -> None:
        """Send the contents that go outside git, but for those that the Hub has."""
        with _bars(shown=sys.stderr.isatty()):
            self._do(
                lambda: self._api.preupload_lfs_files(
                    self.id,
                    additions,
                    revision=self.revision,
                    create_pr=create_pr,
                    free_memory=False,
                    gitignore_content="#",  # what the repository's own would leave out belongs to the bundle too
                )
            )

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        parent: str,
        is_done: Callable[[str], bool],
        *,
        message: str,
        description: str | None,
        create_pr: bool,
    ) -> CommitInfo:
        """Commit onto *parent*, once: where no answer comes, what became of it is looked up.

        Args:
            operations: what was uploaded, and what goes.
            parent: what the branch must still point to.
            is_done: whether a commit, by its sha, has all that *operations* make.
            message: the commit's first line.
            description: its further lines.
            create_pr: make a pull request.

        Raises:
            HubConflictError: the branch points to another commit by now.
            HubError: the Hub refuses, or cannot be reached.
        """
        requests = self._pull_requests() if create_pr else {}

        def look_up() -> CommitInfo | None:
            made = self._pull_request_since(requests, is_done) if create_pr else self._child(parent, is_done)
            return None if made is None else self._made(*made, message=message, description=description)

        for wait in (*_WAITS, None):
            try:
                return self._api.create_commit(
                    self.id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=self.revision,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
            except Exception as error:  # noqa: BLE001 - as in `_do`
                is_stale = refusal_of(error).reason == "stale parent"
                made = look_up() if is_stale or may_pass(error) else None
                if made is not None:
                    return made
                if wait is None or not may_pass(error):
                    raise self._refused(error) from None
            time.sleep(wait)
        raise AssertionError

    def unchanged(self, commit: str, *, message: str, description: str | None) -> CommitInfo:
        """What a push without a change is answered: the commit that is there."""
        return self._made(commit, None, message=message, description=description)

    def _made(self, commit: str, request: int | None, *, message: str, description: str | None) -> CommitInfo:
        from huggingface_hub import CommitInfo  # noqa: PLC0415

        url = f"{self._api.endpoint}/{self.id}"
        return CommitInfo(
            commit_url=f"{url}/commit/{commit}",
            commit_message=message,
            commit_description=description or "",
            oid=commit,
            pr_url=None if request is None else f"{url}/discussions/{request}",
        )

    def _child(self, parent: str, is_done: Callable[[str], bool]) -> tuple[str, None] | None:
        """The commit that came after *parent*, if it is ours."""
        commits = [
            made.commit_id for made in self._ask(lambda: self._api.list_repo_commits(self.id, revision=self.revision))
        ]
        place = commits.index(parent) if parent in commits else 0
        return (commits[place - 1], None) if place and is_done(commits[place - 1]) else None

    def _pull_requests(self) -> dict[str, str]:
        """The commits of all pull requests, by their refs."""
        refs = self._ask(lambda: self._api.list_repo_refs(self.id, include_pull_requests=True))
        return {request.ref: request.target_commit for request in refs.pull_requests or ()}

    def _pull_request_since(self, known: Mapping[str, str], is_done: Callable[[str], bool]) -> tuple[str, int] | None:
        """A pull request that was not *known* and is ours."""
        for ref, commit in self._pull_requests().items():
            if ref not in known and is_done(commit):
                return commit, int(ref.rpartition("/")[2])
        return None

    # --- requests ---

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        """As `_do`, but that a repository is not there is left to the caller."""
        from huggingface_hub.errors import RepositoryNotFoundError  # noqa: PLC0415

        return self._do(request, RepositoryNotFoundError)

    def _do(self, request: Callable[[], Answer], *passed_on: type[Exception]) -> Answer:
        """The answer to a request that may be made several times."""
        try:
            return patiently(request, _WAITS, may_pass)
        except passed_on:
            raise
        # The messages have several lines, and those of the HTTP client may quote the headers, where the token is.
        except Exception as error:  # noqa: BLE001
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> Exception:
        """The error of one line for one of the client's."""
        if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
            reason = " ".join(str(error).partition("\n")[2].split()).removeprefix("- ")
            return CardError(f"{self.where}, README.md", f"the Hub refuses its metadata ({reason}); correct them")
        refusal = refusal_of(error)
        problem = _PROBLEMS.get(refusal.reason, "the Hub answers with HTTP {status}; push again later")
        is_denied = refusal.reason in {"gated", "no access"} or refusal.status in _DENIED
        kind = HubAccessError if is_denied else HubConflictError if refusal.reason == "stale parent" else HubError
        return kind(self.where, problem.format(status=refusal.status, name=refusal.name))


@contextlib.contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Let the client draw its bars, unless it is told not to, or draw none."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined] # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
