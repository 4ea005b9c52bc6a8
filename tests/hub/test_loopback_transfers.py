"""Bytes go to and from the Hub on this machine as they do on the Hub: in parts, by a CDN, in ranges, by Xet."""

from __future__ import annotations

import hashlib
import random
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd as Add
from huggingface_hub.errors import HfHubHTTPError

from tests.hub.client_process import Client
from tests.hub.loopback import Account, LoopbackHub

MODEL = "user/model"
COMMIT = "a" * 40
NOISE = random.Random(0).randbytes(3_000_000)  # noqa: S311 - what no chunk of is like another
SHA256 = hashlib.sha256(NOISE).hexdigest()


def commit(client, *operations, **options):
    return client("create_commit", MODEL, operations, commit_message="Change", **options)


def download(client, path="model.safetensors", **options):
    return Path(client("hf_hub_download", MODEL, path, **options)).read_bytes()


def nbytes(exchanges):
    return sum(exchange.received_nbytes for exchange in exchanges), sum(exchange.sent_nbytes for exchange in exchanges)


class TestParts:
    @pytest.fixture
    def hub(self):
        with LoopbackHub(multipart=1 << 20) as running:
            running.add(MODEL)
            yield running

    def test_a_large_file_is_sent_in_parts(self, hub, client):
        commit(client, Add("model.safetensors", NOISE))
        assert [sent.received_nbytes for sent in hub.log.select("PUT")] == [1 << 20, 1 << 20, len(NOISE) - (2 << 20)]
        assert hub.repositories[MODEL].read()["model.safetensors"] == NOISE

    def test_a_smaller_one_is_sent_whole(self, hub, client):
        commit(client, Add("model.safetensors", NOISE[: 1 << 20]))
        assert [sent.path for sent in hub.log.select("PUT")] == [
            f"/lfs/{MODEL}/{hashlib.sha256(NOISE[: 1 << 20]).hexdigest()}"
        ]


class TestStorageServer:
    @pytest.fixture
    def hub(self):
        with LoopbackHub(cdn=True) as running:
            running.add(MODEL, {COMMIT: {"model.safetensors": NOISE, "config.json": b"{}"}}, private=True)
            yield running

    def test_large_files_come_from_another_server_that_sees_no_token(self, hub, client):
        assert download(client) == NOISE
        assert download(client, "config.json") == b"{}"
        (from_storage,) = hub.log.select(server="storage")
        assert (from_storage.sent_nbytes, from_storage.query) == (len(NOISE), "filename=model.safetensors")
        assert not from_storage.authorised
        assert nbytes(hub.log.select(server="hub", path="*/resolve/*")) == (0, len(b"{}"))

    def test_large_files_are_sent_there(self, hub, client):
        commit(client, Add("other.safetensors", NOISE[::-1]))
        (to_storage,) = hub.log.select(server="storage")
        assert (to_storage.method, to_storage.received_nbytes) == ("PUT", len(NOISE))


class TestRanges:
    @pytest.fixture
    def url(self, hub):
        hub.add(MODEL, {COMMIT: {"model.safetensors": NOISE}})
        return f"{hub.url}/{MODEL}/resolve/main/model.safetensors"

    @pytest.mark.parametrize(
        ("asked", "expected", "told"),
        [
            ("bytes=0-9", slice(0, 10), "bytes 0-9/3000000"),
            ("bytes=2999990-", slice(-10, None), "bytes 2999990-2999999/3000000"),
            ("bytes=2999990-9999999", slice(-10, None), "bytes 2999990-2999999/3000000"),
            ("bytes=-10", slice(-10, None), "bytes 2999990-2999999/3000000"),
        ],
    )
    def test_a_part_is_sent(self, hub, url, asked, expected, told):
        with ask(url, Range=asked) as answer:
            assert (answer.status, answer.headers["Content-Range"]) == (206, told)
            assert answer.read() == NOISE[expected]
        assert (hub.log[0].byte_range, hub.log[0].sent_nbytes) == (asked, 10)

    def test_a_part_beyond_the_end_is_refused(self, url):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, Range="bytes=3000000-")
        assert (refused.value.code, refused.value.headers["Content-Range"]) == (416, "bytes */3000000")
        refused.value.close()

    def test_the_file_system_reads_ranges(self, hub, url, plain_process):
        assert plain_process.submit(read_range, hub.url, hub.token, 1000, 2000).result() == NOISE[1000:2000]
        assert [(one.byte_range, one.sent_nbytes) for one in hub.log.select("GET", "*/resolve/*")] == [
            ("bytes=1000-1999", 1000)
        ]


def ask(url, **headers):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return direct.open(urllib.request.Request(url, headers=headers))  # noqa: S310 - the Hub is on this machine


def read_range(url, token, start, stop):
    """Run in a client's process."""
    from huggingface_hub import HfFileSystem  # noqa: PLC0415 - it reads the environment

    with HfFileSystem(endpoint=url, token=token).open(f"{MODEL}/model.safetensors", cache_type="none") as file:
        file.seek(start)
        return file.read(stop - start)


class TestXet:
    @pytest.fixture
    def hub(self):
        with LoopbackHub(xet=True) as running:
            running.add(MODEL)
            yield running

    @pytest.fixture
    def xet_client(self, hub, xet_process, tmp_path):
        return Client(xet_process, hub.url, hub.token, tmp_path / "xet")

    def test_a_file_goes_and_comes_by_xet(self, hub, xet_client):
        commit(xet_client, Add("model.safetensors", NOISE))
        assert not hub.log.select("PUT")
        assert download(xet_client) == NOISE
        assert not hub.log.select("GET", "*/resolve/*")
        ((sent, _), (_, received)) = (nbytes(hub.log.select(method, "/cas/*xorbs/*")) for method in ("POST", "GET"))
        assert sent == received == pytest.approx(len(NOISE), rel=1e-3)

    def test_its_two_names_are_told(self, hub, xet_client):
        commit(xet_client, Add("model.safetensors", NOISE))
        (entry,) = xet_client("get_paths_info", MODEL, ["model.safetensors"])
        assert (entry.lfs.sha256, entry.size) == (SHA256, len(NOISE))
        assert entry.xet_hash == hub.storage.xet_hash(SHA256)

    def test_a_client_without_xet_reads_it_too(self, hub, xet_client, client):
        commit(xet_client, Add("model.safetensors", NOISE))
        assert download(client) == NOISE
        assert len(hub.log.select("GET", "*/resolve/*")) == 1

    def test_what_a_client_without_xet_sent_is_read_by_both(self, hub, xet_client, client):
        commit(client, Add("model.safetensors", NOISE))
        assert download(xet_client) == download(client) == NOISE

    def test_what_was_given_is_read_by_both(self, hub, xet_client, client):
        hub.repositories[MODEL].push({"model.safetensors": NOISE})
        assert hub.storage.xet_hash(SHA256)
        assert len(hub.log) == 0
        assert download(xet_client) == download(client) == NOISE

    def test_chunks_that_are_there_are_not_sent_again_whoever_sent_them(self, hub, xet_client):
        hub.repositories[MODEL].push({"model.safetensors": NOISE})
        commit(xet_client, Add("longer.safetensors", NOISE + NOISE[:1_000_000][::-1]))
        sent, _ = nbytes(hub.log.select("POST", "/cas/v1/xorbs/*"))
        assert 1_000_000 < sent < 1_500_000
        assert hub.storage.xet.stored_nbytes() == pytest.approx(len(NOISE) + sent, rel=1e-3)
        assert download(xet_client, "longer.safetensors") == NOISE + NOISE[:1_000_000][::-1]

    def test_small_files_travel_as_ever(self, hub, xet_client):
        commit(xet_client, Add("config.json", b"{}"))
        assert download(xet_client, "config.json") == b"{}"
        assert not hub.log.select(path="/cas/*")

    def test_a_snapshot_is_downloaded_by_xet(self, hub, xet_client):
        parts = {f"{number}.safetensors": NOISE[number * 100_000 :][:200_000] for number in range(10)}
        commit(xet_client, *(Add(path, content) for path, content in parts.items()))
        snapshot = Path(xet_client("snapshot_download", MODEL))
        assert {path: (snapshot / path).read_bytes() for path in parts} == parts
        assert not hub.log.select("GET", "*/resolve/*.safetensors")

    def test_a_pull_request_travels_by_xet(self, hub, xet_client):
        made = commit(xet_client, Add("model.safetensors", NOISE), create_pr=True)
        assert download(xet_client, revision=made.pr_revision) == NOISE

    def test_only_who_may_write_is_told_where_to_send(self, xet_process, tmp_path):
        with LoopbackHub(accounts=[Account("hf_reader", "user", role="read")], xet=True) as hub:
            hub.add(MODEL)
            client = Client(xet_process, hub.url, hub.token, tmp_path)
            with pytest.raises(HfHubHTTPError, match="403"):
                commit(client, Add("model.safetensors", NOISE))
            assert not hub.log.select(path="/cas/*")
