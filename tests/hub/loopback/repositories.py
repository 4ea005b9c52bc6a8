"""Repositories and what is in them: create, delete, list, point refs at commits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import yaml

from tests.hub.loopback.accounts import signed_in
from tests.hub.loopback.repository import Commit, Entry, Repository
from tests.hub.loopback.routes import Routes
from tests.hub.loopback.storage import lfs_pointer
from tests.hub.loopback.wire import Answer, RefusalError, Request

if TYPE_CHECKING:
    from tests.hub.loopback.hub import LoopbackHub

MAX_PATHS = 1000
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", re.DOTALL)

routes = Routes()


@routes("GET", "/api/whoami-v2")
def whoami(hub: LoopbackHub, request: Request) -> Answer:
    account = signed_in(hub.account(request))
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.organisations.items()]
    token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": account.role}}
    return Answer.of_json({"type": "user", "name": account.user, "fullname": account.user, "orgs": orgs, "auth": token})


@routes("POST", "/api/repos/create")
def create(hub: LoopbackHub, request: Request) -> Answer:
    wanted = request.json()
    account = signed_in(hub.account(request))
    namespace = wanted["organization"] or account.user
    if not account.may_write(namespace):
        raise RefusalError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    repo_id = f"{namespace}/{wanted['name']}"
    made = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    with hub.lock:
        if repo_id in hub.repositories:
            message = "You already created this model repo"
            return Answer.of_json({"error": message, **made}, 409, **{"X-Error-Message": message})
        hub.add(repo_id, private=wanted.get("visibility") == "private")
    return Answer.of_json(made)


@routes("DELETE", "/api/repos/delete")
def delete(hub: LoopbackHub, request: Request) -> Answer:
    wanted = request.json()
    namespace = wanted["organization"] or signed_in(hub.account(request)).user
    with hub.lock:
        repository = hub.writable(request, f"{namespace}/{wanted['name']}")
        del hub.repositories[repository.id]
    return Answer()


@routes("GET", "/api/models/{repo_id}")
def model(hub: LoopbackHub, request: Request, repo_id: str) -> Answer:
    return revision_of_model(hub, request, repo_id, "main")


@routes("GET", "/api/models/{repo_id}/revision/{revision}")
def revision_of_model(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    repository = hub.readable(request, repo_id)
    commit = repository.resolve(revision)
    readme = commit.files.get("README.md")
    card = front_matter(hub.storage.read(readme.etag).decode(errors="replace")) if readme else {}
    with_sizes = request.flag("blobs")
    return Answer.of_json(
        {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "author": repository.namespace,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": next(iter(repository.commits.values())).date,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card,
            "library_name": card.get("library_name"),
            "siblings": [_sibling(path, entry, with_sizes) for path, entry in sorted(commit.files.items())],
        }
    )


def front_matter(readme: str) -> dict[str, Any]:
    """The metadata of a model card; empty where it has none."""
    match = _FRONT_MATTER.match(readme)
    return yaml.safe_load(match[1]) if match else {}


def _sibling(path: str, entry: Entry, with_sizes: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if with_sizes:
        sibling |= {"size": entry.nbytes, "blobId": entry.blob_id}
        if entry.sha256:
            sibling["lfs"] = {"sha256": entry.sha256, **_lfs_sizes(entry.sha256, entry.nbytes)}
    return sibling


def _lfs_sizes(sha256: str, nbytes: int) -> dict[str, int]:
    return {"size": nbytes, "pointerSize": len(lfs_pointer(sha256, nbytes))}


@routes("GET", "/api/models/{repo_id}/tree/{revision}")
def tree(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    return subtree(hub, request, repo_id, revision, "")


@routes("GET", "/api/models/{repo_id}/tree/{revision}/{path}")
def subtree(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Answer:
    commit = hub.readable(request, repo_id).resolve(revision)
    prefix = f"{path.strip('/')}/" if path.strip("/") else ""
    listed = list(_list_tree(commit, prefix, recursive=request.flag("recursive")))
    if prefix and not listed:
        raise RefusalError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    return _page(hub, request, listed)


def _list_tree(commit: Commit, prefix: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    """Files below a prefix, each directory before its first file."""
    directories: set[str] = set()
    for path, entry in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        names = path.removeprefix(prefix).split("/")
        for depth in range(1, len(names) if recursive else min(len(names), 2)):
            directory = prefix + "/".join(names[:depth])
            if directory not in directories:
                directories.add(directory)
                yield _directory(directory)
        if recursive or len(names) == 1:
            yield _file(path, entry)


def _directory(path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


def _file(path: str, entry: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "file", "path": path, "size": entry.nbytes, "oid": entry.blob_id}
    if entry.sha256:
        described["lfs"] = {"oid": entry.sha256, **_lfs_sizes(entry.sha256, entry.nbytes)}
    if entry.xet_hash:
        described["xetHash"] = entry.xet_hash
    return described


@routes("POST", "/api/models/{repo_id}/paths-info/{revision}")
def paths_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    commit = hub.readable(request, repo_id).resolve(revision)
    paths = [path.strip("/") for path in parse_qs(request.body.decode()).get("paths", [])]
    if len(paths) > MAX_PATHS:
        raise RefusalError(413, "too many parameters")
    return Answer.of_json(list(_describe(commit, paths)))


def _describe(commit: Commit, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Those of the paths that exist."""
    for path in paths:
        if path in commit.files:
            yield _file(path, commit.files[path])
        elif any(other.startswith(f"{path}/") for other in commit.files):
            yield _directory(path)


@routes("GET", "/api/models/{repo_id}/commits/{revision}")
def commits(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    history = hub.readable(request, repo_id).history(revision)
    listed = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in history
    ]
    return _page(hub, request, listed)


def _page(hub: LoopbackHub, request: Request, entries: Sequence[object]) -> Answer:
    """A part of a list; a Link header says where the next part is."""
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + hub.page < len(entries):
        query = urlencode({**request.query, "cursor": start + hub.page}, doseq=True)
        headers["Link"] = f'<{hub.url}{request.path}?{query}>; rel="next"'
    return Answer.of_json(entries[start : start + hub.page], **headers)


@routes("GET", "/api/models/{repo_id}/refs")
def refs(hub: LoopbackHub, request: Request, repo_id: str) -> Answer:
    repository = hub.readable(request, repo_id)
    answer = {"branches": _refs(repository, "refs/heads/"), "tags": _refs(repository, "refs/tags/"), "converts": []}
    if request.flag("include_prs"):
        answer["pullRequests"] = [{**ref, "name": ref["ref"]} for ref in _refs(repository, "refs/pr/")]
    return Answer.of_json(answer)


def _refs(repository: Repository, prefix: str) -> list[dict[str, str]]:
    return [
        {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
        for ref, sha in list(repository.refs.items())
        if ref.startswith(prefix)
    ]


@routes("POST", "/api/models/{repo_id}/branch/{branch}")
def create_branch(hub: LoopbackHub, request: Request, repo_id: str, branch: str) -> Answer:
    repository = hub.writable(request, repo_id)
    start = request.json().get("startingPoint") or "main"
    return _create_ref(repository, f"refs/heads/{branch}", start)


@routes("POST", "/api/models/{repo_id}/tag/{revision}")
def create_tag(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    return _create_ref(hub.writable(request, repo_id), f"refs/tags/{request.json()['tag']}", revision)


def _create_ref(repository: Repository, ref: str, revision: str) -> Answer:
    with repository.lock:
        if ref in repository.refs:
            raise RefusalError(409, f"Reference already exists: {ref}")
        repository.refs[ref] = repository.resolve(revision).sha
    return Answer()


@routes("DELETE", "/api/models/{repo_id}/branch/{branch}")
def delete_branch(hub: LoopbackHub, request: Request, repo_id: str, branch: str) -> Answer:
    repository = hub.writable(request, repo_id)
    if branch == "main":
        raise RefusalError(403, "Cannot delete refs/heads/main")
    return _delete_ref(repository, f"refs/heads/{branch}")


@routes("DELETE", "/api/models/{repo_id}/tag/{tag}")
def delete_tag(hub: LoopbackHub, request: Request, repo_id: str, tag: str) -> Answer:
    return _delete_ref(hub.writable(request, repo_id), f"refs/tags/{tag}")


def _delete_ref(repository: Repository, ref: str) -> Answer:
    if repository.refs.pop(ref, None) is None:
        raise RefusalError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    return Answer()
