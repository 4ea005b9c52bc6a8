"""Experts loaded over several processes, each of which reads its own slices."""

from __future__ import annotations

import sys

import pytest

from tests import distributed_ranks as ranks
from tests.distributed_bundles import write_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo's loopback interface is called lo on Linux")

FOR_ANY_NUMBER = [
    ranks.shards_of_every_form,
    ranks.shards_of_several_chunks,
    ranks.shards_of_another_dtype,
    ranks.plain_tensors_beside_shards,
    ranks.model_of_fsdp2,
    ranks.model_of_tensor_parallel_layers,
]
FOR_FOUR = [*FOR_ANY_NUMBER, ranks.shards_of_a_mesh, ranks.model_of_both, ranks.model_of_replicas]
REFUSALS = [ranks.refusal_of_a_name, ranks.refusal_of_a_shape, ranks.refusal_of_changed_bytes]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    write_all(root)
    return root


@pytest.fixture(scope="module")
def two(bundles):
    return ranks.run_ranks(2, [*FOR_ANY_NUMBER, ranks.bytes_of_rows_and_columns, *REFUSALS], bundles)


@pytest.fixture(scope="module")
def four(bundles):
    return ranks.run_ranks(4, [*FOR_FOUR, ranks.bytes_of_rows_and_columns, ranks.refusal_of_changed_bytes], bundles)


@pytest.mark.parametrize("case", [case.__name__ for case in FOR_ANY_NUMBER])
def test_two_ranks_have_their_slices(two, case):
    assert [rank[case] for rank in two] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case.__name__ for case in FOR_FOUR])
def test_four_ranks_have_their_slices(four, case):
    assert [rank[case] for rank in four] == [[]] * 4


def test_a_rank_reads_its_share_of_rows_and_no_column_twice(two):
    check_shares(two, 2)


@pytest.mark.slow
def test_of_four_ranks_each_reads_a_quarter(four):
    check_shares(four, 4)


def check_shares(found, count):
    for rank in found:
        shares = rank["bytes_of_rows_and_columns"]
        assert shares["rows"] == pytest.approx(1 / count, rel=0.02)
        assert shares["columns"] == pytest.approx(1, rel=0.001)  # every chunk once


def test_a_name_or_a_shape_that_the_expert_lacks_is_said(two):
    for rank in two:
        message, reasons = rank["refusal_of_a_name"]
        assert "msak" in message
        assert sorted(reasons) == [0, 1]
        message, _ = rank["refusal_of_a_shape"]
        assert "mask" in message
        assert "[9, 14]" in message
        assert "[3]" in message


def test_every_rank_learns_what_one_rank_found_changed(two):
    check_changed(two, last=1)


@pytest.mark.slow
def test_four_ranks_learn_it_too(four):
    check_changed(four, last=3)


def check_changed(found, last):
    for rank in found:
        message, reasons = rank["refusal_of_changed_bytes"]
        assert list(reasons) == [last]
        assert reasons[last].startswith("IntegrityError: tasks/t/mask-")
        assert "[IDX-3]" in message
