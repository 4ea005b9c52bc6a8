"""How benchmarks/peers.py stores experts the way others do: what is called exact is, and sizes are those of files."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPES = {"wide": (96, 64), "long": (5000,), "small": (7, 5)}


@pytest.fixture
def stores(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peer_stores")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def expert(request, stores, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for place in ("base", "finetuned"):
        (tmp_path / place).mkdir()
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    finetuned = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    for place, weights in (("base", base), ("finetuned", finetuned)):
        cast = {name: value.to(request.param) for name, value in weights.items()}
        save_file(cast, tmp_path / place / "model.safetensors")
    return stores.Expert(tmp_path / "base", tmp_path / "finetuned", tmp_path / "base")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # zipnn's
@pytest.mark.parametrize(
    ("chosen", "package"),
    [
        (lambda stores: stores.checkpoint(None), None),
        (lambda stores: stores.zstd_file(3), None),
        (lambda stores: stores.zstd_patch(3), None),
        (lambda stores: stores.zstd_xor(3), None),
        (lambda stores: stores.hub_chunks, None),
        (lambda stores: stores.in_format(stores.ZIPNN), "zipnn"),
        (lambda stores: stores.fireworks, "fireworks_delta_compression"),
    ],
    ids=["checkpoint", "zstd", "patch", "xor", "hub", "zipnn", "fireworks"],
)
def test_lossless_ways_return_every_bit(stores, expert, tmp_path, chosen, package):
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    stored = chosen(stores)(expert, tmp_path)
    truth = load_file(expert.finetuned_file)
    assert stored.weights.keys() == truth.keys()
    for tensor, value in truth.items():
        assert stored.weights[tensor].dtype == value.dtype
        assert torch.equal(stored.weights[tensor], value), tensor
    assert 0 < stored.nbytes <= expert.finetuned_file.stat().st_size + 4096


def test_what_an_expert_shares_with_its_base_is_cheap_where_it_is_claimed(stores, expert, tmp_path):
    same = stores.Expert(expert.base, expert.base, expert.base)
    whole = expert.base_file.stat().st_size
    for name in ("zstd_patch", "zstd_xor"):
        (tmp_path / name).mkdir()
        assert getattr(stores, name)(3)(same, tmp_path / name).nbytes < whole / 50
    assert stores.hub_chunks(same, tmp_path).nbytes == 0
    assert stores.hub_chunks(expert, tmp_path).nbytes > whole - stores.XET_CHUNK


def test_bitdelta_is_its_formula(stores, expert, tmp_path):
    stored = stores.bitdelta(expert, tmp_path)
    base, truth = load_file(expert.base_file), load_file(expert.finetuned_file)
    for name in ("wide", "long"):
        task_vector = truth[name].float() - base[name].float()
        moved = torch.where(task_vector > 0, task_vector.abs().mean(), -task_vector.abs().mean())
        assert torch.equal(stored.weights[name], (base[name].float() + moved).to(base[name].dtype)), name
    assert torch.equal(stored.weights["small"], truth["small"])
    assert stored.nbytes == (tmp_path / "signs.safetensors").stat().st_size


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(stores):
    peer = stores.Peer("Nobody's", "surely-not-a-package-that-is-installed", stores.hub_chunks)
    assert peer.missing() == (
        "Nobody's: skipped, surely-not-a-package-that-is-installed is not installed"
        " (pip install surely-not-a-package-that-is-installed)"
    )
    assert all(peer.missing() is None for peer in stores.peers("float32") if peer.package in {None, "zstandard"})
