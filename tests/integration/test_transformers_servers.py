"""Servers that fill models of their own take `Bundle.items` as it is: name and tensor, one at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers

from tallstore.transformers import from_bundle
from tests import vllm_llama
from tests.transformers_models import DTYPES, FAMILIES, TASKS, Family, bytes_of_text, go_offline, llama, pack

TIED = Family(
    lambda: transformers.LlamaForCausalLM(llama(tie_word_embeddings=True)),
    lambda _task: transformers.LlamaForCausalLM(llama(tie_word_embeddings=True)),
    transformers.AutoModelForCausalLM,
    bytes_of_text,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    go_offline(monkeypatch)


@pytest.fixture(scope="module", params=["untied", "tied"])
def packed(request, tmp_path_factory):
    family = TIED if request.param == "tied" else FAMILIES["llama"]
    return pack(family, DTYPES["bfloat16"], tmp_path_factory.mktemp(request.param))


@torch.inference_mode()
def test_a_server_of_fused_weights_answers_as_the_expert_does(packed):
    """In float32, where fused and single products differ by rounding alone; then the next expert, in place."""
    ids = packed.family.batch(torch.float32)["input_ids"]
    with packed.open() as bundle:
        for number, task in enumerate(TASKS):
            expert = from_bundle(bundle, task, dtype="float32")
            if number == 0:
                server = vllm_llama.LlamaForCausalLM(expert.config)
            loaded = server.load_weights(bundle.items(task))
            assert loaded == {name for name, _ in server.named_parameters()}
            torch.testing.assert_close(server(ids), expert(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_is_loaded_is_the_expert_bit_for_bit(packed):
    with packed.open() as bundle:
        config = from_bundle(bundle, "one").config
        server = vllm_llama.LlamaForCausalLM(config).to(torch.bfloat16)
        server.load_weights(bundle.items("one"))
        state = bundle.state_dict("one")
    layer = server.model.layers[1]
    parts = [state[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.self_attn.qkv_proj.weight, torch.cat(parts))
    parts = [state[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.mlp.gate_up_proj.weight, torch.cat(parts))
    assert torch.equal(server.model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_no_more_than_two_tensors_are_in_memory(packed):
    """The one that is rebuilt, and the one before it, which a ``for`` keeps until then."""
    alive = []

    def watched(weights):
        for name, weight in weights:
            alive.append(weakref.ref(weight))
            assert sum(tensor() is not None for tensor in alive) <= 2
            yield name, weight

    with packed.open() as bundle:
        server = vllm_llama.LlamaForCausalLM(from_bundle(bundle, "one").config)
        server.load_weights(watched(bundle.items("one")))
        assert len(alive) == len(bundle.keys("one"))
