"""One budget over all layers."""

import itertools

import numpy as np

from tersor.ops.ranks import allocate


def brute(losses: list[list[float]], costs: list[list[float]], budget: float) -> float:
    best = np.inf
    for choice in itertools.product(*(range(len(own)) for own in losses)):
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget:
            best = min(best, sum(own[i] for own, i in zip(losses, choice, strict=True)))
    return float(best)


def test_it_is_near_the_best_and_inside_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        costs = [[10.0, *sorted(rng.uniform(0, 10, 4))] for _ in range(5)]
        losses = [[0.0, *sorted(rng.uniform(0, 1, 4), reverse=True)] for _ in range(5)]
        budget = float(rng.uniform(15, 45))
        chosen = allocate(losses, costs, budget)
        best = brute(losses, costs, budget)
        if chosen is None:
            assert best == np.inf
            continue
        assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
        found = sum(own[i] for own, i in zip(losses, chosen, strict=True))
        assert found <= best + 0.5  # one layer's option at most


def test_a_wide_budget_changes_nothing() -> None:
    assert allocate([[0, 0.5], [0, 0.1]], [[4, 1], [4, 1]], 8) == [0, 0]


def test_what_cannot_fit_is_none() -> None:
    assert allocate([[0, 0.5]], [[4, 2]], 1) is None


def test_the_layer_that_loses_least_goes_first() -> None:
    assert allocate([[0, 0.5], [0, 0.1]], [[4, 1], [4, 1]], 5) == [0, 1]
