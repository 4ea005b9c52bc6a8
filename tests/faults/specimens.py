"""Sound bundles whose bytes fault tests change for a moment."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tallstore
from tallstore.errors import TallstoreError
from tests.bundle_builder import Bundle, Group, Task
from tests.faults.bundles import Weights, load, protected_files, same
from tests.faults.regions import Region, traced
from tests.packing_cases import normal

SHAPE = (7, 5)
NUMEL = math.prod(SHAPE)


@dataclass(frozen=True)
class Specimen:
    """A sound bundle.

    Attributes:
        path: the bundle.
        base: what loading it needs; None where the base is embedded.
        weights: of every task.
        content: the bytes of every file that may not change, by its path in the bundle.
        turns: at most how many bytes of a file the ordinary run looks at; more than its files have is all of them.
    """

    path: Path
    base: Path | None
    weights: Weights
    content: Mapping[str, bytes]
    turns: int

    def positions(self, path: str) -> range:
        """The bytes of a file that the ordinary run looks at."""
        nbytes = len(self.content[path])
        return range(0, nbytes, math.ceil(nbytes / self.turns))

    @contextlib.contextmanager
    def changed(self, contents: Mapping[str, bytes]) -> Iterator[None]:
        """Other contents in the files at these paths, until the block ends."""
        try:
            for path, content in contents.items():
                self._write(path, content)
            yield
        finally:
            for path in contents:
                self._write(path, self.content[path])

    @contextlib.contextmanager
    def patched(self, path: str, start: int, data: bytes) -> Iterator[None]:
        """Other bytes from *start* on in one file, which may be large, until the block ends."""
        try:
            self._put(path, start, data)
            yield
        finally:
            self._put(path, start, self.content[path][start : start + len(data)])

    def _put(self, path: str, start: int, data: bytes) -> None:
        with (self.path / path).open("r+b") as file:
            file.seek(start)
            file.write(data)

    def _write(self, path: str, content: bytes) -> None:
        file = self.path / path
        if not file.exists() or file.stat().st_size != len(content):
            file.write_bytes(content)
            return
        # File systems flush what is truncated and written anew: a thousand times slower.
        with file.open("r+b") as opened:
            opened.write(content)

    def outcomes(self, tasks: Iterable[str] | None = None) -> dict[str, str]:
        """What loading each task comes to: "refused", by a typed error, or "the same"; never other weights."""
        tasks = self.weights if tasks is None else tasks
        try:
            opened = tallstore.open_bundle(self.path, base=self.base)
        except TallstoreError:
            return dict.fromkeys(tasks, "refused")
        with opened:
            return {task: self.outcome(opened, task) for task in tasks}

    def outcome(self, bundle: tallstore.Bundle, task: str) -> str:
        """The same, of one task."""
        try:
            weights = bundle.state_dict(task)
        except TallstoreError:
            return "refused"
        assert same({task: weights}, {task: self.weights[task]}), "other weights, and no error"
        return "the same"


def specimen_of(path: Path, base: Path | None, turns: int = 0) -> Specimen:
    """A bundle that is there."""
    assert tallstore.verify(path) == []
    content = {file.relative_to(path).as_posix(): file.read_bytes() for file in protected_files(path)}
    return Specimen(path, base, load(path, base), content, turns)


def specimen(root: Path, inputs: tuple[Path, Mapping[str, Path]], turns: int, **options: Any) -> Specimen:
    """A bundle that is packed in *root*."""
    path = root / "bundle"
    tallstore.pack(*inputs, path, **options)
    return specimen_of(path, None if (path / "base").exists() else inputs[0], turns)


def readers(bundle: Specimen) -> dict[str, set[str]]:
    """The tasks whose load reads a file, as it is seen to read, by path."""
    found: dict[str, set[str]] = {path: set() for path in bundle.content}
    for task in bundle.weights:
        with traced(bundle.path) as reads, tallstore.open_bundle(bundle.path, base=bundle.base) as opened:
            opened.state_dict(task)
        for path, content in bundle.content.items():
            if reads.reads(Region(path, 0, len(content), "")):
                found[path].add(task)
    return found


def every_kind(root: Path, codec: str | None, seed: int = 3) -> Bundle:
    """Three tasks of two groups, which have every kind of tensor, each number of bits and most dtypes; not sealed.

    Args:
        root: the bundle's place.
        codec: of all payloads; None pools them, all being small.
        seed: of all numbers; names, shapes and sizes are the same.
    """
    random_ = np.random.default_rng(seed)
    float32 = dict.fromkeys(("mask", "signed", "two-level", "sign", "rows", "sixteen", "head", "gone"), torch.float32)
    dtypes = {**float32, "sparse": torch.bfloat16, "three": torch.float16, "centred": torch.float64}
    base = {name: normal(*SHAPE, seed=100 * seed + n).to(dtype) for n, (name, dtype) in enumerate(dtypes.items())}
    base["positions"] = torch.arange(6)
    first, second = Group(root, base, 1, codec), Group(root, base, 2, codec)
    first.vector("mask", "I8", random_.integers(-127, 128, NUMEL), steps=[2.0**-8] * 7)
    first.vector("signed", "LOG4", random_.integers(0, 16, NUMEL), steps=[2.0**-8] * 7)
    first.vector("two-level", "F32", random_.standard_normal(NUMEL))
    first.vector("two-level", "BF16", random_.standard_normal(NUMEL), role="merged_lo")
    first.vector("centred", "F16", random_.standard_normal(NUMEL), role="centre")
    first.vector("head", "BF16", random_.standard_normal(NUMEL))
    second.vector("mask", "F16", random_.standard_normal(NUMEL))
    tasks = [Task(group, name, codec) for name, group in (("all", first), ("few", first), ("apart", second))]
    everything, few, apart = tasks
    bits, fields = random_.permutation(np.arange(NUMEL) % 2), random_.integers(-1, 2, NUMEL)
    everything.mask("mask", bits, gains=[1.5] * 7)
    everything.signed("signed", fields)
    everything.coded("two-level", "two-level", bits, gain=0.5)
    everything.coded("sign", "sign", bits, gain=2.0**-6)
    everything.coded("sign", "rows", bits, gains=[2.0**-6] * 7)
    everything.coded("sparse", "sparse", bits, own=random_.standard_normal(bits.sum()), values_dtype="F16")
    everything.coded("uniform", "three", random_.integers(0, 3, NUMEL), levels=3, gain=2.0**-6)
    everything.coded("uniform", "sixteen", random_.integers(0, 16, NUMEL), levels=16, gain=2.0**-6)
    everything.coded("uniform", "centred", random_.integers(0, 4, NUMEL), levels=4, gain=2.0**-6)
    everything.extended("head", "mask", normal(2, 5, seed=20 * seed), 7, bits, gain=0.5)
    everything.private("own", normal(3, 4, seed=21 * seed).double())
    everything.private("flags", torch.tensor([True, False, True]))
    everything.same("positions")
    everything.alias("tied", "mask")
    everything.dropped("gone")
    few.mask("mask", 1 - bits)
    few.same("sign")
    few.private("sparse", normal(*SHAPE, seed=22 * seed).bfloat16())
    apart.mask("mask", bits)
    apart.private("whole", torch.arange(9) * seed)
    return Bundle(root, base, [first, second], tasks)


def chance(seed: int) -> random.Random:
    """Chance that is the same in every run."""
    return random.Random(seed)  # noqa: S311 - nothing is kept secret by it


def flipped(content: bytes, position: int, generator: random.Random, bit: int | None = None) -> bytes:
    """*content* with one bit of the byte at *position* changed, any if none is named: the least that can happen."""
    mask = 1 << (generator.randrange(8) if bit is None else bit)
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]
