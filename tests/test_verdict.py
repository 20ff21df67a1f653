import dataclasses

import pytest

from tersor.core.errors import RecipeError
from tersor.core.goal import Goal
from tersor.core.metric import Measurement
from tersor.core.statistics import Comparison
from tersor.verdict import Evidence, check_limits, judge


def latency(ms: float) -> Measurement:
    return Measurement(metric="latency", value=ms, unit="ms", better="lower", spread=(ms, ms))


def accuracy(percent: float) -> Measurement:
    spread = (percent - 2, percent + 2)
    return Measurement(metric="accuracy", value=percent, unit="%", better="higher", spread=spread)


def size(count: float) -> Measurement:
    return Measurement(metric="size", value=count, unit="B", better="lower")


def contest(speedup: float, verdict: str) -> Comparison:
    return Comparison(
        speedup=speedup,
        low=speedup * 0.99,
        high=speedup * 1.01,
        verdict=verdict,
        min_effect=0.01,
        blocks=30,
        a_ms=1.0,
        b_ms=1.0 / speedup,
        stable=True,
        samples={"a": [], "b": []},
        how="",
    )


def by_name(*measurements: Measurement) -> dict[str, Measurement]:
    return {m.metric: m for m in measurements}


GOAL = Goal(best="latency", limits={"accuracy": "-1pt"})


def evidence(*, speed=("faster", 2.0), before=90.0, after=90.0, unchanged=False, difference=0.0):
    return Evidence(
        original=by_name(latency(1.0), accuracy(90.0)),
        before=by_name(latency(1.0), accuracy(before)),
        after=by_name(latency(1.0 / speed[1]), accuracy(after)),
        contest=contest(speed[1], speed[0]),
        unchanged=unchanged,
        quality={"accuracy": (difference, difference - 0.5, difference + 0.5)},
    )


def test_faster_inside_the_limit_is_kept():
    found = judge(GOAL, evidence(after=89.2, difference=-0.8))
    assert found.keep
    assert found.reason == "2.00x faster [1.98, 2.02], 1.000 -> 0.500 ms"


def test_a_broken_limit_is_rejected_and_a_weaker_try_may_help():
    found = judge(GOAL, evidence(after=88.9, difference=-1.1))
    assert not found.keep
    assert found.too_strong
    assert found.reason == (
        "breaks the limit accuracy=-1pt: accuracy 90.00 % -> 88.90 %, limit 89.00 %"
    )


def test_exactly_at_the_limit_holds():
    assert judge(GOAL, evidence(after=89.0, difference=-1.0)).keep


def test_no_difference_buys_nothing():
    found = judge(GOAL, evidence(speed=("no difference", 1.0)))
    assert not found.keep
    assert not found.too_strong
    assert found.reason.startswith("bought nothing: 1.00x as fast")


def test_slower_is_dropped_even_with_the_same_outputs():
    found = judge(GOAL, evidence(speed=("slower", 0.8), unchanged=True))
    assert not found.keep
    assert found.reason == "bought nothing: 0.80x as fast (slower) [0.79, 0.81], 1.000 -> 1.250 ms"


def test_preparation_is_kept():
    found = judge(GOAL, evidence(speed=("no difference", 1.0), unchanged=True))
    assert found.keep
    assert found.reason == "preparation: outputs are unchanged and nothing got worse"


def test_better_quality_beyond_the_noise_is_kept():
    assert judge(GOAL, evidence(speed=("no difference", 1.0), after=91.0, difference=1.0)).keep
    assert not judge(GOAL, evidence(speed=("no difference", 1.0), after=90.3, difference=0.3)).keep


def test_a_limit_not_reached_may_not_move_away_and_counts_as_gain():
    goal = Goal(best="latency", limits={"size": "50"})

    def seen(after: float, verdict: str) -> Evidence:
        return Evidence(
            original=by_name(latency(1.0), size(100)),
            before=by_name(latency(1.0), size(80)),
            after=by_name(latency(1.0), size(after)),
            contest=contest(1.0, verdict),
        )

    assert judge(goal, seen(60, "no difference")).reason == "size 80 B -> 60 B"
    away = judge(goal, seen(90, "faster"))
    assert not away.keep
    assert away.reason == "moves away from the limit size=50: size 80 B -> 90 B, limit 50 B"
    assert judge(goal, seen(80.01, "faster")).keep


def test_points_on_a_size_are_refused():
    goal = Goal(best="size", limits={"size": "-1pt"})
    seen = Evidence(original=by_name(size(9)), before=by_name(size(9)), after=by_name(size(8)))
    with pytest.raises(RecipeError, match="limit on size: points are for metrics in percent"):
        judge(goal, seen)


def test_strict_wants_the_whole_interval_inside():
    original, final = by_name(accuracy(90.0)), by_name(accuracy(89.5))
    intervals = {"accuracy": (88.8, 90.2)}
    (loose,) = check_limits(GOAL, original, final, intervals, strict=False)
    (strict,) = check_limits(GOAL, original, final, intervals, strict=True)
    assert loose.holds
    assert not strict.holds
    assert loose.bound == pytest.approx(89.0)


def test_a_metric_where_lower_is_better_gains_when_it_falls():
    def perplexity(value):
        return Measurement(metric="perplexity", value=value, unit="1", better="lower")

    seen = Evidence(
        original=by_name(perplexity(5.0), size(100)),
        before=by_name(perplexity(5.0), size(100)),
        after=by_name(perplexity(4.8), size(100)),
        quality={"perplexity": (0.2, 0.1, 0.3)},
    )
    found = judge(Goal(best="size", limits={"perplexity": "+2%"}), seen)
    assert found.keep
    assert found.reason == "perplexity 5 -> 4.8, better by 0.2 [0.1, 0.3]"
    worse = dataclasses.replace(
        seen,
        after=by_name(perplexity(5.2), size(50)),
        quality={"perplexity": (-0.2, -0.3, -0.1)},
    )
    found = judge(Goal(best="size", limits={"perplexity": "+2%"}), worse)
    assert not found.keep
    assert found.reason == ("breaks the limit perplexity=+2%: perplexity 5 -> 5.2, limit 5.1")
    with pytest.raises(
        RecipeError,
        match=r"limit on accuracy: \+2% is for metrics where lower is better; write -2%",
    ):
        judge(Goal(best="latency", limits={"accuracy": "+2%"}), evidence())
