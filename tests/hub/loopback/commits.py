"""What a push decides: how each file is to be sent, and the commit."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub.loopback.accounts import signed_in
from tests.hub.loopback.large_files import is_large
from tests.hub.loopback.repositories import front_matter
from tests.hub.loopback.repository import Entry, Repository
from tests.hub.loopback.routes import Routes
from tests.hub.loopback.wire import Answer, RefusalError, Request

if TYPE_CHECKING:
    from tests.hub.loopback.hub import LoopbackHub

MAX_FILES = 256
_MISSING_POINTER = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist. For instance, this can"
    " happen if you used git push --no-verify to push your changes. Offending file: - "
)

routes = Routes()


@routes("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, request: Request) -> Answer:
    try:
        front_matter(request.json()["content"])
    except yaml.YAMLError as error:
        return Answer.of_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Answer.of_json({"errors": [], "warnings": []})


@routes("POST", "/api/models/{repo_id}/preupload/{revision}")
def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    """Say of each file how it is to be sent, and what is there already under its name."""
    repository = _pushed_to(hub, request, repo_id)
    commit = repository.resolve(revision)
    patterns = repository.large_patterns(commit.sha)
    offered = request.json()["files"]
    if len(offered) > MAX_FILES:
        raise RefusalError(413, f"at most {MAX_FILES} files")
    return Answer.of_json({"files": [_upload_mode(file, commit.files.get(file["path"]), patterns) for file in offered]})


def _upload_mode(file: dict[str, Any], there: Entry | None, patterns: list[str]) -> dict[str, Any]:
    large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]), patterns)
    mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    return {**mode, "oid": there.etag} if there else mode


@routes("POST", "/api/models/{repo_id}/commit/{revision}")
def commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    repository = _pushed_to(hub, request, repo_id)
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    parent = header["value"].get("parentCommit")

    def change(files: dict[str, Entry]) -> None:
        for operation in operations:
            _OPERATIONS[operation["key"]](hub, repository, files, operation["value"])

    with repository.lock:
        if request.flag("create_pr"):
            number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
            ref, parent = f"refs/pr/{number}", repository.resolve(parent or revision).sha
        else:
            number, ref = None, repository.ref_to_move(revision)
        made = repository.advance(
            ref,
            change,
            title=header["value"]["summary"],
            description=header["value"].get("description", ""),
            author=signed_in(hub.account(request)).user,
            parent=parent,
        )
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{made.sha}"}
    if number:
        answer["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{number}"
    return Answer.of_json(answer)


def _pushed_to(hub: LoopbackHub, request: Request, repo_id: str) -> Repository:
    """A repository for someone who commits; whoever may see it may propose a change."""
    if not request.flag("create_pr"):
        return hub.writable(request, repo_id)
    repository = hub.readable(request, repo_id)
    if signed_in(hub.account(request)).role != "write":
        raise RefusalError(403, "Forbidden: pass a token with write access")
    return repository


def _add(hub: LoopbackHub, repository: Repository, files: dict[str, Entry], value: dict[str, Any]) -> None:
    files[value["path"]] = repository.store_blob(base64.b64decode(value["content"]))


def _add_large(hub: LoopbackHub, repository: Repository, files: dict[str, Entry], value: dict[str, Any]) -> None:
    sha256 = value["oid"]
    xet_hash = hub.storage.xet_hash(sha256)
    if sha256 not in repository.uploaded and xet_hash is None:
        raise RefusalError(400, _MISSING_POINTER + value["path"])
    # A copy of a file in the Hub comes without its size.
    nbytes = value["size"] if "size" in value else hub.storage.nbytes(sha256)
    files[value["path"]] = Entry.large(sha256, nbytes, xet_hash)


def _delete(hub: LoopbackHub, repository: Repository, files: dict[str, Entry], value: dict[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")


def _delete_directory(hub: LoopbackHub, repository: Repository, files: dict[str, Entry], value: dict[str, Any]) -> None:
    below = [path for path in files if path.startswith(f"{value['path'].rstrip('/')}/")]
    if not below:
        raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
    for path in below:
        del files[path]


_OPERATIONS = {"file": _add, "lfsFile": _add_large, "deletedFile": _delete, "deletedFolder": _delete_directory}
