"""A repository of the Hub at one commit: the revision is resolved once, and every later call names the commit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from tallstore.caller_warnings import warn
from tallstore.errors import (
    BundleNotFoundError,
    FormatError,
    HubAccessError,
    HubError,
    IntegrityError,
    OptionError,
    OutputError,
    TallstoreError,
)
from tallstore.files import hash_file
from tallstore.format import layout
from tallstore.format.parsing import MAX_JSON_NBYTES
from tallstore.hub.changes import RemoteFile
from tallstore.hub.ids import is_sha, shown
from tallstore.hub.refusals import Reason, refusal_of
from tallstore.hub.retrying import is_passing, patiently

Result = TypeVar("Result")

_MOST_PATHS: Final = 1000  # that the Hub describes at once
_ATTEMPTS: Final = 3
_RANGE_TIMEOUT: Final = 10.0  # seconds without a byte
_PARTIAL: Final = 206


@dataclass(frozen=True)
class Access:
    """How the Hub is reached; the names and meanings are those of huggingface_hub."""

    token: bool | str | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        if self.force_download and self.local_files_only:
            raise OptionError("force_download and local_files_only exclude each other; give one of them")

    @property
    def is_offline(self) -> bool:
        """Whether nothing may be asked of the Hub."""
        from huggingface_hub import constants  # noqa: PLC0415 - takes long to import

        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)


@dataclass(frozen=True)
class PinnedRepository:
    """A repository of models at one commit.

    Attributes:
        repo_id: ``"org/name"``.
        sha: of the commit.
        access: how it is reached.
        where: what messages call it.
    """

    repo_id: str
    sha: str
    access: Access
    where: str

    def download(self, path: str, bar: type[Any] | None = None, local_dir: Path | None = None) -> Path:
        """Have one file in the Hub's cache, or under *local_dir*; asks for nothing where it is there.

        Raises:
            HubError, OutputError: it cannot be had.
        """
        import huggingface_hub  # noqa: PLC0415 - takes long to import

        return Path(
            asking(
                f"{self.where}, {path}",
                lambda: huggingface_hub.hf_hub_download(
                    self.repo_id,
                    path,
                    revision=self.sha,
                    token=self.access.token,
                    cache_dir=self.access.cache_dir,
                    force_download=self.access.force_download,
                    local_dir=local_dir,
                    tqdm_class=bar,
                ),
            )
        )

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, which has as many; nothing is kept.

        Raises:
            IntegrityError: other bytes came than were asked for.
            HubError: the Hub refuses, or cannot be reached.
        """
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 - takes long to import
        from huggingface_hub.utils import (  # type: ignore[attr-defined] # noqa: PLC0415
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self.repo_id, path, revision=self.sha)
        headers = {
            **build_hf_headers(token=self.access.token),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        where = f"{self.where}, {path}"

        def read() -> bytes:
            # Tried again here: the client would do so between two answers, and not in the middle of one.
            with http_stream_backoff(
                "GET", url, max_retries=0, headers=headers, timeout=_RANGE_TIMEOUT, follow_redirects=True
            ) as response:
                hf_raise_for_status(response)
                if response.status_code != _PARTIAL:  # all of it is coming
                    raise HubError(where, "is not sent in parts by this Hub; pull the task: tallstore.pull(…)")
                received = bytearray()
                for piece in response.iter_raw():
                    received += piece
                    if len(received) > stop - start:
                        break
            return bytes(received)

        received = asking(where, read)
        if len(received) != stop - start:
            problem = f"came with {len(received)} bytes, where {stop - start} were asked for; try again"
            raise IntegrityError("FILE-1", where, problem)
        return received

    def describe(self, paths: Iterable[str]) -> Mapping[str, RemoteFile]:
        """What the Hub says of these files, by path; those that it does not have are left out.

        Raises:
            HubError: it cannot be asked.
        """
        import huggingface_hub  # noqa: PLC0415

        api = huggingface_hub.HfApi(token=self.access.token)
        found: dict[str, RemoteFile] = {}
        for some in _batched(list(paths), _MOST_PATHS):
            told = asking(self.where, partial(api.get_paths_info, self.repo_id, some, revision=self.sha))
            found |= {each.path: _remote_file(each) for each in told if hasattr(each, "blob_id")}
        return found

    def list_files(self) -> Mapping[str, RemoteFile]:
        """What the Hub says of all files of the commit, by path.

        Raises:
            HubError: it cannot be asked.
        """
        import huggingface_hub  # noqa: PLC0415

        api = huggingface_hub.HfApi(token=self.access.token)
        told = asking(self.where, lambda: list(api.list_repo_tree(self.repo_id, revision=self.sha, recursive=True)))
        return {each.path: _remote_file(each) for each in told if hasattr(each, "blob_id")}


def pin(repo_id: str, revision: str | None, access: Access) -> tuple[PinnedRepository, Path]:
    """Resolve a revision, by default ``main``, and have the commit's manifest in the cache.

    Costs one request where the cache has the manifest, three where not; none for the full sha of a commit whose
    manifest is in the cache. Where the Hub cannot be reached, the commit that the revision last stood for is taken.

    Returns:
        the repository at that commit, and the directory of its snapshot, which has the manifest.

    Raises:
        BundleNotFoundError: there is no such repository or revision, it has no manifest, or the cache has none.
        IntegrityError: the manifest is not the one that the Hub has.
        FormatError: JSON-4, it is larger than a manifest can be.
        HubError: the Hub refuses, or cannot be reached and the cache has nothing.
    """
    where = shown(repo_id, revision)
    cached = _cached(repo_id, revision, access)
    if access.is_offline:
        if cached is None:
            raise BundleNotFoundError(
                f"{where}: {layout.MANIFEST} is not in the Hub's cache here, and the Hub may not be asked (offline); "
                "open it once with the Hub in reach"
            )
        return _pinned(repo_id, access, cached)
    if cached is not None and revision is not None and is_sha(revision) and not access.force_download:
        return _pinned(repo_id, access, cached)
    for _ in range(_ATTEMPTS):
        found = _head(where, repo_id, revision, access, cached)
        if found is None:
            if cached is None:
                raise AssertionError("an error of the Hub was passed over without anything in the cache")
            return _pinned(repo_id, access, cached)
        if found.size > MAX_JSON_NBYTES:
            problem = f"has {found.size} bytes, over the limit of {MAX_JSON_NBYTES}"
            raise FormatError("JSON-4", f"{where}, {layout.MANIFEST}", problem)
        if cached is None or cached.parent.name != found.sha or access.force_download:
            cached = _download_manifest(where, repo_id, revision, access)
        if cached.parent.name == found.sha:  # else somebody pushed in between
            _check_manifest(where, cached, found)
            return _pinned(repo_id, access, cached)
    raise HubError(where, "changes faster than it can be read; try again, or name a commit")


def _pinned(repo_id: str, access: Access, manifest: Path) -> tuple[PinnedRepository, Path]:
    sha = manifest.parent.name  # the cache keeps a snapshot in a directory of its commit's name
    return PinnedRepository(repo_id, sha, access, shown(repo_id, sha)), manifest.parent


def _cached(repo_id: str, revision: str | None, access: Access) -> Path | None:
    """The manifest that the cache has for a revision, as it stood when the Hub was last asked."""
    import huggingface_hub  # noqa: PLC0415

    try:
        found = huggingface_hub.try_to_load_from_cache(
            repo_id, layout.MANIFEST, cache_dir=access.cache_dir, revision=revision
        )
    except ValueError as error:  # an id that no repository can have
        raise reading_error(shown(repo_id, revision), error) from None
    return Path(found) if isinstance(found, str) else None


@dataclass(frozen=True)
class _Head:
    """What the Hub says of a manifest, without sending it.

    Attributes:
        sha: of the commit that it is in.
        size: in bytes.
        etag: the sha256, or the git blob id, by which the Hub keeps it.
    """

    sha: str
    size: int
    etag: str


def _head(where: str, repo_id: str, revision: str | None, access: Access, cached: Path | None) -> _Head | None:
    """The commit that a revision stands for, and what the Hub says of its manifest; None to take the cached one."""
    import huggingface_hub  # noqa: PLC0415

    def ask() -> Any:  # noqa: ANN401 - the client's
        url = huggingface_hub.hf_hub_url(repo_id, layout.MANIFEST, revision=revision)
        return huggingface_hub.get_hf_file_metadata(url, token=access.token)

    try:
        told = ask() if cached is not None and not access.force_download else patiently(ask)
    except Exception as error:  # noqa: BLE001 - as in `asking`
        if isinstance(error, huggingface_hub.errors.RemoteEntryNotFoundError):
            problem = f"the repository has no {layout.MANIFEST}, it is no bundle; check the id and the revision"
            raise BundleNotFoundError(f"{where}: {problem}") from None
        is_lost = refusal_of(error).reason == "unreachable"
        if cached is None and is_lost:
            problem = f"no such path here, and the Hub cannot be reached ({type(error).__name__}); check both"
            raise HubError(where, problem) from None
        if cached is None or access.force_download or not (is_lost or is_passing(error)):
            raise reading_error(where, error) from None
        warn(f"{where}: the Hub cannot be reached; takes the commit {cached.parent.name[:12]} from the cache")
        return None
    if told.commit_hash is None or told.etag is None or told.size is None:
        raise HubError(where, "what answers there is no Hub: it names no commit; check HF_ENDPOINT, or the proxy")
    return _Head(told.commit_hash, told.size, told.etag)


def _download_manifest(where: str, repo_id: str, revision: str | None, access: Access) -> Path:
    """Through the revision, not its commit: so the cache learns what it stands for, and opens it offline."""
    import huggingface_hub  # noqa: PLC0415

    return Path(
        asking(
            where,
            lambda: huggingface_hub.hf_hub_download(
                repo_id,
                layout.MANIFEST,
                revision=revision,
                token=access.token,
                cache_dir=access.cache_dir,
                force_download=access.force_download,
            ),
        )
    )


def _check_manifest(where: str, manifest: Path, head: _Head) -> None:
    """A manifest that was changed on its way, or in the cache, may be sealed as well as the true one."""
    with layout.readable(layout.MANIFEST):
        written = hash_file(manifest)
    if written.size != head.size or head.etag not in {written.sha256, written.git_oid}:
        discard(manifest)
        problem = "is not the file that the Hub has; it was removed from the cache, try again"
        raise IntegrityError("FILE-2", f"{where}, {layout.MANIFEST}", problem)


def discard(place: Path) -> None:
    """Remove a file of a snapshot, and the blob that it is."""
    for path in dict.fromkeys((place.resolve(), _one_step(place), place)):
        path.unlink(missing_ok=True)


def _one_step(place: Path) -> Path:
    return place.parent / place.readlink() if place.is_symlink() else place


@contextlib.contextmanager
def in_cache(where: str) -> Iterator[None]:
    """What the system refuses inside the block becomes an error of the Hub's cache.

    Raises:
        OutputError: in the place of an OSError, unless whom a callback talked to went away.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        problem = f"the Hub's cache cannot be read or written ({error.strerror or type(error).__name__})"
        raise OutputError(f"{where}: {problem}; see to it, or choose another: cache_dir=…, HF_HUB_CACHE") from None


def asking(where: str, action: Callable[[], Result]) -> Result:
    """Ask the Hub, more than once where that may help.

    Raises:
        TallstoreError: what the client raised, in one line.
    """
    try:
        return patiently(action)
    except TallstoreError:
        raise
    # Its messages have several lines, and those of the HTTP client below it may quote the request's headers, where the
    # token is: none is passed on.
    except Exception as error:  # noqa: BLE001
        raise reading_error(where, error) from None


_PROBLEMS: Final[dict[Reason, str]] = {
    "gated": "is gated; accept its terms on the Hub, and give the token of that account",
    "no revision": "the Hub has that repository, but no such revision; give another",
    "no repository": "no such path here, and no such repository on the Hub; a private one needs a token"
    " (`hf auth login`)",
    "invalid id": "no such path here, and no valid id of a repository on the Hub",
    "no access": "the Hub refuses access (HTTP {status}); give a token that may read it",
    "busy": "the Hub answers with HTTP {status}; try again later",
    "unreachable": "the connection to the Hub failed ({name}); try again",
}
_KINDS: Final[dict[Reason, type[HubError]]] = {"gated": HubAccessError, "no access": HubAccessError}
_MISSING: Final[frozenset[Reason]] = frozenset({"no revision", "no repository", "invalid id"})


def reading_error(where: str, error: Exception) -> TallstoreError:
    """What kept something from being read from the Hub."""
    from huggingface_hub import errors  # noqa: PLC0415

    refusal = refusal_of(error)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return BundleNotFoundError(f"{where}: the repository has no such file; it was pushed by halves, or changed")
    if isinstance(error, OSError) and error.errno is not None and refusal.status == 0:
        return OutputError(f"{where}: cannot be written to the cache ({error.strerror}); make room there")
    fallback = f"cannot be downloaded from the Hub ({refusal.name}); try again"
    problem = _PROBLEMS.get(refusal.reason, fallback).format(status=refusal.status, name=refusal.name)
    if refusal.reason in _MISSING:
        return BundleNotFoundError(f"{where}: {problem}")
    return _KINDS.get(refusal.reason, HubError)(where, problem)


def _remote_file(told: Any) -> RemoteFile:  # noqa: ANN401 - the client's RepoFile
    return RemoteFile(told.path, told.size, told.lfs.sha256 if told.lfs else None, told.blob_id)


def _batched(items: list[str], count: int) -> Iterator[list[str]]:
    for start in range(0, len(items), count):
        yield items[start : start + count]
