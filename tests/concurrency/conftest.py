"""Bundles that many load from at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tallstore
from tests.concurrency.loads import state_dict
from tests.faults.bundles import large_inputs
from tests.faults.specimens import every_kind


@dataclass(frozen=True)
class Sound:
    """A bundle, and the digest of each expert as one thread loads it."""

    path: Path
    base: Path | None
    expected: Mapping[str, str]

    def open(self, **options: object) -> tallstore.Bundle:
        """A bundle that nothing was read of yet."""
        return tallstore.open_bundle(self.path, base=self.base, **options)


def sound(path: Path, base: Path | None) -> Sound:
    with tallstore.open_bundle(path, base=base) as bundle:
        return Sound(path, base, {task: state_dict(bundle, task) for task in bundle.tasks})


@pytest.fixture(scope="session")
def kinds(tmp_path_factory) -> Sound:
    """Every kind of tensor, all small."""
    return sound(every_kind(tmp_path_factory.mktemp("kinds") / "bundle", None).seal(), None)


@pytest.fixture(scope="session")
def chunks(tmp_path_factory) -> Sound:
    """Tensors of several chunks beside a base in a file of its own, which is mapped."""
    root = tmp_path_factory.mktemp("chunks")
    base, experts = large_inputs(root, tensors=1, numel=(1 << 20) + 1024)
    tallstore.pack(base, experts, root / "bundle", method=tallstore.TallMask())
    return sound(root / "bundle", base)


@pytest.fixture(params=["kinds", "chunks"])
def bundle_of_either(request) -> Sound:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[1, 2], ids=["one intra-op thread", "two"])
def intra_op_threads(request):
    """How many threads torch may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
