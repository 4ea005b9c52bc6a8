"""One repository: commits, each a whole set of files, and the branches, tags and pull requests that point to them."""

from __future__ import annotations

import datetime as dt
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from tests.hub.loopback.accounts import Account
from tests.hub.loopback.large_files import ATTRIBUTES, is_large, large_patterns
from tests.hub.loopback.storage import Storage, blob_id, lfs_pointer
from tests.hub.loopback.wire import RefusalError

Contents = Mapping[str, bytes]
SAMPLE_NBYTES = 512
"""As much of a file as the client shows before it asks how to send it."""


@dataclass(frozen=True)
class Entry:
    """A file of a commit.

    Attributes:
        blob_id: git's name for the file, or for the pointer to a large one.
        sha256: of a large file only.
        xet_hash: of one that arrived by Xet only.
    """

    blob_id: str
    nbytes: int
    sha256: str | None = None
    xet_hash: str | None = None

    @classmethod
    def large(cls, sha256: str, nbytes: int, xet_hash: str | None) -> Entry:
        return cls(blob_id(lfs_pointer(sha256, nbytes)), nbytes, sha256, xet_hash)

    @property
    def etag(self) -> str:
        """The content's name: in the storage, in the client's cache, and in what tells the client of changes."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Mapping[str, Entry]
    parent: str | None
    title: str
    description: str
    author: str
    date: str


class Repository:
    """What a client may see and change; it is changed under its lock.

    Attributes:
        commits: by sha, in the order in which they were made.
        refs: full names ("refs/heads/main", "refs/tags/v1", "refs/pr/1") -> sha.
        gated: whether files are only for its owners and the users in `granted`.
        uploaded: the large files that were sent for this repository, by sha256.
    """

    def __init__(self, repo_id: str, storage: Storage, *, private: bool = False, gated: bool = False) -> None:
        self.id, self.private, self.gated = repo_id, private, gated
        self.namespace = repo_id.partition("/")[0]
        self.granted: set[str] = set()
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.uploaded: set[str] = set()
        self.lock = threading.RLock()
        self._storage = storage

    def is_visible_to(self, account: Account | None) -> bool:
        return not self.private or (account is not None and account.may_read_private(self.namespace))

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full name of a ref or a full sha stands for."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def ref_to_move(self, revision: str) -> str:
        """The full name of the branch or pull request that a commit to *revision* moves."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs:
                return name
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """Its commit and that one's ancestors, the newest first."""
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def advance(
        self,
        ref: str,
        change: Callable[[dict[str, Entry]], None],
        *,
        title: str,
        description: str = "",
        author: str,
        parent: str | None = None,
        sha: str | None = None,
    ) -> Commit:
        """Commit what *change* makes of the files that *ref* points to, and move it.

        Args:
            parent: what *ref* must point to; any commit where *ref* is new.
            sha: the commit's name, by default one that no other has.
        """
        with self.lock:
            head = self.refs.get(ref, parent)
            if parent not in {None, head}:
                raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(self.commits[head].files) if head else {}
            change(files)
            date = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
            if sha is None:
                what = f"{self.id} {len(self.commits)} {head} {title} {sorted(files.items())}"
                sha = hashlib.sha1(what.encode(), usedforsecurity=False).hexdigest()
            self.commits[sha] = Commit(sha, files, head, title, description, author, date)
            self.refs[ref] = sha
            return self.commits[sha]

    def begin(self) -> None:
        """Make the first commit of a repository that is new."""
        self.push({".gitattributes": ATTRIBUTES}, title="initial commit")

    def push(
        self,
        contents: Contents,
        *,
        delete: Iterable[str] = (),
        revision: str = "main",
        title: str = "Upload",
        sha: str | None = None,
    ) -> str:
        """Commit as another client would; the commit's sha."""
        with self.lock:
            ref = self.ref_to_move(revision) if self.refs else f"refs/heads/{revision}"
            patterns = self.large_patterns(self.refs.get(ref))

            def change(files: dict[str, Entry]) -> None:
                for path in delete:
                    del files[path]
                files.update({path: self.store(path, content, patterns) for path, content in contents.items()})

            return self.advance(ref, change, title=title, author=self.namespace, sha=sha).sha

    def large_patterns(self, commit: str | None) -> list[str]:
        """The globs that keep files outside git, of a commit's .gitattributes or, without it, of a new repository's."""
        entry = self.commits[commit].files.get(".gitattributes") if commit else None
        return large_patterns(self._storage.read(entry.etag) if entry else ATTRIBUTES)

    def store(self, path: str, content: bytes, patterns: Iterable[str]) -> Entry:
        """Keep a content that no client sent."""
        if not is_large(path, len(content), content[:SAMPLE_NBYTES], patterns):
            return self.store_blob(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self._storage.add_large(sha256, content)
        self.uploaded.add(sha256)
        return Entry.large(sha256, len(content), self._storage.xet_hash(sha256))

    def store_blob(self, content: bytes) -> Entry:
        entry = Entry(blob_id(content), len(content))
        self._storage.put(entry.etag, content)
        return entry

    def read(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        return {path: self._storage.read(entry.etag) for path, entry in self.resolve(revision).files.items()}
