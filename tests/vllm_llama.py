"""A Llama as vLLM builds and fills it: fused weights, which `load_weights` makes of a checkpoint's single ones.

`load_weights` follows vLLM's of LlamaModel and of its AutoWeightsLoader: stacked names are looked for first, each
parameter's own ``weight_loader`` puts a shard into its part, and weights are taken one at a time from any iterable.
The arithmetic is plain, on one device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

STACKED = (  # of the module, of the checkpoint, which part
    (".qkv_proj", ".q_proj", "q"),
    (".qkv_proj", ".k_proj", "k"),
    (".qkv_proj", ".v_proj", "v"),
    (".gate_up_proj", ".gate_proj", 0),
    (".gate_up_proj", ".up_proj", 1),
)


class FusedLinear(nn.Linear):
    """Several projections of one input in one weight, [sum of *sizes*, width]."""

    def __init__(self, width: int, sizes: dict[str | int, int]) -> None:
        super().__init__(width, sum(sizes.values()), bias=False)
        self.sizes = sizes
        self.weight.weight_loader = self.load_part

    def load_part(self, parameter: nn.Parameter, loaded: Tensor, part: str | int) -> None:
        start = 0
        for name, size in self.sizes.items():
            if name == part:
                destination = parameter.data.narrow(0, start, size)
                assert destination.shape == loaded.shape
                destination.copy_(loaded)
            start += size

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        return super().forward(states).split(list(self.sizes.values()), dim=-1)


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.empty(width)), epsilon

    def forward(self, states: Tensor) -> Tensor:
        variance = states.pow(2).mean(-1, keepdim=True)
        return self.weight * (states * torch.rsqrt(variance + self.epsilon))


class Attention(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.heads, self.shared, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sizes = {"q": self.heads * self.size, "k": self.shared * self.size, "v": self.shared * self.size}
        self.qkv_proj = FusedLinear(config.hidden_size, sizes)
        self.o_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)
        self.theta = config.rope_parameters["rope_theta"]

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        query, key, value = (part.view(batch, length, -1, self.size).transpose(1, 2) for part in self.qkv_proj(states))
        query, key = self.rotated(query), self.rotated(key)
        groups = self.heads // self.shared
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))

    def rotated(self, heads: Tensor) -> Tensor:
        frequencies = 1.0 / self.theta ** (torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.outer(torch.arange(heads.shape[2]).float(), frequencies).repeat(1, 2)
        left, right = heads.chunk(2, dim=-1)
        return heads * angles.cos() + torch.cat((-right, left), dim=-1) * angles.sin()


class Mlp(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(config.hidden_size, dict.fromkeys((0, 1), config.intermediate_size))
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(states)
        return self.down_proj(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states))
        return states + self.mlp(self.post_attention_layernorm(states))


class LlamaForCausalLM(nn.Module):
    """A model whose memory is there before its weights are."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))  # what is not loaded shows

    def forward(self, ids: Tensor) -> Tensor:
        states = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            states = layer(states)
        return self.lm_head(self.model.norm(states))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Put a checkpoint's weights where they belong; the names of the parameters that got some."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        loaded = set()
        for checkpoint_name, weight in weights:
            if "rotary_emb.inv_freq" in checkpoint_name:
                continue
            if self.config.tie_word_embeddings and checkpoint_name.startswith("lm_head."):
                continue
            for fused, single, part in STACKED:
                if single in checkpoint_name:
                    name = checkpoint_name.replace(single, fused)
                    parameters[name].weight_loader(parameters[name], weight, part)
                    break
            else:
                name = checkpoint_name
                load_default(parameters[name], weight)
            loaded.add(name)
        return loaded


def load_default(parameter: nn.Parameter, loaded: Tensor) -> None:
    """vLLM's default_weight_loader."""
    assert parameter.shape == loaded.shape
    parameter.data.copy_(loaded)
