"""Samples of tensors: the same rows every time, read as if they were all there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tallstore.checkpoints import open_checkpoint
from tallstore.format.dtypes import TensorSpec
from tallstore.packing import sampling
from tallstore.packing.sampling import SampledCheckpoint, Stride, stride_of


@given(
    rows=st.integers(1, 60),
    length=st.integers(1, 7),
    block=st.integers(1, 5),
    every=st.integers(1, 6),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_sample_is_every_nth_block_of_rows(rows, length, block, every, cut):
    whole = torch.arange(rows * length, dtype=torch.float32).reshape(rows, length)
    kept = [row for row in range(rows) if row // block % every == 0]
    with open_checkpoint({"w": whole}) as checkpoint:
        sampled = SampledCheckpoint(checkpoint, {"w": Stride(length, block, every)})
        expected = whole[kept].reshape(-1)
        assert sampled.spec("w").shape == (len(kept), length)
        start, stop = sorted(int(part * expected.numel()) for part in cut)
        assert torch.equal(sampled.read("w", start, stop), expected[start:stop])


def test_resized_tensors_are_sampled_at_the_same_rows():
    base, expert = torch.arange(40.0).reshape(20, 2), torch.arange(60.0).reshape(30, 2)
    stride = Stride(2, 2, 3)
    with open_checkpoint({"w": base}) as one, open_checkpoint({"w": expert}) as other:
        ours = SampledCheckpoint(one, {"w": stride}).read("w")
        theirs = SampledCheckpoint(other, {"w": stride}).read("w")
    assert torch.equal(theirs[: ours.numel()], ours)


@pytest.mark.parametrize("shape", [(), (5,), (1 << 19,), (700, 700), (8, 1 << 20), (3, 200, 1000)])
def test_small_tensors_and_few_long_rows_are_taken_whole(shape):
    assert stride_of(TensorSpec("F32", shape)) is None


@pytest.mark.parametrize("shape", [(30_522, 384), (1 << 22,), (4096, 4096), (100_000, 3, 3)])
def test_about_a_sixteenth_of_a_large_tensor_is_taken(shape):
    spec = TensorSpec("F32", shape)
    stride = stride_of(spec)
    numel = TensorSpec("F32", stride.sample(spec).shape).numel
    least = sampling._LEAST_NUMEL
    assert 0.9 * max(least, spec.numel / 16) <= numel <= 1.2 * max(least, spec.numel / 16)
