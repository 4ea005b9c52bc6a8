"""A small vision transformer in plain torch: patches, pre-norm blocks, mean pooling, a linear head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `VisionTransformer`, about 300,000 parameters of which 98 % are in matrices worth a mask."""

    num_labels: int
    image_size: int = 8
    patch_size: int = 4
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 192

    @property
    def num_patches(self) -> int:
        """Patches of an image, which are the tokens that the transformer sees."""
        return (self.image_size // self.patch_size) ** 2

    def to_json(self) -> dict[str, Any]:
        """Return what goes into a checkpoint's ``config.json``."""
        return {"architectures": ["VisionTransformer"], "model_type": "tallstore-demo", **dataclasses.asdict(self)}


class Block(nn.Module):
    """Attention, then a multilayer perceptron, each added to its normalised input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [images, tokens, width] to tokens of the same shape."""
        images, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(images, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(mixed.transpose(1, 2).reshape(images, tokens, width))
        return cast("Tensor", x + self.down(functional.gelu(self.up(self.mlp_norm(x)))))


class VisionTransformer(nn.Module):
    """Images in, logits out; the body's names are the same whatever the number of labels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_size**2, config.hidden_size)
        self.position = nn.Parameter(0.02 * torch.randn(config.num_patches, config.hidden_size))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.num_hidden_layers)))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, size, size] to logits [n, labels]."""
        size, patch = self.config.image_size, self.config.patch_size
        grid = images.view(-1, size // patch, patch, size // patch, patch).transpose(2, 3)
        tokens = self.embed(grid.reshape(-1, self.config.num_patches, patch**2)) + self.position
        return cast("Tensor", self.head(self.norm(self.blocks(tokens)).mean(dim=1)))
