"""Which candidate each tensor gets under a budget: against all that could have been chosen."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallstore.packing.automatic import Choice, choose

CHOICE = st.builds(Choice, st.integers(1, 40).map(float), st.integers(0, 40).map(float))
OPTIONS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=4)


def total(options, chosen):
    taken = [candidates[place] for candidates, place in zip(options, chosen, strict=True)]
    return sum(choice.nbytes for choice in taken), sum(choice.damage for choice in taken)


@given(OPTIONS, st.integers(0, 160).map(float))
def test_a_budget_is_kept_and_nothing_of_the_same_cost_is_much_better(options, budget):
    chosen = choose(options, budget)
    every = [total(options, places) for places in itertools.product(*(range(len(found)) for found in options))]
    possible = [(cost, damage) for cost, damage in every if cost <= budget]
    if chosen is None:
        assert not possible
        return
    cost, damage = total(options, chosen)
    assert cost <= budget
    # The last step that did not fit is all that is lost: one tensor's whole range of damage bounds it.
    slack = max(max(c.damage for c in found) - min(c.damage for c in found) for found in options)
    assert damage <= min(found for _, found in possible) + slack


def test_what_costs_more_and_is_no_truer_is_never_taken():
    options = [[Choice(1.0, 5.0), Choice(2.0, 5.0), Choice(3.0, 1.0)]]
    assert choose(options, 2.5) == [0]
    assert choose(options, 3.0) == [2]


def test_the_budget_goes_where_a_byte_saves_most():
    options = [[Choice(1.0, 10.0), Choice(2.0, 9.0)], [Choice(1.0, 10.0), Choice(2.0, 1.0)]]
    assert choose(options, 3.0) == [0, 1]


@pytest.mark.parametrize("budget", [0.0, 1.9])
def test_a_budget_that_nothing_fits_is_none(budget):
    assert choose([[Choice(1.0, 1.0)], [Choice(1.0, 1.0)]], budget) is None
