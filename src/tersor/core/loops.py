"""Loops of requests: one after the other (closed), or arriving by themselves (open).

In a closed loop a slow run delays the next request, so that a stall of a second is one slow run
among thousands. Users do not wait with asking: in the open loop requests arrive at times fixed
beforehand, and a latency counts from there, the time spent waiting in the queue included.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.core.timing import Calls, quiet

_SPIN_NS = 300_000
"""A sleep may end so much late; the rest of a wait is spent looking at the clock."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """When runs were due, began and ended: nanoseconds of the system's monotonic clock."""

    due_ns: np.ndarray
    """When the request arrived, shape (runs,); where it is closed, when the run began."""
    began_ns: np.ndarray
    ended_ns: np.ndarray

    @property
    def latency_ms(self) -> np.ndarray:
        """From the arrival to the answer."""
        return np.asarray((self.ended_ns - self.due_ns) / 1e6)

    @property
    def service_ms(self) -> np.ndarray:
        """Of the run alone."""
        return np.asarray((self.ended_ns - self.began_ns) / 1e6)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last answer."""
        return float(self.ended_ns[-1] - self.due_ns[0]) / 1e9


def closed(calls: Calls, *, seconds: float, fewest: int = 1, start_ns: int = 0) -> Runs:
    """Run one after the other.

    Args:
        calls: Bound calls, used in rotation.
        seconds: No run begins later.
        fewest: Runs, even if they take longer.
        start_ns: When to begin, for several processes that begin together; 0: now.
    """
    clock, size = time.perf_counter_ns, len(calls)
    began_ns: list[int] = []
    ended_ns: list[int] = []
    with quiet():
        _wait(start_ns)
        until = clock() + int(seconds * 1e9)
        now = clock()
        while len(began_ns) < fewest or now < until:
            outputs: Any = calls[len(began_ns) % size]()
            began_ns.append(now)
            now = clock()
            ended_ns.append(now)
            now = clock()
    del outputs
    return Runs(due_ns=np.array(began_ns), began_ns=np.array(began_ns), ended_ns=np.array(ended_ns))


def opened(calls: Calls, arrivals_s: Sequence[float] | np.ndarray) -> Runs:
    """Run requests as they arrive, first come first served.

    Args:
        calls: Bound calls, used in rotation.
        arrivals_s: Seconds from now on at which requests arrive, ascending.
    """
    clock, size = time.perf_counter_ns, len(calls)
    count = len(arrivals_s)
    began_ns, ended_ns = [0] * count, [0] * count
    with quiet():
        first = clock()
        due_ns = [first + int(arrival * 1e9) for arrival in arrivals_s]
        for i in range(count):
            _wait(due_ns[i])
            began_ns[i] = clock()
            outputs: Any = calls[i % size]()
            ended_ns[i] = clock()
    del outputs
    return Runs(due_ns=np.array(due_ns), began_ns=np.array(began_ns), ended_ns=np.array(ended_ns))


def poisson(rate: float, count: int, seed: int) -> np.ndarray:
    """Draw arrival times: gaps are exponential, independent, of mean 1 / rate.

    Args:
        rate: Arrivals in a second.
        count: Arrivals.
        seed: Decides them.

    Returns:
        Seconds, ascending, shape (count,).
    """
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, size=count))


def _wait(until_ns: int) -> None:
    """Sleep, and look at the clock for the last part."""
    left = until_ns - time.perf_counter_ns()
    if left > _SPIN_NS:
        time.sleep((left - _SPIN_NS) / 1e9)
    while time.perf_counter_ns() < until_ns:
        pass
