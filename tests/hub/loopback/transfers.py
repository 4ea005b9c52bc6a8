"""The bytes of files: downloads, ranges, redirects; uploads, whole or in parts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.hub.loopback.repository import Repository
from tests.hub.loopback.routes import Routes
from tests.hub.loopback.wire import Answer, RefusalError, Request

if TYPE_CHECKING:
    from tests.hub.loopback.hub import LoopbackHub

routes = Routes()


@routes("GET HEAD", "/{repo_id}/resolve/{revision}/{path}")
def resolve(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Answer:
    repository = hub.readable(request, repo_id)
    refuse_if_gated(hub, request, repository)
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit.sha}
    entry = commit.files.get(path)
    if entry is None:  # of a commit that is named, so that the client may remember it
        raise RefusalError(404, "Entry not found", "EntryNotFound", **headers)
    headers["ETag"] = f'"{entry.etag}"'
    if entry.sha256:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.nbytes)}
    if entry.xet_hash:
        authority = f"{hub.url}/api/models/{repo_id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": entry.xet_hash, "Link": f'<{authority}>; rel="xet-auth"'}
    if entry.sha256 and hub.has_cdn:
        headers["Location"] = f"{hub.storage_url}/lfs/{repo_id}/{entry.sha256}?filename={quote(path)}"
        return Answer(status=302, headers=headers)
    if request.method == "HEAD":  # a content that arrived by Xet is not put together for its length
        return Answer(headers={**headers, "Accept-Ranges": "bytes", "Content-Length": str(entry.nbytes)})
    return Answer.of_content(hub.storage.read(entry.etag), request, headers)


def refuse_if_gated(hub: LoopbackHub, request: Request, repository: Repository) -> None:
    """Files are for who was let in; the rest of a gated repository is for everyone."""
    if not repository.gated:
        return
    account = hub.account(request)
    if account is None:
        message = f"Access to model {repository.id} is restricted. You must have access to it and be authenticated."
        raise RefusalError(401, message, "GatedRepo")
    if account.user not in repository.granted and not account.may_read_private(repository.namespace):
        message = f"Access to model {repository.id} is restricted and you are not in the authorized list."
        raise RefusalError(403, message, "GatedRepo")


@routes("POST", "/{repo_id}.git/info/lfs/objects/batch")
def lfs_batch(hub: LoopbackHub, request: Request, repo_id: str) -> Answer:
    repository = hub.writable(request, repo_id)
    wanted = request.json()
    multipart = hub.multipart is not None and "multipart" in wanted["transfers"]
    objects = [_upload_action(hub, repository, wish, multipart=multipart) for wish in wanted["objects"]]
    return Answer.of_json({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _upload_action(
    hub: LoopbackHub, repository: Repository, wish: dict[str, Any], *, multipart: bool
) -> dict[str, Any]:
    """Where to send a large file; nothing to do where it is there."""
    oid, nbytes = wish["oid"], wish["size"]
    if oid in repository.uploaded:
        return {"oid": oid, "size": nbytes}
    upload: dict[str, Any] = {"href": f"{hub.storage_url}/lfs/{repository.id}/{oid}"}
    if multipart and hub.multipart and nbytes > hub.multipart:
        count = -(-nbytes // hub.multipart)
        parts = {f"{number:05d}": f"{upload['href']}/{number}" for number in range(1, count + 1)}
        upload = {
            "href": f"{hub.url}/api/complete_multipart/{repository.id}/{oid}",
            "header": {"chunk_size": str(hub.multipart), **parts},
        }
    verify = {"href": f"{hub.url}/{repository.id}.git/info/lfs/objects/verify"}
    return {"oid": oid, "size": nbytes, "actions": {"upload": upload, "verify": verify}}


# The addresses below stand for signed ones: whoever knows them needs no token.


@routes("GET HEAD", "/lfs/{repo_id}/{oid}")
def download(hub: LoopbackHub, request: Request, repo_id: str, oid: str) -> Answer:
    return Answer.of_content(hub.storage.read(oid), request, {"ETag": f'"{oid}"'})


@routes("PUT", "/lfs/{repo_id}/{oid}")
def upload(hub: LoopbackHub, request: Request, repo_id: str, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise RefusalError(400, "The sha256 you specified did not match what we received.")
    hub.storage.put(oid, request.body)
    return _uploaded(hub, repo_id, oid)


@routes("PUT", "/lfs/{repo_id}/{oid}/{number}")
def upload_part(hub: LoopbackHub, request: Request, repo_id: str, oid: str, number: str) -> Answer:
    hub.storage.put_part(oid, int(number), request.body)
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body, usedforsecurity=False).hexdigest()}"'})


@routes("POST", "/api/complete_multipart/{repo_id}/{oid}")
def complete(hub: LoopbackHub, request: Request, repo_id: str, oid: str) -> Answer:
    try:
        hub.storage.join_parts(oid, len(request.json()["parts"]))
    except ValueError:
        raise RefusalError(400, "The sha256 you specified did not match what we received.") from None
    return _uploaded(hub, repo_id, oid)


def _uploaded(hub: LoopbackHub, repo_id: str, oid: str) -> Answer:
    repository = hub.repositories.get(repo_id)
    if repository is None:  # deleted meanwhile
        raise RefusalError(404, "Repository not found", "RepoNotFound")
    repository.uploaded.add(oid)
    return Answer()


@routes("POST", "/{repo_id}.git/info/lfs/objects/verify")
def verify(hub: LoopbackHub, request: Request, repo_id: str) -> Answer:
    wanted = request.json()
    uploaded = hub.writable(request, repo_id).uploaded
    if wanted["oid"] not in uploaded or hub.storage.nbytes(wanted["oid"]) != wanted["size"]:
        raise RefusalError(400, "This object does not exist or has another size.")
    return Answer()
