"""Median time of one batch."""

import time

import numpy as np

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.statistics import median_interval
from tersor.core.timing import Calls, quiet, time_runs, warm_up
from tersor.metrics import _conditions

SECONDS = 1.5
"""Time spent on timed runs, longer only to reach MIN_RUNS."""
MIN_RUNS = 30
AT_MOST_S = 10.0
"""Time after which a slow network is not run again, however few the runs."""


@metric(unit="ms", better="lower", needs=("runner", "inputs"))
def latency(subject: Subject) -> Measurement:
    """Time a bound runner, inputs in rotation.

    The interval is the order-statistic one of the median over runs. It does not cover the drift of
    the machine between two measurements: compare networks with `compare`, which interleaves them.
    """
    assert subject.runner is not None
    assert subject.inputs is not None
    calls = [subject.runner.bind(inputs) for inputs in subject.inputs]
    warm_ms = warm_up(calls)
    times_ms = timed(calls, SECONDS)
    batch, threads = _conditions.batch(subject), _conditions.threads(subject)
    return Measurement(
        metric="latency",
        value=float(np.median(times_ms)),
        unit="ms",
        better="lower",
        spread=median_interval(times_ms),
        conditions={
            **subject.conditions,
            "batch": batch,
            "threads": threads,
        },
        count=times_ms.size,
        how=f"median of {times_ms.size} runs after {warm_ms.size}, batch {batch}, "
        f"{_conditions.plural(threads, 'thread')}",
    )


def timed(calls: Calls, seconds: float) -> np.ndarray:
    """Return the milliseconds of each run, for about `seconds`."""
    taken: list[np.ndarray] = []
    began = time.perf_counter()
    with quiet():
        while True:
            taken.append(time_runs(calls, len(taken), 1))
            spent_s = time.perf_counter() - began
            if spent_s > AT_MOST_S or (spent_s > seconds and len(taken) >= MIN_RUNS):
                return np.concatenate(taken)
