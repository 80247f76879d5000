"""The assignment against brute force."""

import itertools

import numpy as np
import pytest

from cdetr_jax.matching.assign import NonFiniteCostError, assign


def brute_force(cost):
    """The least sum of costs over all ways to give every target its own query (or every query its own target)."""
    queries, targets = cost.shape
    if targets > queries:
        return brute_force(cost.T)
    ways = itertools.permutations(range(queries), targets)
    return min(sum(cost[q, t] for t, q in enumerate(way)) for way in ways)


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_cheapest(seed):
    rng = np.random.default_rng(seed)
    counts = [3, 0, 2, 1]
    cost = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    valid = np.arange(3)[None, :] < np.array(counts)[:, None]
    queries = assign(cost, valid)
    assert queries.dtype == np.int32
    assert queries.shape == (2, 4, 3)
    for layer, image in np.ndindex(2, 4):
        n = counts[image]
        chosen = queries[layer, image, :n]
        assert len(set(chosen)) == n
        assert (chosen >= 0).all()
        total = cost[layer, image, chosen, np.arange(n)].sum()
        np.testing.assert_allclose(total, brute_force(cost[layer, image, :, :n]), rtol=1e-6, atol=1e-6)
        assert (queries[layer, image, n:] == -1).all()


def test_a_literal_problem_where_greedy_is_wrong():
    # Taking the cheapest pair first (query 0, target 0, cost 1) leaves 100 for the other: 101. The best is 2 + 3.
    cost = np.array([[[[1.0, 2.0], [3.0, 100.0], [50.0, 60.0]]]])
    np.testing.assert_array_equal(assign(cost, np.ones((1, 2), bool)), [[[1, 0]]])


def test_costs_of_padded_targets_are_not_read():
    cost = np.array([[[[5.0, -100.0, np.nan], [4.0, -100.0, np.inf]]]])
    np.testing.assert_array_equal(assign(cost, np.array([[True, False, False]])), [[[1, -1, -1]]])


def test_more_targets_than_queries():
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(1, 1, 2, 5))
    queries = assign(cost, np.ones((1, 5), bool))[0, 0]
    assert sorted(queries) == [-1, -1, -1, 0, 1]
    matched = queries >= 0
    total = cost[0, 0, queries[matched], np.flatnonzero(matched)].sum()
    np.testing.assert_allclose(total, brute_force(cost[0, 0]))


@pytest.mark.parametrize("columns", [0, 3])
def test_no_targets(columns):
    queries = assign(np.zeros((2, 3, 5, columns)), np.zeros((3, columns), bool))
    np.testing.assert_array_equal(queries, np.full((2, 3, columns), -1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_cost_names_layer_and_row(value):
    cost = np.zeros((5, 3, 7, 2))
    cost[3, 1, 4, 1] = value
    with pytest.raises(NonFiniteCostError, match=r"decoder layer 3 is not finite in row 1 of the batch") as error:
        assign(cost, np.ones((3, 2), bool))
    assert (error.value.layer, error.value.image) == (3, 1)
    assert isinstance(error.value, FloatingPointError)


def test_real_targets_must_come_first():
    with pytest.raises(AssertionError, match="real targets must come first"):
        assign(np.zeros((1, 1, 3, 2)), np.array([[False, True]]))
