import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tersor.core import timing
from tersor.core.timing import interleave, quiet, time_runs, warm_up


def _busy(ms: float, log: list[Any], name: Any) -> Callable[[], None]:
    def call() -> None:
        log.append(name)
        until = time.perf_counter_ns() + ms * 1e6
        while time.perf_counter_ns() < until:
            pass

    return call


def test_time_runs_rotates_the_inputs_and_times_each_run() -> None:
    log: list[int] = []
    calls = [_busy(0.2 * (i + 1), log, i) for i in range(3)]
    times_ms = time_runs(calls, 2, 5)
    assert log == [2, 0, 1, 2, 0]
    assert times_ms.shape == (5,)
    assert (times_ms >= np.array([0.6, 0.2, 0.4, 0.6, 0.2])).all()


def test_warm_up_makes_enough_runs_and_takes_enough_time() -> None:
    log: list[int] = []
    began = time.perf_counter()
    times_ms = warm_up([_busy(1, log, 0)], runs=20, seconds=0.1)
    assert time.perf_counter() - began >= 0.1
    assert times_ms.size == len(log) >= 20


def test_warm_up_of_a_slow_network_is_bounded() -> None:
    log: list[int] = []
    assert warm_up([_busy(60, log, 0)], runs=20, seconds=5, at_most_s=0.1).size == len(log) == 2


def test_quiet_turns_garbage_collection_off_and_on_again() -> None:
    assert gc.isenabled()
    with quiet():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with quiet():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_interleave_takes_turns_forth_and_back_in_random_order() -> None:
    log: list[str] = []
    calls = [[_busy(12, log, name)] for name in "ab"]
    found = interleave(calls, budget_s=0.5, min_blocks=10, warm_up_s=0.01)
    assert [times.shape for times in found] == [(len(found[0]),)] * 2
    blocks = "".join(log[-4 * len(found[0]) :])
    turns = [blocks[i : i + 4] for i in range(0, len(blocks), 4)]
    assert set(turns) == {"abba", "baab"}


def test_interleave_gives_both_the_same_inputs() -> None:
    log: list[tuple[str, int]] = []
    calls = [[_busy(12, log, (name, i)) for i in range(5)] for name in "ab"]
    blocks = len(interleave(calls, budget_s=0.3, min_blocks=8, warm_up_s=0.01)[0])
    timed = log[-4 * blocks :]
    of = {name: [i for who, i in timed if who == name] for name in "ab"}
    assert of["a"] == of["b"]
    assert len(set(of["a"])) == 5


def test_interleave_finds_a_real_difference_of_three_contestants() -> None:
    log: list[int] = []
    calls = [[_busy(ms, log, 0)] for ms in (1.0, 2.0, 0.5)]
    a, b, c = (
        float(np.median(t)) for t in interleave(calls, budget_s=1, min_blocks=8, warm_up_s=0.01)
    )
    # twice; a busy machine stretches the longer run more, and seldom the median of ten by much
    assert b / a > 1.5
    assert a / c > 1.5


def test_interleave_stops_a_very_slow_contest_short_of_the_blocks_wanted() -> None:
    log: list[int] = []
    calls = [[_busy(20, log, 0)], [_busy(20, log, 0)]]
    began = time.perf_counter()
    found = interleave(calls, budget_s=0.1, min_blocks=500, warm_up_s=0.01)
    assert time.perf_counter() - began < 5
    assert timing._FEWEST_BLOCKS <= found[0].size < 500
