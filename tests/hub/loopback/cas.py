"""Xet's store of chunks, as its client asks for it: tokens, xorbs, shards, reconstructions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.hub.loopback.accounts import signed_in
from tests.hub.loopback.routes import Routes
from tests.hub.loopback.transfers import refuse_if_gated
from tests.hub.loopback.wire import Answer, RefusalError, Request
from tests.hub.loopback.xet import TOKEN, XetStore

if TYPE_CHECKING:
    from tests.hub.loopback.hub import LoopbackHub

_TOKEN_SECONDS = 3600

routes = Routes()


@routes("GET", "/api/models/{repo_id}/xet-read-token/{revision}")
def read_token(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    refuse_if_gated(hub, request, hub.readable(request, repo_id))
    return _token(hub)


@routes("GET", "/api/models/{repo_id}/xet-write-token/{revision}")
def write_token(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    if request.flag("create_pr"):
        hub.readable(request, repo_id)
        signed_in(hub.account(request))
    else:
        hub.writable(request, repo_id)
    return _token(hub)


def _token(hub: LoopbackHub) -> Answer:
    """Where the store is: huggingface_hub reads the headers, hf_xet the body."""
    _existing(hub)
    url, until = f"{hub.storage_url}/cas", int(time.time()) + _TOKEN_SECONDS
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": TOKEN, "X-Xet-Token-Expiration": str(until)}
    return Answer.of_json({"casUrl": url, "accessToken": TOKEN, "exp": until}, **headers)


def _store(hub: LoopbackHub, request: Request) -> XetStore:
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        raise RefusalError(401, "not a token of this store")
    return _existing(hub)


def _existing(hub: LoopbackHub) -> XetStore:
    if hub.storage.xet is None:
        raise RefusalError(404, "this Hub does not speak Xet: its clients need HF_HUB_DISABLE_XET")
    return hub.storage.xet


# Newer ways to do the same (/v1/xorb-grants, /v2/shards, /v2/reconstructions) are not there: the client falls back.


@routes("POST", "/cas/v1/xorbs/default/{name}")
def upload_xorb(hub: LoopbackHub, request: Request, name: str) -> Answer:
    return Answer.of_json({"was_inserted": _store(hub, request).put_xorb(name, request.body)})


@routes("POST", "/cas/v1/shards")
def upload_shard(hub: LoopbackHub, request: Request) -> Answer:
    try:
        _store(hub, request).put_shard(request.body)
    except FileNotFoundError:
        raise RefusalError(400, "a xorb of this shard was not uploaded") from None
    return Answer.of_json({"result": 1})


@routes("GET", "/cas/v1/chunks/{prefix}/{chunk}")
def find_chunk(hub: LoopbackHub, request: Request, prefix: str, chunk: str) -> Answer:
    shard = _store(hub, request).shard_of(chunk)
    if shard is None:
        raise RefusalError(404, "no such chunk")
    return Answer(shard)


@routes("GET", "/cas/v1/reconstructions/{name}")
def reconstruct(hub: LoopbackHub, request: Request, name: str) -> Answer:
    store = _store(hub, request)
    file = store.file(name)
    if file is None:
        raise RefusalError(404, "no such file")
    start, stop = request.byte_range(file.nbytes) or (0, file.nbytes)
    return Answer.of_json(store.reconstruct(file, start, stop, f"{hub.url_of(request.server)}/cas/xorbs"))


@routes("GET", "/cas/xorbs/{name}")
def download_xorb(hub: LoopbackHub, request: Request, name: str) -> Answer:
    """A signed address: whoever knows it needs no token."""
    return Answer.of_content(_existing(hub).read_xorb(name), request, {})
