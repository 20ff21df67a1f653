"""Intervals and paired tests of metrics that are functions of how often samples count."""

import math

import numpy as np
import pytest

from tersor.core.resampling import Score, draws, interval, mean_of, paired
from tersor.core.statistics import mcnemar, mean_interval, paired_difference, wilson


def root(parts: np.ndarray) -> Score:
    """Score the root of a mean."""
    return Score(count=parts.size, of=lambda drawn: np.sqrt(drawn @ parts / drawn.sum(1)))


def test_draws_count_as_many_samples_as_there_are_and_repeat() -> None:
    (made,) = draws(50, 200)
    assert made.shape == (200, 50)
    assert (made.sum(1) == 50).all()
    assert made.mean() == 1
    assert np.array_equal(made, next(draws(50, 200)))
    assert not np.array_equal(made, next(draws(50, 200, seed=1)))


def test_draws_are_made_in_parts_that_fit_in_memory() -> None:
    made = list(draws(500_000, 10))
    assert [len(part) for part in made] == [4, 4, 2]


def test_a_draw_is_the_metric_of_the_samples_drawn() -> None:
    parts = np.random.default_rng(0).exponential(size=30)
    drawn = next(draws(30, 5))
    by_rows = [math.sqrt(np.repeat(parts, each.astype(int)).mean()) for each in drawn]
    assert root(parts).of(drawn) == pytest.approx(by_rows)
    assert mean_of(parts).of(drawn) == pytest.approx(np.square(by_rows))


def test_intervals_of_means_are_in_closed_form() -> None:
    right = np.array([1.0] * 18 + [0.0] * 2)
    low, high = wilson(18, 20)
    assert interval(mean_of(right, single=True, percent=True)) == (100 * low, 100 * high)
    losses = np.random.default_rng(0).exponential(size=40)
    assert interval(mean_of(losses)) == pytest.approx(mean_interval(losses))


def test_the_bootstrap_agrees_with_the_closed_form() -> None:
    parts = np.random.default_rng(0).exponential(size=2000)
    low, high = interval(root(parts)) or (0, 0)
    assert (low**2, high**2) == pytest.approx(mean_interval(parts), rel=0.01)


def test_intervals_stay_inside_what_a_metric_can_be() -> None:
    shares = np.array([1.0, 1.0, 1.0, 0.9, 1.0])
    low, high = interval(mean_of(shares, percent=True)) or (0, 0)
    assert low < 98 < high == 100


def test_too_few_samples_have_no_interval_and_no_test() -> None:
    few = np.arange(4.0)
    assert interval(root(few)) is None
    assert paired(root(few), root(few + 1)) is None
    assert interval(mean_of(few[:1])) is None
    assert interval(root(np.arange(5.0))) is not None


def test_answers_are_tested_by_mcnemar() -> None:
    before = np.array([1.0] * 90 + [0.0] * 10)
    after = np.roll(before, 4)
    after[:7] = 0
    found = paired(mean_of(before, single=True), mean_of(after, single=True))
    assert found is not None
    gained, lost = int((after > before).sum()), int((after < before).sum())
    assert found.p == mcnemar(gained, lost)
    value, ends = paired_difference(before, after)
    assert (found.difference, (found.low, found.high)) == (value, ends)


@pytest.mark.parametrize("make", [mean_of, root])
def test_a_true_difference_is_found_and_equal_networks_are_not_told_apart(make) -> None:
    rng = np.random.default_rng(0)
    before = rng.exponential(size=300)
    other = before * np.exp(0.1 * rng.normal(size=300))
    worse = before * 1.05
    same = paired(make(before), make(other / other.mean() * before.mean()))
    assert same is not None
    assert same.verdict("lower") == "no difference"
    assert same.p > 0.05
    found = paired(make(before), make(worse))
    assert found is not None
    assert found.low <= found.difference <= found.high
    assert (found.verdict("lower"), found.verdict("higher")) == ("worse", "better")
    assert found.p < 0.01
    alone = interval(make(before))
    assert alone is not None
    assert found.high - found.low < (alone[1] - alone[0]) / 3  # the same samples: far narrower


def test_errors_of_the_bootstrap_test_are_as_many_as_it_says() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for seed in range(100):
        shared = rng.exponential(size=(2, 60))
        found = paired(root(shared[0]), root(shared[1]), seed)
        assert found is not None
        wrong += found.p <= 0.05
    assert wrong <= 12  # 5 expected; of 100, more than 12 in one of 300 trials


def test_drawing_too_long_is_left_out() -> None:
    parts = np.arange(10.0)
    slow = Score(count=10, of=root(parts).of, resamples=0)
    assert interval(slow) is None
    assert paired(slow, slow) is None
