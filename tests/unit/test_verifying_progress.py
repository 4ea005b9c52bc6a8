"""Whoever watches `verify` sees it move from nothing to all bytes, whatever it finds on the way."""

from __future__ import annotations

import pytest

import tallstore
from tests.model_directories import pack_models, save_models


@pytest.fixture
def bundle(tmp_path):
    return pack_models(save_models(tmp_path / "models"), tmp_path / "bundle", embed_base=True)


def watched(bundle):
    """The problems, and what was told of the way to them."""
    calls = []
    problems = tallstore.verify(bundle, progress=lambda done, total: calls.append((done, total)))
    return problems, calls


def test_every_byte_is_counted_twice(bundle):
    """Once where its file is hashed, once where its meaning is checked: the manifest alone is read before."""
    problems, calls = watched(bundle)
    listed = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    total = 2 * (listed - (bundle / "tallstore.json").stat().st_size)
    assert problems == []
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    contents = [path.stat().st_size for path in bundle.rglob("*.safetensors")]
    assert len(calls) > 2 + len(contents) * 3  # header, index and chunks of each shard move it too


def test_it_ends_at_all_bytes_where_a_file_is_damaged_or_missing(bundle):
    shard = bundle / "tasks" / "task1" / "mask-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (bundle / "tasks" / "task2" / "task.json").unlink()
    problems, calls = watched(bundle)
    assert problems
    done, total = calls[-1]
    assert done == total > 0


@pytest.mark.parametrize("after", [0, 1, 30])
@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_what_the_watcher_raises_stops_it(bundle, error, after):
    calls = []

    def stop(done, _total):
        calls.append(done)
        if len(calls) > after:
            raise error

    with pytest.raises(error):
        tallstore.verify(bundle, progress=stop)
