"""What goes wrong on purpose on the Hub on this machine, as the real client meets it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd as Add
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from tests.hub.client_process import Client, client_process
from tests.hub.loopback import LoopbackHub
from tests.hub.loopback.faults import Call, Delay, Drop, Hold, LoseAnswer, Status, Tamper, Truncate

MODEL = "user/model"
FILE = "model.safetensors"
COMMIT = "a" * 40
NOISE = random.Random(0).randbytes(1_000_000)  # noqa: S311 - what no chunk of is like another
RESOLVE = f"/{MODEL}/resolve/*"


@pytest.fixture
def repository(hub):
    return hub.add(MODEL, {COMMIT: {FILE: NOISE}})


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    with client_process("http://127.0.0.1:9", tmp_path_factory.mktemp("clients"), processes=2) as processes:
        yield processes


def commit(client, *operations, **options):
    return client("create_commit", MODEL, operations, commit_message="Change", **options)


def download(client, **options):
    return Path(client("hf_hub_download", MODEL, FILE, **options)).read_bytes()


def differences(received, sent):
    return [at for at, (one, other) in enumerate(zip(received, sent, strict=True)) if one != other]


class TestStatuses:
    @pytest.mark.parametrize("fault", [Status(503), Status(429, retry_after=0)])
    def test_who_asks_again_is_answered(self, hub, repository, client, fault):
        hub.inject(fault, "POST", "*/preupload/*", times=2)
        commit(client, Add("config.json", b"{}"))
        statuses = [asked.status for asked in hub.log.select("POST", "*/preupload/*")]
        assert statuses == [fault.status, fault.status, 200]

    def test_a_file_is_not_asked_for_again(self, hub, repository, client):
        hub.inject(Status(503), "GET", RESOLVE)
        with pytest.raises(HfHubHTTPError, match="503"):
            download(client)

    def test_a_head_is(self, hub, repository, client):
        hub.inject(Status(503), "HEAD", RESOLVE, times=3)
        assert download(client) == NOISE
        hub.inject(Status(503), "HEAD", RESOLVE, times=None)
        with pytest.raises(LocalEntryNotFoundError):
            download(client, cache_dir=client.home / "another")

    def test_a_commit_is_not_sent_again(self, hub, repository, client):
        hub.inject(Status(500), "POST", "*/commit/*")
        with pytest.raises(HfHubHTTPError, match="500"):
            commit(client, Add("config.json", b"{}"))
        assert repository.resolve("main").sha == COMMIT

    def test_only_some_of_the_requests_are_meant(self, hub, repository, client):
        hub.inject(Status(403), "POST", "*/commit/*", skip=1, times=1)
        commit(client, Add("a", b""))
        with pytest.raises(HfHubHTTPError, match="403"):
            commit(client, Add("b", b""))
        commit(client, Add("c", b""))
        assert set(repository.read()) == {FILE, "a", "c"}


class TestConnections:
    def test_a_dropped_request_is_not_carried_out(self, hub, repository, client):
        hub.inject(Drop(), "POST", "*/commit/*")
        with pytest.raises(Exception, match="disconnected without sending a response"):
            commit(client, Add("config.json", b"{}"))
        assert repository.resolve("main").sha == COMMIT
        assert [asked.status for asked in hub.log.select("POST", "*/commit/*")] == [None]

    def test_a_request_whose_answer_is_lost_is(self, hub, repository, client):
        hub.inject(LoseAnswer(), "POST", "*/commit/*")
        with pytest.raises(Exception, match="disconnected without sending a response"):
            commit(client, Add("config.json", b"{}"))
        assert repository.read()["config.json"] == b"{}"

    def test_a_file_that_breaks_off_is_resumed_after_what_the_client_wrote(self, hub, client):
        hub.add(MODEL, {COMMIT: {FILE: NOISE * 12}})
        hub.inject(Truncate(11_000_000), "GET", RESOLVE)
        assert download(client) == NOISE * 12
        asked = hub.log.select("GET", RESOLVE)
        written = 10 << 20  # it writes so much at a time
        assert [(one.byte_range, one.sent_nbytes) for one in asked] == [
            (None, 11_000_000),
            (f"bytes={written}-", 12_000_000 - written),
        ]

    def test_one_that_never_goes_on_is_given_up(self, hub, repository, client):
        hub.inject(Truncate(300_000), "GET", RESOLVE)
        hub.inject(Truncate(0), "GET", RESOLVE, times=None)
        with pytest.raises(Exception, match="peer closed connection"):
            download(client)
        assert len(hub.log.select("GET", RESOLVE)) == 6
        assert not list((client.home / "cache").rglob("*.incomplete"))

    def test_another_byte_passes_unnoticed(self, hub, repository, client):
        hub.inject(Tamper(at=1000), "GET", RESOLVE)
        assert differences(download(client), NOISE) == [1000]

    def test_a_slow_answer_is_waited_for_as_long_as_the_client_likes(self, hub, repository, client):
        hub.inject(Delay(10), "HEAD", RESOLVE)
        assert download(client, etag_timeout=0.1) == NOISE
        assert len(hub.log.select("HEAD", RESOLVE)) == 2


class TestXet:
    @pytest.fixture
    def hub(self):
        with LoopbackHub(xet=True) as running:
            yield running

    @pytest.fixture
    def client(self, hub, xet_process, tmp_path):
        return Client(xet_process, hub.url, hub.token, tmp_path)

    @pytest.mark.parametrize("fault", [Status(503), Drop(), Truncate(300_000)])
    def test_a_chunk_is_asked_for_again(self, hub, repository, client, fault):
        hub.inject(fault, "GET", "/cas/xorbs/*")
        assert download(client) == NOISE
        assert len(hub.log.select("GET", "/cas/xorbs/*")) == 2

    def test_another_byte_passes_unnoticed(self, hub, repository, client):
        header_nbytes = 8
        hub.inject(Tamper(at=header_nbytes + 1000), "GET", "/cas/xorbs/*")
        assert differences(download(client), NOISE) == [1000]

    def test_a_xorb_is_sent_again(self, hub, repository, client):
        hub.inject(Status(503), "POST", "/cas/v1/xorbs/*")
        commit(client, Add("another.safetensors", NOISE[::-1]))
        assert repository.read()["another.safetensors"] == NOISE[::-1]


class TestOthers:
    @pytest.fixture
    def racing(self, hub, two_processes, tmp_path):
        return Client(two_processes, hub.url, hub.token, tmp_path)

    def test_somebody_commits_between_two_requests(self, hub, repository, client):
        hub.inject(Call(lambda: repository.push({"theirs": b"1"})), "POST", "*/commit/*")
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            commit(client, Add("ours", b"2"), parent_commit=COMMIT)
        assert set(repository.read()) == {FILE, "theirs"}

    def test_who_is_held_comes_second(self, hub, repository, racing):
        hold = Hold()
        hub.inject(hold, "POST", "*/commit/*")
        held = racing.submit("create_commit", MODEL, [Add("held", b"")], commit_message="a", parent_commit=COMMIT)
        assert hold.reached.wait(30)
        first = commit(racing, Add("free", b""), parent_commit=COMMIT)
        hold.released.set()
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            held.result()
        assert repository.resolve("main").sha == first.oid

    def test_of_many_that_commit_at_once_one_wins(self, hub, repository, racing):
        pushes = [
            racing.submit("create_commit", MODEL, [Add(name, NOISE)], commit_message=name, parent_commit=COMMIT)
            for name in ("a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors")
        ]
        wait(pushes)
        (won,) = (push.result() for push in pushes if push.exception() is None)
        assert [push.exception().response.status_code for push in pushes if push.exception()] == [412] * 3
        assert [made.sha for made in repository.history()] == [won.oid, COMMIT]

    def test_without_a_parent_all_win(self, hub, repository, racing):
        names = [f"{number}.json" for number in range(8)]
        pushes = [racing.submit("create_commit", MODEL, [Add(name, b"")], commit_message=name) for name in names]
        wait(pushes)
        assert set(repository.read()) == {FILE, *names}
        assert len(list(repository.history())) == 9


class TestTheServerItself:
    def test_its_own_failure_fails_the_test(self, client):
        def fail():
            raise ZeroDivisionError

        hub = LoopbackHub()
        with pytest.raises(ZeroDivisionError), hub:  # noqa: PT012 - the error is that of leaving the context
            hub.inject(Call(fail))
            with pytest.raises(HfHubHTTPError, match="The loopback Hub failed"):
                Client(client._process, hub.url, hub.token, client.home)("whoami")

    def test_it_stops_while_requests_wait(self, client):
        with LoopbackHub() as hub:
            hold = Hold()
            hub.inject(hold)
            waiting = Client(client._process, hub.url, hub.token, client.home).submit("whoami")
            assert hold.reached.wait(30)
        waiting.exception(30)
        assert not [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
