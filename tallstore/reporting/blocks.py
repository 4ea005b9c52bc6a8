"""Tensors as blocks of a model, in the order in which it most likely applies them: what an axis has room for.

A bundle knows its tensors by name alone, sorted as text. Names tell more: of a stack of layers they bear numbers, and
what embeds stands before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tallstore.inspecting.shared_vectors import VectorStatistics
from tallstore.inspecting.statistics import Statistics, TensorStatistics

MOST_TENSORS: Final = 24
"""So many tensors are shown one by one; more of them, by block."""
MOST_BLOCKS: Final = 64
"""More blocks are joined, neighbours with neighbours."""

_PARTS_OF_A_NAME: Final = 2  # of a tensor that stands in no stack of layers
_FIRST: Final = re.compile(r"embed|\bw[tp]e\b|\bpos_|\bcls_token|patch|\bstem\b|\bconv1\b", re.IGNORECASE)
_NUMBER: Final = re.compile(r"(?:^|\.)\d+(?=\.|$)")
_DIGITS: Final = re.compile(r"(\d+)")
_SECOND_STACK: Final = re.compile(r"\bdecoder\b", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """Tensors that stand together.

    Attributes:
        label: what their names begin with.
        names: theirs, in the order of the model.
    """

    label: str
    names: tuple[str, ...]


def blocks_of(names: Sequence[str]) -> tuple[Block, ...]:
    """The blocks of a model whose tensors have *names*, in its order: each tensor one, where they are few."""
    ordered = sorted(names, key=_place)
    if len(ordered) <= MOST_TENSORS:
        return tuple(Block(name, (name,)) for name in ordered)
    grouped: dict[str, list[str]] = {}
    for name in ordered:
        grouped.setdefault(_prefix(name), []).append(name)
    found = [Block(label, tuple(members)) for label, members in grouped.items()]
    step = math.ceil(len(found) / MOST_BLOCKS)
    return tuple(_joined(found[begin : begin + step]) for begin in range(0, len(found), step))


def _joined(blocks: Sequence[Block]) -> Block:
    first, last = blocks[0], blocks[-1]
    label = first.label if first is last else f"{first.label} – {last.label}"
    return Block(label, tuple(name for block in blocks for name in block.names))


def _prefix(name: str) -> str:
    """What the names of a block have in common: up to the layer's number, or the first parts."""
    number = _NUMBER.search(name)
    if number is not None:
        return name[: number.end()]
    module = name.rpartition(".")[0] or name
    return ".".join(module.split(".")[:_PARTS_OF_A_NAME])


def _place(name: str) -> tuple[int, bool, list[tuple[int, str]]]:
    """Where a tensor stands in its model: what embeds, stacks of layers, what follows; numbers as numbers."""
    number = _NUMBER.search(name)
    head = name if number is None else name[: number.start()]
    stands = 1 if number is not None else 2
    parts = [(int(part), "") if part.isdecimal() else (0, part) for part in _DIGITS.split(name)]
    return 0 if _FIRST.search(head) else stands, bool(_SECOND_STACK.search(head)), parts


@dataclass(frozen=True)
class MaskedBlock(TensorStatistics):
    """The masks over a block, counted as over one tensor of its name.

    Attributes:
        block: its tensors.
    """

    block: Block

    @property
    def density(self) -> float | None:
        """Over all tasks."""
        whole = sum(self.weights)
        return sum(self.claimed) / whole if whole else None


def masked_blocks(masks: Statistics) -> tuple[MaskedBlock, ...]:
    """The tensors that were counted, by block."""
    by_name = {tensor.name: tensor for tensor in masks.tensors}
    return tuple(
        _masked(block, [by_name[name] for name in block.names], len(masks.tasks)) for block in blocks_of(list(by_name))
    )


def _masked(block: Block, tensors: Sequence[TensorStatistics], tasks: int) -> MaskedBlock:
    claimed, weights = np.zeros((2, tasks), np.int64)
    claimed_by = np.zeros(tasks + 1, np.int64)
    for tensor in tensors:
        claimed += tensor.claimed
        weights += tensor.weights
        claimed_by += tensor.claimed_by
    return MaskedBlock(
        name=block.label,
        block=block,
        numel=sum(tensor.numel for tensor in tensors),
        claimed=tuple(claimed.tolist()),
        weights=tuple(weights.tolist()),
        claimed_by=tuple(claimed_by.tolist()),
    )


@dataclass(frozen=True)
class SharedBlock:
    """The shared vectors over a block, of all groups and roles that they are given for.

    Attributes:
        block: its tensors.
        numel: values.
        rms: root of their mean square.
    """

    block: Block
    numel: int
    rms: float


def shared_blocks(vectors: Sequence[VectorStatistics]) -> tuple[SharedBlock, ...]:
    """The vectors by block; blocks without any value are left out."""
    numel: dict[str, int] = {}
    squares: dict[str, float] = {}
    for vector in vectors:
        numel[vector.tensor] = numel.get(vector.tensor, 0) + vector.numel
        squares[vector.tensor] = squares.get(vector.tensor, 0.0) + vector.sum_of_squares
    found = []
    for block in blocks_of(list(numel)):
        values = sum(numel[name] for name in block.names)
        if values:
            mean = math.fsum(squares[name] for name in block.names) / values
            found.append(SharedBlock(block, values, math.sqrt(mean)))
    return tuple(found)
