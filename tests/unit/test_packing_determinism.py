"""The same inputs give the same files under every method: twice, and whatever the number of threads."""

from __future__ import annotations

import pytest
import torch

import tallstore
from tests.packing_cases import METHODS, contents, experts_of, forced, normal

BASE = {
    "rows": normal(400, 130, seed=1),  # large enough for torch to split a sum over it between threads
    "short": normal(300, 20, seed=2),
    "vector": normal(5003, seed=3),
    "bias": normal(7, seed=4),
}
EXPERTS = experts_of(BASE, 3)


@pytest.fixture
def threads():
    """Sets how many threads torch may use, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", METHODS)
def test_files_do_not_depend_on_the_run_nor_on_the_number_of_threads(tmp_path, monkeypatch, threads, name):
    """Many tiles, and tensors that several threads work at."""
    forced(monkeypatch, tile=6000, smallest_tile=1000)
    found = []
    for number, count in enumerate((1, 3, 3)):
        threads(count)
        tallstore.pack(BASE, EXPERTS, tmp_path / str(number), method=METHODS[name])
        assert torch.get_num_threads() == count
        found.append(contents(tmp_path / str(number)))
    assert found[0]
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("name", ["emr published", "tall ties", "localize"])
def test_nor_do_sums_over_whole_tensors(tmp_path, threads, name):
    """Where one tile is all of a tensor."""
    found = []
    for count in (1, 3):
        threads(count)
        tallstore.pack(BASE, EXPERTS, tmp_path / str(count), method=METHODS[name])
        found.append(contents(tmp_path / str(count)))
    assert found[0] == found[1]
