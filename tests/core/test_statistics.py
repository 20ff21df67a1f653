import math
from itertools import product

import numpy as np
import pytest

from tersor.core.statistics import (
    bootstrap,
    half_width,
    judge,
    log_ratio_interval,
    mcnemar,
    mean_interval,
    median_interval,
    paired_difference,
    wilson,
)


def test_log_ratio_interval_agrees_with_plain_loops() -> None:
    rng = np.random.default_rng(3)
    logs = np.cumsum(rng.normal(0, 0.02, 40))  # neighbors are alike: wider than order statistics
    medians = []
    own = np.random.default_rng(9)
    for _ in range(3000):
        resample: list[float] = []
        while len(resample) < 40:
            start = own.integers(40)
            resample += [logs[(start + step) % 40] for step in range(4)]
        medians.append(float(np.median(resample[:40])))
    middle, low, high = log_ratio_interval(logs)
    assert middle == np.median(logs)
    # two Monte-Carlo estimates of the same quantiles, of a statistic that takes few values
    assert low == pytest.approx(np.quantile(medians, 0.025), abs=1e-2)
    assert high == pytest.approx(np.quantile(medians, 0.975), abs=1e-2)


def test_log_ratio_interval_covers_the_truth_in_about_95_of_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        _, low, high = log_ratio_interval(rng.normal(0.0, 0.05, 30), resamples=500)
        covered += low <= 0 <= high
    assert covered >= 278  # 95 % of 300 is 285, less two standard deviations


def test_log_ratio_interval_is_wider_for_alike_neighbors() -> None:
    rng = np.random.default_rng(1)
    independent = rng.normal(0, 1, 400)
    walk = independent.copy()
    for i in range(1, walk.size):
        walk[i] = 0.8 * walk[i - 1] + 0.6 * independent[i]
    _, low, high = log_ratio_interval(walk)
    _, other_low, other_high = log_ratio_interval(np.sort(walk)[rng.permutation(walk.size)])
    assert high - low > 1.3 * (other_high - other_low)


def test_log_ratio_interval_is_decided_by_its_seed() -> None:
    logs = np.sort(np.random.default_rng(2).normal(size=500))  # as alike as neighbors can be
    assert log_ratio_interval(logs, seed=1) == log_ratio_interval(logs, seed=1)
    assert log_ratio_interval(logs, seed=1) != log_ratio_interval(logs, seed=2)


def test_log_ratio_interval_of_many_blocks_is_done_in_pieces() -> None:
    logs = np.random.default_rng(2).normal(size=5000)
    middle, low, high = log_ratio_interval(logs, resamples=900)
    assert low < middle < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / math.sqrt(5000), rel=0.25)


@pytest.mark.parametrize(
    ("ratio", "noise", "min_effect", "verdict"),
    [
        (1.10, 0.01, 0.03, "faster"),
        (1 / 1.10, 0.01, 0.03, "slower"),
        (1.0, 0.01, 0.03, "no difference"),
        (1.02, 0.001, 0.03, "no difference"),
        (1.02, 0.001, 0.0, "faster"),
        (1.10, 2.0, 0.03, "no difference"),
    ],
)
def test_judge_asks_for_significance_and_size(
    ratio: float, noise: float, min_effect: float, verdict: str
) -> None:
    rng = np.random.default_rng(5)
    drift = np.exp(np.cumsum(rng.normal(0, 0.2, 60)))  # the machine gets faster and slower for both
    a_ms = 2.0 * drift * np.exp(rng.normal(0, noise, 60))
    b_ms = 2.0 / ratio * drift * np.exp(rng.normal(0, noise, 60))
    found = judge(a_ms, b_ms, min_effect=min_effect)
    assert found.verdict == verdict
    assert found.blocks == 60
    assert found.low <= found.speedup <= found.high


def test_judge_can_be_recomputed_from_its_samples() -> None:
    rng = np.random.default_rng(5)
    a_ms, b_ms = rng.lognormal(0, 0.02, 40), rng.lognormal(0.1, 0.02, 40)
    found = judge(a_ms, b_ms)
    again = judge(np.array(found.samples["a"]), np.array(found.samples["b"]))
    assert again == found
    assert found.a_ms == np.median(a_ms)
    assert found.stable
    assert not judge(a_ms, rng.lognormal(0, 0.5, 40)).stable


def test_half_width_is_a_share() -> None:
    assert half_width(-math.log(1.02), math.log(1.02)) == pytest.approx(0.02)


def test_median_interval_has_at_least_95_percent_binomial_coverage() -> None:
    for count in (6, 9, 10, 30, 71, 72, 100, 500, 1000):
        values = np.arange(count, dtype=float)
        low, high = median_interval(values)
        assert low == count - 1 - high
        below = int(low)  # the interval misses when at most `below` values are under the median
        logs = [
            math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1)
            for i in range(below + 1)
        ]
        miss = 2 * sum(math.exp(x - count * math.log(2)) for x in logs)
        assert miss <= 0.05
        assert low > 0 or count < 9  # nine values: the range is cut on both sides


def test_median_interval_of_few_values_is_their_range() -> None:
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
    assert median_interval(np.array([4.0])) == (4.0, 4.0)


def test_wilson_matches_published_values() -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_mean_interval_is_the_usual_one() -> None:
    low, high = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx(
        (2 - 1.95996 / math.sqrt(3), 2 + 1.95996 / math.sqrt(3)), abs=1e-4
    )
    assert mean_interval(np.array([1.0])) == (-math.inf, math.inf)


def _pairs(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    before = np.array([1] * both + [0] * gained + [1] * lost + [0] * neither, dtype=float)
    after = np.array([1] * both + [1] * gained + [0] * lost + [0] * neither, dtype=float)
    return before, after


def test_paired_difference_matches_published_values() -> None:
    # Fagerland, Lydersen, Laake, 2014, table: airway hyper-responsiveness, 1 / 1 / 7 / 12, Bonett-Price
    value, (low, high) = paired_difference(*_pairs(1, 1, 7, 12))
    assert value == pytest.approx(-6 / 21)
    assert (low, high) == pytest.approx((-0.508, -0.0138), abs=1e-3)


def test_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    before, after = _pairs(4000, 40, 60, 900)
    value, (low, high) = paired_difference(before, after)
    assert value == pytest.approx(-20 / 5000)
    assert low < value < high
    separate = wilson(before.sum(), 5000)
    assert high - low < 0.5 * (separate[1] - separate[0])


def test_paired_difference_of_equal_networks_contains_zero() -> None:
    before, after = _pairs(90, 0, 0, 10)
    value, (low, high) = paired_difference(before, after)
    assert value == 0
    assert low < 0 < high


def test_paired_difference_of_shares_uses_whole_samples() -> None:
    before = np.array([0.5, 0.75, 1.0, 0.25])
    after = np.array([0.75, 0.75, 1.0, 0.5])
    value, (low, high) = paired_difference(before, after)
    assert value == pytest.approx(0.125)
    assert (low, high) == pytest.approx(mean_interval(after - before))


def test_mcnemar_agrees_with_enumeration() -> None:
    for gained, lost in product(range(7), range(7)):
        total, fewer = gained + lost, min(gained, lost)
        tail = sum(math.comb(total, i) for i in range(fewer + 1)) / 2**total
        assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(2000, 1800) == pytest.approx(0.00125, rel=0.05)


def test_bootstrap_draws_rows_within_range() -> None:
    rows = bootstrap(5, 7, seed=1)
    assert rows.shape == (7, 5)
    assert rows.min() >= 0
    assert rows.max() < 5
    assert (rows == bootstrap(5, 7, seed=1)).all()
