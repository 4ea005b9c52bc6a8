"""Single tensors of large shards that stay on the Hub: what is fetched, and that nothing of it is trusted."""

from __future__ import annotations

import pytest
import torch

import tallstore
from tallstore.format.dtypes import CHUNK_NUMEL
from tests.hub import pulls
from tests.hub.loopback import LoopbackHub
from tests.hub.loopback.faults import Drop, Fault, Status, Tamper, Truncate
from tests.hub.pulls import call, contents, ranged

SHARD = "tasks/t/private-00001-of-00001.safetensors"
NAMES = ["part 0", "part 1"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """One task that stores tensors whole: one of two chunks, forty parts of 20 kB, and a pool."""
    out = tmp_path_factory.mktemp("packed") / "bundle"
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.zeros(5000)}
    own = {"long": torch.randint(0, 255, (CHUNK_NUMEL + 7,), generator=generator, dtype=torch.uint8)}
    own |= {f"part {number}": torch.randn(5000, generator=generator) for number in range(40)}
    own |= {"little": torch.arange(5)}
    tallstore.pack(base, {"t": base | own}, out, embed_base=True, method=tallstore.Sign())
    return out


@pytest.fixture(scope="module")
def running(bundle):
    with LoopbackHub() as hub:
        hub.add("user/bundle").push(contents(bundle))
        yield hub


@pytest.fixture
def hub(running):
    running.log.clear()
    yield running
    running.faults.clear()


def requests(hub):
    """Of the shard: the bytes of every range that was sent, and None for all of it."""
    found = hub.log.select("GET", f"*{SHARD}")
    return [each.sent_nbytes if each.byte_range else None for each in found]


def expected(bundle, names):
    with tallstore.open_bundle(bundle) as opened:
        return [pulls._digest({name: opened.tensor("t", name)}) for name in names]


@pytest.mark.parametrize("name", ["part 3", "little"])
def test_a_small_part_of_a_shard_is_fetched_alone(hub, process, bundle, tmp_path, name):
    found = call(process, ranged, "user/bundle", "t", [name], cache_dir=tmp_path)
    assert found.value[0] == expected(bundle, [name])
    assert None not in requests(hub)
    assert 3 <= len(requests(hub)) <= 4  # the header, perhaps its end, the index, the tensor
    assert sum(requests(hub)) < (bundle / SHARD).stat().st_size / 20
    assert not list(tmp_path.rglob("private-*"))


def test_a_large_part_brings_the_shard(hub, process, bundle, tmp_path):
    found = call(process, ranged, "user/bundle", "t", ["long"], cache_dir=tmp_path)
    assert found.value[0] == expected(bundle, ["long"])
    assert requests(hub) == [None]


def test_many_small_parts_bring_the_shard(hub, process, bundle, tmp_path):
    names = [f"part {number}" for number in range(40)]
    found = call(process, ranged, "user/bundle", "t", names, cache_dir=tmp_path)
    assert found.value[0] == expected(bundle, names)
    assert requests(hub)[-1] is None
    assert requests(hub).count(None) == 1


def test_a_shard_that_is_here_is_not_asked_for(hub, process, bundle, tmp_path):
    call(process, tallstore.pull, "user/bundle", cache_dir=tmp_path)
    hub.log.clear()
    found = call(process, ranged, "user/bundle", "t", NAMES, cache_dir=tmp_path)
    assert found.value[0] == expected(bundle, NAMES)
    assert requests(hub) == []


def test_offline_nothing_is_asked_for(hub, process, tmp_path):
    call(process, pulls.shown, "user/bundle", cache_dir=tmp_path)
    hub.log.clear()
    found = call(process, ranged, "user/bundle", "t", NAMES, cache_dir=tmp_path, local_files_only=True)
    assert found.error == "NotFetchedError"
    assert not hub.log


@pytest.mark.parametrize("fault", [Status(503), Drop(), Truncate(100)], ids=["503", "dropped", "cut off"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_faults_are_got_over(hub, process, bundle, tmp_path, fault, skip):  # noqa: PLR0917
    hub.inject(fault, "GET", f"*{SHARD}", skip=skip, times=2)
    found = call(process, ranged, "user/bundle", "t", NAMES, cache_dir=tmp_path)
    assert found.value[0] == expected(bundle, NAMES)


@pytest.mark.parametrize("verify", ["first-read", "never"])
@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_what_was_tampered_with_is_refused(hub, process, tmp_path, verify, skip):
    hub.inject(Tamper(3), "GET", f"*{SHARD}", skip=skip)
    found = call(process, ranged, "user/bundle", "t", NAMES, cache_dir=tmp_path, verify=verify)
    assert found.error in {"IntegrityError", "FormatError"}  # a header's length has no hash of its own
    assert SHARD in found.problem


class _Whole(Fault):
    def after(self, answer):
        answer.status = 200
        return answer


class _Longer(Fault):
    def after(self, answer):
        answer.body += b"x"
        return answer


@pytest.mark.parametrize(("fault", "error"), [(_Whole(), "HubError"), (_Longer(), "IntegrityError")])
def test_another_answer_than_was_asked_for_is_refused(hub, process, tmp_path, fault, error):
    hub.inject(fault, "GET", f"*{SHARD}", times=None)
    found = call(process, ranged, "user/bundle", "t", NAMES, cache_dir=tmp_path)
    assert found.error == error
    assert "\n" not in found.problem
