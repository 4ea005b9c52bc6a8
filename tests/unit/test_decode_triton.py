"""decode_triton: interpreted on the CPU, the kernel is the reference bit for bit; compiled, it obeys the same rules."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

import tallstore
from tests.device_cases import NARROW, differing, write_bundle, write_copies, write_unmoved
from tests.reference import same_bits
from tests.triton_process import compile_all, interpret, passes, triton_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")

KINDS = ("mask", "signed", "two-level", "sign", "sparse", "uniform")
PAIRS = list(itertools.product(NARROW.values(), repeat=2))


@pytest.fixture(scope="module")
def interpreter():
    with triton_process(TRITON_INTERPRET="1") as process:
        yield process


def interpreted(process, built, wanted=None, *, kept=False):
    """What the kernel makes of a bundle, as tensors."""
    root = built.seal()
    raw = process.submit(interpret, root, wanted, kept=kept).result()
    with tallstore.open_bundle(root) as bundle:
        like = bundle.state_dict("t", dtype=wanted)
    assert raw.keys() == like.keys() if not kept else raw.keys() <= like.keys()
    return {
        name: torch.frombuffer(bytearray(raw[name]), dtype=t.dtype).view(t.shape) if t.numel() else t
        for name, t in like.items()
        if name in raw
    }


@pytest.mark.parametrize(("base", "result"), PAIRS, ids=str)
def test_every_form_is_the_reference(interpreter, tmp_path, base, result):
    """Where base and result differ, the result is cast on, to the base's dtype."""
    turn = PAIRS.index((base, result))
    wanted = base if turn % 2 else result
    built = write_bundle(tmp_path / "bundle", base, result, turn)
    found = interpreted(interpreter, built, str(wanted).removeprefix("torch."))
    assert differing(found, {name: tensor.to(wanted) for name, tensor in built.tasks[0].expected.items()}) == []


@pytest.mark.parametrize(("base", "result"), PAIRS[::4], ids=str)
def test_every_form_is_the_reference_from_what_is_kept_on_the_device(interpreter, tmp_path, base, result):
    built = write_bundle(tmp_path / "bundle", base, result, 5)
    found = interpreted(interpreter, built, kept=True)
    expected = built.tasks[0].expected
    assert found.keys() == expected.keys()
    assert differing(found, expected) == []


def test_copies_keep_every_bit(interpreter, tmp_path):
    built = write_copies(tmp_path / "bundle")
    found, expected = interpreted(interpreter, built), built.tasks[0].expected
    moved = {"F16", "F32", "cast", "wide"}  # what is added to a NaN, or cast, is a NaN of any payload
    assert [name for name in found if name not in moved and not same_bits(found[name], expected[name])] == []
    assert differing(found, expected) == []


@pytest.mark.parametrize("dtype", NARROW.values(), ids=str)
def test_where_nothing_is_added_the_base_keeps_every_bit(interpreter, tmp_path, dtype):
    built = write_unmoved(tmp_path / "bundle", dtype)
    found = interpreted(interpreter, built)
    assert [name for name, tensor in found.items() if not same_bits(tensor, built.base[name])] == []


def test_the_kernel_passes_the_test_of_decoders(interpreter):
    assert interpreter.submit(passes).result()


def test_compiled_kernels_neither_fuse_nor_flush_and_move_16_bytes_at_once(tmp_path):
    """The interpreter takes more than the compiler does; and what the compiler makes of sums is its own."""
    built = write_bundle(tmp_path / "bundle", torch.bfloat16, torch.float32, 1)
    with triton_process(TRITON_CACHE_DIR=str(tmp_path / "cache")) as process:
        assembly = process.submit(compile_all, built.seal()).result()
    assert assembly.keys() == {f"{kind} {by_row}" for kind in KINDS for by_row in (False, True)}
    for form, ptx in assembly.items():
        assert "fma.rn" not in ptx, form
        assert ".ftz" not in ptx, form
        assert "ld.global.v4.b32" in ptx, form
        assert "st.global.v4.b32" in ptx, form
    assert any("mul.f32" in ptx or "mul.rn.f32" in ptx for ptx in assembly.values())
