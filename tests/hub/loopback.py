"""A Hugging Face Hub on 127.0.0.1 that the real client downloads from: repository, tree and file requests, no more.

    with LoopbackHub({"org/model": {COMMIT: {"config.json": b"{}"}}}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", ...}

The client reads its settings when it is imported, so tests that use it run it in a subprocess with that environment.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

Files = dict[str, bytes]

LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
"""Files that the Hub keeps outside git: their etag is their sha256, not their git blob id."""

_API_PATH = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE_PATH = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Repo:
    """One repository.

    Attributes:
        commits: sha -> path -> bytes, in the order in which they were made.
        refs: branch or tag -> sha; `main` is the last commit unless it is given.
        token: what a request must carry; None where anyone may read.
        gated: whether even the right token's account has not accepted the terms.
    """

    commits: dict[str, Files]
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        self.refs.setdefault("main", list(self.commits)[-1])

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a full sha stands for."""
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class _RefusalError(Exception):
    """An answer with an error status; the client tells errors apart by their code."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class LoopbackHub:
    """The server; a context manager.

    Attributes:
        url: what `HF_ENDPOINT` must be.
        repos: by id; may be changed while it runs.
        requests: method and path of every request, in order.
        failures: path prefix -> HTTP status to answer with, whatever is asked.
    """

    def __init__(self, repos: Mapping[str, Repo | dict[str, Files]]) -> None:
        self.repos = {name: repo if isinstance(repo, Repo) else Repo(repo) for name, repo in repos.items()}
        self.requests: list[tuple[str, str]] = []
        self.failures: dict[str, int] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that the base class gives it
        """Keep quiet: `LoopbackHub.requests` is the log."""

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, unquote(urlsplit(self.path).path)))
        try:
            self._answer()
        except _RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send_json({"error": refusal.message}, status=refusal.status, headers=headers)

    do_HEAD = do_GET  # the name that the base class looks for

    def _answer(self) -> None:
        path = urlsplit(self.path).path  # still quoted: a revision may hold a slash, as %2F
        for prefix, status in self.hub.failures.items():
            if unquote(path).startswith(prefix):
                raise _RefusalError(status, "", "injected")
        if match := _API_PATH.fullmatch(path):
            self._answer_api(match)
        elif match := _FILE_PATH.fullmatch(path):
            self._answer_file(match)
        else:
            raise _RefusalError(404, "", f"no such route: {path}")

    def _repo(self, match: re.Match[str]) -> Repo:
        repo = self.hub.repos.get(match["repo"])
        # Like the Hub, do not tell a stranger whether a private repository exists.
        if repo is None or (repo.token is not None and self.headers.get("Authorization") != f"Bearer {repo.token}"):
            raise _RefusalError(401 if repo else 404, "RepoNotFound", "Repository not found")
        return repo

    def _answer_api(self, match: re.Match[str]) -> None:
        repo = self._repo(match)
        commit = repo.resolve(unquote(match["revision"] or "main"))
        files = repo.commits[commit]
        if match["what"] == "tree":
            self._send_json([_tree_entry(path, content) for path, content in sorted(files.items())])
        else:
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._send_json({"_id": "0", "id": match["repo"], "sha": commit, "private": False, "siblings": siblings})

    def _answer_file(self, match: re.Match[str]) -> None:
        repo, path = self._repo(match), unquote(match["path"])
        if repo.gated:
            raise _RefusalError(403, "GatedRepo", "Access to this model is restricted")
        commit = repo.resolve(unquote(match["revision"]))
        if path not in repo.commits[commit]:
            raise _RefusalError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        content = repo.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None:
            self._send(content, headers=headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            raise _RefusalError(416, "", "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(content[first : last + 1], status=206, headers=headers)

    def _send_json(self, body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        headers = {**(headers or {}), "Content-Type": "application/json"}
        self._send(json.dumps(body).encode(), status=status, headers=headers)

    def _send(self, body: bytes, *, status: int = 200, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _lfs_pointer(content: bytes) -> bytes:
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_oid(content)


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith(LFS_SUFFIXES):
        pointer = _lfs_pointer(content)
        entry["oid"] = _git_oid(pointer)
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": len(pointer),
        }
    return entry
