"""Joules that one batch takes, from the machine's counters, beyond what idling takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tersor.core import plugins
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.statistics import median_interval
from tersor.core.timing import Calls, quiet, time_runs, warm_up
from tersor.metrics import _conditions
from tersor.metrics._counters import Counter, NoCounterError, counters

ROUNDS = 6
IDLE_S = 2.0
RUN_S = 5.0
"""A round idles, then runs; half a minute of runs in all."""


@metric(unit="J", better="lower", needs=("runner", "inputs"), proxy="cpu_seconds")
def energy(subject: Subject) -> Measurement:
    """Read RAPL, and NVML where the device is cuda, around runs and around idling in turns.

    The counters are the whole machine's: what others draw meanwhile counts, too. Where there is no
    counter, `cpu_seconds` is measured in its place, and says that energy is unavailable and why.
    Nothing is ever guessed from a device's rated power.
    """
    assert subject.runner is not None
    assert subject.inputs is not None
    try:
        found = counters(subject.target.device)
        calls = [subject.runner.bind(inputs) for inputs in subject.inputs]
        warm_up(calls)
        rounds = measured(calls, found)
    except NoCounterError as error:
        return _unavailable(subject, str(error))
    joules = np.array([each.joules for each in rounds])
    batch, threads = _conditions.batch(subject), _conditions.threads(subject)
    names = ", ".join(counter.name for counter in found)
    return Measurement(
        metric="energy",
        value=float(np.median(joules)),
        unit="J",
        better="lower",
        spread=median_interval(joules),
        conditions={
            **subject.conditions,
            "batch": batch,
            "threads": threads,
            "counters": names,
            "idle_w": float(np.median([each.idle_w for each in rounds])),
            "run_w": float(np.median([each.run_w for each in rounds])),
        },
        count=sum(each.runs for each in rounds),
        how=f"joules of a run beyond idling, counters {names}: median of {len(rounds)} rounds of "
        f"{IDLE_S:g} s idle and {RUN_S:g} s of runs, batch {batch}, "
        f"{_conditions.plural(threads, 'thread')}",
    )


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round drew."""

    joules: float
    """Of a run, beyond idling."""
    runs: int
    idle_w: float
    run_w: float


def measured(calls: Calls, found: Sequence[Counter]) -> list[Round]:
    """Idle and run in turns.

    Raises:
        NoCounterError: the counters tell no difference between the two.
    """
    rounds = []
    with quiet():
        for _ in range(ROUNDS):
            start = _read(found)
            time.sleep(IDLE_S)
            middle = _read(found)
            runs = 0
            while time.perf_counter() - middle[0] < RUN_S:
                time_runs(calls, runs, 1)
                runs += 1
            rounds.append(_round(start, middle, _read(found), runs))
    idle_w, run_w = (float(np.median([getattr(r, n) for r in rounds])) for n in ("idle_w", "run_w"))
    if run_w <= idle_w:
        raise NoCounterError(
            f"the counters show no more power in runs ({run_w:.3g} W) than idle ({idle_w:.3g} W)"
        )
    return rounds


def _read(found: Sequence[Counter]) -> tuple[float, float]:
    """Return the time and the joules counted so far."""
    return time.perf_counter(), sum(counter.joules() for counter in found)


def _round(
    start: tuple[float, float], middle: tuple[float, float], end: tuple[float, float], runs: int
) -> Round:
    """Turn three readings into watts of idling and running, and joules of a run."""
    idle_w = (middle[1] - start[1]) / (middle[0] - start[0])
    run_s, drawn = end[0] - middle[0], end[1] - middle[1]
    return Round(
        joules=(drawn - idle_w * run_s) / runs, runs=runs, idle_w=idle_w, run_w=drawn / run_s
    )


def _unavailable(subject: Subject, why: str) -> Measurement:
    """Measure the proxy, and say in whose place."""
    made = plugins.metric("cpu_seconds").measure(subject)
    return replace(
        made,
        conditions={**made.conditions, "energy": "unavailable"},
        how=f"energy: unavailable: {why}; in its place {made.how}",
    )
