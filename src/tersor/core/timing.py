"""Time calls: warm up, interleave, garbage collection off.

A machine's speed drifts by far more than the differences we look for. Contestants are therefore
timed in short turns, forth and back (A B B A), in a random order: whatever is slow at that moment
is slow for both, and a drift that is linear over a block cancels.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.statistics import half_width, log_ratio_interval

Calls = Sequence[Callable[[], Any]]
"""The same computation bound to distinct inputs; used in rotation."""
TURN_MS = 10.0
"""Length of one contestant's turn; a block of two contestants is four turns, 40 ms."""
MIN_BLOCKS = 30
STABLE = 0.02
"""Half-width of the ratio's 95 % interval at which timing may stop."""
QUARTILE = 0.25
"""Of a turn's runs, the one that counts."""
_FEWEST_BLOCKS = 8  # fewer say nothing about a median: its 95 % interval would be their whole range
_CHECK_EVERY = 10
_OVERTIME = 3.0  # slow networks may overrun the budget this many times to reach MIN_BLOCKS


@contextmanager
def quiet() -> Iterator[None]:
    """Collect garbage now and not again before the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def middle_mean(times: Sequence[float]) -> float:
    """Average the half of the values in the middle; finer than a median of whole microseconds."""
    ordered = np.sort(np.asarray(times, dtype=np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def time_runs(calls: Calls, first: int, count: int) -> np.ndarray:
    """Time `count` runs one by one. A call that runs elsewhere and has `run_ns` tells its own time.

    Args:
        calls: Bound calls, used in rotation.
        first: Number of the first run, which decides the first call.
        count: Runs.

    Returns:
        Milliseconds of each run, shape (count,).
    """
    clock, size = time.perf_counter_ns, len(calls)
    spent_ns = [0] * count
    outputs: Any = None
    for i in range(count):
        call = calls[(first + i) % size]
        elsewhere = getattr(call, "run_ns", None)
        if elsewhere is not None:
            spent_ns[i] = elsewhere()
            continue
        began = clock()
        outputs = call()
        spent_ns[i] = clock() - began
    del outputs
    return np.array(spent_ns, dtype=np.float64) / 1e6


def cpu_seconds_of(calls: Calls, first: int, count: int) -> float:
    """Run `count` times and return the processor seconds of all threads.

    A call that runs elsewhere tells its own, by `cpu_ns`.

    Args:
        calls: Bound calls, used in rotation.
        first: Number of the first run, which decides the first call.
        count: Runs.

    Raises:
        TargetError: a call runs elsewhere and cannot tell.
    """
    chosen = [calls[(first + i) % len(calls)] for i in range(count)]
    if not any(hasattr(call, "run_ns") for call in chosen):
        began = time.process_time_ns()
        for call in chosen:
            call()
        return (time.process_time_ns() - began) / 1e9
    if not all(hasattr(call, "cpu_ns") for call in chosen):
        raise TargetError(
            "cpu_seconds: unavailable: the network runs in another process, which does not tell "
            "its processor time"
        )
    return float(sum(cast(Any, call).cpu_ns() for call in chosen)) / 1e9


def warm_up(
    calls: Calls, *, runs: int = 20, seconds: float = 0.5, at_most_s: float = 3.0
) -> np.ndarray:
    """Run until caches, clocks and allocators have settled.

    Args:
        calls: Bound calls, used in rotation.
        runs: Fewest runs.
        seconds: Shortest time.
        at_most_s: Longest time; slow networks stop here, after one run at least.

    Returns:
        Milliseconds of each run, the first of them cold.
    """
    taken: list[np.ndarray] = []
    began = time.perf_counter()
    while True:
        taken.append(time_runs(calls, len(taken), 1))
        spent = time.perf_counter() - began
        if spent >= at_most_s or (len(taken) >= runs and spent >= seconds):
            return np.concatenate(taken)


def interleave(
    calls: Sequence[Calls],
    *,
    budget_s: float = 6.0,
    min_blocks: int = MIN_BLOCKS,
    seed: int = 0,
    warm_up_s: float = 0.5,
) -> list[np.ndarray]:
    """Time contestants against each other.

    A block gives every contestant two turns of about 10 ms (one run at least): in a random order,
    then in the reverse of it. All run the same inputs. A turn's first run after the switch refills
    caches and is not timed, unless a run is longer than half a turn. A contestant's time in a block
    is the geometric mean of its two turns' lower quartiles: other programs only ever add to a run,
    and on a busy machine the quartiles' ratios scatter less than half as much as the medians'. So
    networks whose time depends on their input (early exits) are not to be compared this way.

    Args:
        calls: For each contestant, calls bound to distinct inputs.
        budget_s: Time after which to stop even if the ratios are not yet stable; very slow
            contestants may take three times as long to reach `min_blocks`.
        min_blocks: Fewest blocks, as long as that overtime allows.
        seed: Decides the orders.
        warm_up_s: Warm-up of each contestant, at least 20 runs where the budget allows.

    Returns:
        For each contestant the milliseconds of a run by block, shape (blocks,). Timing went on
        until the 95 % interval of every ratio to the first was within 2 %, or the budget ended.
    """
    at_most_s = max(warm_up_s, budget_s / (2 * len(calls)))
    warm_ms = [warm_up(c, seconds=warm_up_s, at_most_s=at_most_s)[-50:] for c in calls]
    guess_ms = [max(1e-6, float(np.quantile(times, QUARTILE))) for times in warm_ms]
    counts = [max(1, round(TURN_MS / ms)) for ms in guess_ms]
    rng = np.random.default_rng(seed)
    blocks: list[np.ndarray] = []
    began = time.perf_counter()
    with quiet():
        while not _enough(blocks, time.perf_counter() - began, budget_s, min_blocks):
            order = rng.permutation(len(calls))
            turns_ms = np.empty((2, len(calls)))
            for turn, who in [(0, w) for w in order] + [(1, w) for w in order[::-1]]:
                first = (2 * len(blocks) + turn) * 7  # any stride: contestants share it
                if counts[who] > 1:
                    calls[who][first % len(calls[who])]()
                turns_ms[turn, who] = np.quantile(
                    time_runs(calls[who], first, counts[who]), QUARTILE
                )
            blocks.append(np.exp(np.log(turns_ms).mean(axis=0)))
    return list(np.array(blocks).T)


def _enough(blocks: Sequence[np.ndarray], spent_s: float, budget_s: float, min_blocks: int) -> bool:
    if len(blocks) < min_blocks:
        return spent_s > _OVERTIME * budget_s and len(blocks) >= _FEWEST_BLOCKS
    if spent_s > budget_s:
        return True
    if (len(blocks) - min_blocks) % _CHECK_EVERY:
        return False
    first, *others = np.log(np.array(blocks)).T
    intervals = (log_ratio_interval(first - other, resamples=1000) for other in others)
    return all(half_width(low, high) <= STABLE for _, low, high in intervals)
