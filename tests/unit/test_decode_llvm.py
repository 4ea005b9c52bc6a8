"""decode_llvm: compiled functions are the reference bit for bit, and are left alone where they are not worth it."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
from dataclasses import replace

import pytest
import torch

import tallstore
from tallstore.loading import expert as loading_expert
from tallstore.loading import kernels as loading_kernels
from tallstore.loading.compiled import CompiledElements
from tallstore.loading.kernels import Kernels
from tallstore.loading.packed import Form
from tests.device_cases import LARGE, NARROW, decoded, differing, write_bundle, write_copies, write_large, write_unmoved
from tests.reference import same_bits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llvmlite") is None, reason="there is no llvmlite here")

KINDS = ("mask", "signed", "two-level", "sign", "sparse", "uniform")
PAIRS = list(itertools.product(NARROW.values(), repeat=2))
SIGNED = Form("signed", "F32", "F32", "F32", values="LOG4")


@pytest.fixture
def decode():
    from tallstore.loading import decode_llvm  # noqa: PLC0415 - an extra

    return decode_llvm.decode


@pytest.fixture
def kernels(monkeypatch):
    """None compiled yet; forms are as soon as they are asked for."""
    made = Kernels()
    monkeypatch.setattr(loading_expert, "kernels", made)
    monkeypatch.setenv("TALLSTORE_COMPILE", "1")
    return made


@pytest.fixture
def flushing():
    """Subnormal numbers are zeros in this thread, as far as torch's users are concerned."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush")
    yield
    torch.set_flush_denormal(False)


def is_expected(found, built):
    return differing(found, built.tasks[0].expected) == []


# --- the reference ---


@pytest.mark.parametrize(("base", "result"), PAIRS, ids=str)
def test_every_form_is_the_reference(decode, tmp_path, base, result):
    """Where base and result differ, the result is cast on, to the base's dtype."""
    turn = PAIRS.index((base, result))
    wanted = base if turn % 2 else result
    built = write_bundle(tmp_path / "bundle", base, result, turn)
    found = decoded(built.seal(), decode, str(wanted).removeprefix("torch."))
    assert differing(found, {name: tensor.to(wanted) for name, tensor in built.tasks[0].expected.items()}) == []


def test_copies_keep_every_bit(decode, tmp_path):
    built = write_copies(tmp_path / "bundle")
    found, expected = decoded(built.seal(), decode), built.tasks[0].expected
    moved = {"F16", "F32", "cast", "wide"}  # what is added to a NaN, or cast, is a NaN of any payload
    assert [name for name in found if name not in moved and not same_bits(found[name], expected[name])] == []
    assert differing(found, expected) == []


@pytest.mark.parametrize("dtype", NARROW.values(), ids=str)
def test_where_nothing_is_added_the_base_keeps_every_bit(decode, tmp_path, dtype):
    built = write_unmoved(tmp_path / "bundle", dtype)
    found = decoded(built.seal(), decode)
    assert [name for name, tensor in found.items() if not same_bits(tensor, built.base[name])] == []


@pytest.mark.parametrize(
    ("dtype", "wanted", "compiled"),
    [
        (torch.float16, torch.float8_e5m2, ["F16"]),
        (torch.bfloat16, torch.float64, ["BF16"]),
        (torch.float32, torch.bfloat16, ["BF16", "F32"]),
    ],
    ids=str,
)
def test_experts_are_the_reference(kernels, tmp_path, dtype, wanted, compiled):
    built = write_bundle(tmp_path / "bundle", dtype, dtype, 3)
    with tallstore.open_bundle(built.seal()) as bundle:
        assert is_expected(bundle.state_dict("t"), built)
        expected = {name: tensor.to(wanted) for name, tensor in built.tasks[0].expected.items()}
        assert differing(bundle.state_dict("t", dtype=wanted), expected) == []
    assert None not in kernels._found.values()
    assert sorted({form.wanted for form in kernels._found}) == compiled


def test_experts_of_float64_are_the_reference(kernels, tmp_path):
    built = write_bundle(tmp_path / "bundle", torch.float64, torch.float64)
    with tallstore.open_bundle(built.seal()) as bundle:
        assert is_expected(bundle.state_dict("t"), built)
        expected = {name: tensor.to(torch.float32) for name, tensor in built.tasks[0].expected.items()}
        assert differing(bundle.state_dict("t", dtype=torch.float32), expected) == []
    assert set(kernels._found.values()) == {None}


@pytest.mark.parametrize("threads", [1, 3])
def test_ranges_begin_and_end_anywhere(kernels, tmp_path, monkeypatch, threads):
    """Inside of bytes, of rows, and at the border of chunks; and whole tensors on one thread or several."""
    root = write_large(tmp_path / "bundle", KINDS).seal()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tallstore.open_bundle(root) as bundle:
            whole = bundle.state_dict("t")
            monkeypatch.setenv("TALLSTORE_COMPILE", "0")
            kernels.__init__()
            expected = bundle.state_dict("t")
            monkeypatch.setenv("TALLSTORE_COMPILE", "1")
            kernels.__init__()
            assert [name for name in expected if not same_bits(whole[name], expected[name])] == []
            expert = bundle._expert("t")
            for kind, (start, stop) in itertools.product(
                KINDS, [(3, 5), (13, 14), (7, 1031), (LARGE - 8000, LARGE - 3), (2**20 - 11, 2**20 + 13), (9, LARGE)]
            ):
                part = torch.empty(stop - start, dtype=torch.bfloat16)
                expert.read(kind, start, stop, part)
                assert same_bits(part, expected[kind].view(-1)[start:stop]), (kind, start, stop)
    finally:
        torch.set_num_threads(before)
    assert len(kernels._found) == len(KINDS)


def test_destinations_need_not_be_contiguous(kernels, tmp_path):
    built = write_large(tmp_path / "bundle", ["signed"])
    with tallstore.open_bundle(built.seal()) as bundle:
        expert = bundle._expert("t")
        apart = torch.zeros(100, 2, dtype=torch.bfloat16)
        expert.read("signed", 50, 150, apart[:, 1])
        assert same_bits(apart[:, 1], expert.elements("signed", 50, 150))
        assert not apart[:, 0].any()


def test_subnormal_numbers_count_where_they_are_flushed(kernels, flushing, tmp_path):
    built = write_bundle(tmp_path / "bundle", torch.float32, torch.float32)
    with tallstore.open_bundle(built.seal()) as bundle:
        found = bundle.state_dict("t")
    assert sys.float_info.min * 0.5 == 0.0
    torch.set_flush_denormal(False)
    assert is_expected(found, built)
    assert None not in kernels._found.values()


def test_several_threads_compile_and_decode(kernels, tmp_path):
    built = write_bundle(tmp_path / "bundle", torch.float32, torch.bfloat16)
    found = {}
    with tallstore.open_bundle(built.seal()) as bundle:

        def load(number):
            found[number] = bundle.state_dict("t")

        threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    assert all(is_expected(tensors, built) for tensors in found.values())


# --- switching ---


def test_what_a_switch_needs_goes_when_the_task_goes(kernels, tmp_path):
    """And what stays is used again, whatever is read in between."""
    built = write_large(tmp_path / "bundle", ["signed", "sparse"])
    model = torch.nn.Module()
    for name, tensor in built.base.items():
        model.register_buffer(name, tensor.clone())
    with tallstore.open_bundle(built.seal()) as bundle:
        expected = bundle.state_dict("t")
        switcher = bundle.attach(model, cache_nbytes=0)
        for _ in range(2):
            switcher.set_expert("t")
            assert [name for name in expected if not same_bits(getattr(model, name), expected[name])] == []
            [(_, resident)] = switcher._files._resident_tasks.values()
            assert {type(opened) for opened in resident.opened.values()} == {CompiledElements}
            assert all(len(opened.prepared) == 2 for opened in resident.opened.values())
            switcher.set_expert(None)
            assert [
                name for name in ("signed", "sparse") if not same_bits(getattr(model, name), built.base[name])
            ] == []
            assert not switcher._files._resident_tasks


# --- when it is used ---


def test_little_is_decoded_without(monkeypatch):
    monkeypatch.delenv("TALLSTORE_COMPILE", raising=False)
    kernels = Kernels()
    kernels.expect(SIGNED, loading_kernels._WORTH_NUMEL - 1)
    assert kernels.kernel(SIGNED) is None
    kernels.expect(SIGNED, 1)
    kernels.expect(replace(SIGNED, kind="mask"), 1)
    assert kernels.kernel(SIGNED) is not None
    assert kernels.kernel(replace(SIGNED, kind="mask")) is None


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("TALLSTORE_COMPILE", "0")
    kernels = Kernels()
    kernels.expect(SIGNED, 1 << 40)
    assert kernels.kernel(SIGNED) is None


def test_float64_is_not_compiled(kernels):
    for part in ("base", "result", "wanted"):
        assert kernels.kernel(replace(SIGNED, **{part: "F64"})) is None


def test_without_llvmlite_experts_are_the_same(kernels, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tallstore.loading.decode_llvm", None)
    built = write_bundle(tmp_path / "bundle", torch.float32, torch.float32)
    with tallstore.open_bundle(built.seal()) as bundle:
        assert is_expected(bundle.state_dict("t"), built)
    assert set(kernels._found.values()) == {None}


@pytest.mark.parametrize("fails", [False, True])
def test_a_function_that_is_wrong_is_not_used(kernels, monkeypatch, tmp_path, fails):
    """One bit of one element, or a compiler that fails."""
    from tallstore.loading import decode_llvm  # noqa: PLC0415 - an extra

    decode = decode_llvm.decode

    def wrong(packed):
        if fails:
            raise RuntimeError("no code for this machine")
        decode(packed)
        packed.destinations[0][77] ^= 1

    monkeypatch.setattr(decode_llvm, "decode", wrong)
    built = write_bundle(tmp_path / "bundle", torch.float32, torch.float32)
    with tallstore.open_bundle(built.seal()) as bundle:
        assert is_expected(bundle.state_dict("t"), built)
    assert set(kernels._found.values()) == {None}
