"""Tensors as blocks of a model: grouped by what their names begin with, in the order that they suggest."""

from __future__ import annotations

import tallstore
from tallstore.inspecting.shared_vectors import VectorStatistics
from tallstore.reporting.blocks import MOST_BLOCKS, blocks_of, masked_blocks, shared_blocks
from tests.packing_cases import base_model, experts_of, pack


def llama(layers):
    parts = ("input_layernorm", "mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
    return [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        *sorted(f"model.layers.{layer}.{part}.weight" for layer in range(layers) for part in parts),
    ]


def test_layers_stand_in_the_order_of_their_numbers_between_embeddings_and_head():
    blocks = blocks_of(llama(12))
    assert [block.label for block in blocks] == [
        "model.embed_tokens",
        *(f"model.layers.{layer}" for layer in range(12)),
        "lm_head",
        "model.norm",
    ]
    assert sorted(name for block in blocks for name in block.names) == sorted(llama(12))


def test_an_encoder_stands_before_its_decoder():
    names = [
        f"{stack}.block.{layer}.{part}" for stack in ("decoder", "encoder") for layer in range(4) for part in "abcd"
    ]
    assert [block.label for block in blocks_of(names)] == [
        f"{s}.block.{n}" for s in ("encoder", "decoder") for n in range(4)
    ]


def test_few_tensors_are_shown_one_by_one():
    names = llama(2)
    blocks = blocks_of(names)
    assert [block.names for block in blocks] == [(block.label,) for block in blocks]
    assert blocks[0].label == "model.embed_tokens.weight"


def test_of_very_many_blocks_neighbours_are_joined():
    blocks = blocks_of(llama(300))
    assert len(blocks) <= MOST_BLOCKS
    assert blocks[1].label == "model.layers.4 – model.layers.8"
    assert sorted(name for block in blocks for name in block.names) == sorted(llama(300))


def test_blocks_of_nothing_are_none():
    assert blocks_of([]) == ()
    assert shared_blocks([]) == ()


def test_masks_of_a_block_are_the_sums_of_its_tensors(tmp_path, monkeypatch):
    base = {f"layers.{layer}.{name}": tensor for layer in range(2) for name, tensor in base_model().items()}
    packed = pack(base, experts_of(base), tmp_path / "bundle")
    masks = tallstore.open_bundle(packed.root).statistics()
    monkeypatch.setattr("tallstore.reporting.blocks.MOST_TENSORS", 1)
    blocks = masked_blocks(masks)
    assert [block.block.label for block in blocks] == ["layers.0", "layers.1"]
    for block in blocks:
        own = [tensor for tensor in masks.tensors if tensor.name.startswith(block.block.label)]
        assert block.numel == sum(tensor.numel for tensor in own)
        assert block.claimed_by == tuple(map(sum, zip(*(tensor.claimed_by for tensor in own), strict=True)))
        claimed = [sum(tensor.claimed[place] for tensor in own) for place in range(3)]
        assert block.densities == tuple(part / block.numel for part in claimed)
        assert block.density == sum(claimed) / (3 * block.numel)


def test_the_root_mean_square_of_a_block_is_over_all_its_values():
    def vector(tensor, numel, squares):
        return VectorStatistics("g0001", tensor, "merged", "F32", numel, 0, squares, 1.0, ())

    (block, *others) = shared_blocks([vector("a.weight", 10, 40.0), vector("a.weight", 30, 320.0), vector("b", 0, 0.0)])
    assert (block.numel, block.rms) == (40, 3.0)
    assert others == []
