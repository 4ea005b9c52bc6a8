"""fresh_memory: tensors of large common allocations are as good as tensors of their own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.loading.fresh_memory import fresh

LARGE = 3 << 20  # elements: more than goes into a small allocation


def test_tensors_have_the_shapes_and_dtypes_that_were_wanted_and_share_nothing():
    wanted = [((LARGE,), torch.float32), ((), torch.bfloat16), ((0, 3), torch.float32), ((7, 5), torch.int8)]
    wanted += [((1, 3), dtype) for dtype in TORCH_DTYPES.values()]
    tensors = list(fresh(wanted))
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] == wanted
    for value, tensor in enumerate(tensors):
        tensor.view(-1).view(torch.uint8).fill_(value) if tensor.numel() else None
    for value, tensor in enumerate(tensors):
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert bool((tensor.view(-1).view(torch.uint8) == value).all()) or not tensor.numel()


@pytest.mark.parametrize("numel", [100, LARGE], ids=["small", "large"])
def test_memory_begins_where_vector_instructions_want_it(numel):
    tensors = list(fresh([((numel,), torch.float32), ((3,), torch.int8), ((5,), torch.float64)]))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_an_allocation_is_made_when_its_tensors_are_asked_for():
    asked = []

    def wanted():
        for index in range(4):
            asked.append(index)
            yield (12 << 20,), torch.float32  # of 48 MiB

    tensors = fresh(wanted())
    next(tensors)
    assert asked == [0, 1]


def test_tensors_outlive_each_other_and_are_saved_as_any(tmp_path):
    first, second = fresh([((LARGE,), torch.float32), ((10,), torch.float32)])
    first.fill_(1)
    second.fill_(2)
    del first
    save_file({"second": second, "other": second.clone()}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["second"].equal(torch.full((10,), 2.0))
    torch.save(second, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 1 << 20


def test_inference_mode_gives_what_it_always_gives():
    with torch.inference_mode():
        [tensor] = fresh([((LARGE,), torch.float32)])
    assert tensor.is_inference()
    [tensor] = fresh([((LARGE,), torch.float32)])
    tensor.add_(1)
