"""Samples per second at the best batch of a short sweep."""

from collections.abc import Sequence

import numpy as np

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.runtime import Arrays, Runner
from tersor.core.statistics import median_interval
from tersor.core.timing import warm_up
from tersor.metrics import _conditions
from tersor.metrics.latency import timed

BATCHES = (1, 8, 32, 128)
_SLOWEST_S = 2.0  # a batch expected to take longer is not tried
_BYTES = 256e6  # of inputs held at a time


@metric(unit="1/s", better="higher", needs=("runner", "inputs"))
def throughput(subject: Subject) -> Measurement:
    """Try batches of 1, 8, 32 and 128 and the one asked for, then time the best at length.

    The rate of every batch tried is in the conditions. A network exported for one batch size is
    measured at that size, and `how` says so.
    """
    assert subject.runner is not None
    assert subject.inputs is not None
    asked = _conditions.batch(subject)
    rates = {asked: _rate(subject.runner, subject.inputs, asked, asked, 0.3)}
    refused: list[int] = []
    for size in BATCHES:
        nearest = min(rates, key=lambda known: abs(known - size))
        if size == asked or size / rates[nearest] > _SLOWEST_S:
            continue
        try:
            rates[size] = _rate(subject.runner, subject.inputs, asked, size, 0.3)
        except Exception:  # each runtime has its own error for a batch the network was not made for
            refused.append(size)
    best = max(rates, key=lambda size: rates[size])
    calls = [subject.runner.bind(a) for a in batches_of(subject.inputs, asked, best)]
    warm_ms = warm_up(calls, seconds=0.3)
    times_ms = timed(calls, 1.0)
    low_ms, high_ms = median_interval(times_ms)
    threads = _conditions.threads(subject)
    tried = ", ".join(str(size) for size in sorted(rates))
    how = (
        f"best of batches {tried}: {best}; median of {times_ms.size} runs after {warm_ms.size}, "
        f"{_conditions.plural(threads, 'thread')}"
    )
    if refused:
        how += f"; the network does not take batches of {', '.join(map(str, refused))}"
    return Measurement(
        metric="throughput",
        value=1000 * best / float(np.median(times_ms)),
        unit="1/s",
        better="higher",
        spread=(1000 * best / high_ms, 1000 * best / low_ms),
        conditions={
            **subject.conditions,
            "batch": best,
            "threads": threads,
            **{f"batch_{size}_per_s": round(rate, 3) for size, rate in sorted(rates.items())},
        },
        count=times_ms.size,
        how=how,
    )


def batches_of(inputs: Sequence[Arrays], asked: int, size: int) -> list[Arrays]:
    """Make batches of `size` samples from batches of `asked`; an input without samples is kept.

    Samples are drawn anew for every batch, without repeating one inside it where there are enough.
    """
    if size == asked:
        return list(inputs)
    sampled = [n for n, a in inputs[0].items() if a.ndim and len(a) == asked]
    pool = {n: np.concatenate([batch[n] for batch in inputs]) for n in sampled}
    rows = len(inputs) * asked
    bytes_each = sum(pool[n][:1].nbytes for n in sampled) * size
    count = max(2, min(len(inputs), int(_BYTES / max(1, bytes_each))))
    rng = np.random.default_rng(0)
    made: list[Arrays] = []
    for _ in range(count):
        order = np.concatenate([rng.permutation(rows) for _ in range(-(-size // rows))])[:size]
        made.append({n: pool[n][order] if n in pool else a for n, a in inputs[0].items()})
    return made


def _rate(runner: Runner, inputs: Sequence[Arrays], asked: int, size: int, seconds: float) -> float:
    """Return samples per second, roughly."""
    calls = [runner.bind(arrays) for arrays in batches_of(inputs, asked, size)]
    warm_up(calls, runs=3, seconds=0.1)
    return 1000 * size / float(np.median(timed(calls, seconds)))
