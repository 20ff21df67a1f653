"""Samples per second at the best batch of a short sweep."""

from collections.abc import Sequence

import numpy as np

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.runtime import Arrays
from tersor.core.statistics import median_interval
from tersor.core.timing import Calls, interleave, warm_up
from tersor.metrics import _conditions

BATCHES = (1, 8, 32, 128)
BUDGET_S = 4.0
BLOCKS = 12
_SLOWEST_MS = 1000.0  # a batch expected to take longer is not tried
_BYTES = 256e6  # of inputs held at a time


@metric(unit="1/s", better="higher", needs=("runner", "inputs"))
def throughput(subject: Subject) -> Measurement:
    """Time batches of 1, 8, 32, 128 and the one asked for, interleaved, and take the best.

    The rate of every batch tried is in the conditions. A network exported for one batch size is
    measured at that size, and `how` says so.
    """
    assert subject.runner is not None
    assert subject.inputs is not None
    asked = _conditions.batch(subject)
    calls: dict[int, Calls] = {asked: [subject.runner.bind(a) for a in subject.inputs]}
    sample_ms = _first_ms(calls[asked]) / asked
    refused: list[int] = []
    for size in BATCHES:
        if size == asked or size * sample_ms > _SLOWEST_MS:
            continue
        try:
            tried = [subject.runner.bind(a) for a in batches_of(subject.inputs, asked, size)]
            sample_ms = min(sample_ms, _first_ms(tried) / size)
            calls[size] = tried
        except Exception:  # each runtime has its own error for a batch it was not made for
            refused.append(size)
    sizes = sorted(calls)
    blocks = interleave(
        [calls[size] for size in sizes], budget_s=BUDGET_S, min_blocks=BLOCKS, warm_up_s=0.2
    )
    times_ms = dict(zip(sizes, blocks, strict=True))
    rates = {size: 1000 * size / float(np.median(times_ms[size])) for size in sizes}
    best = max(sizes, key=lambda size: rates[size])
    low_ms, high_ms = median_interval(times_ms[best])
    threads = _conditions.threads(subject)
    how = (
        f"best of batches {', '.join(map(str, sizes))}: {best}; median of {len(blocks[0])} "
        f"interleaved blocks, {_conditions.plural(threads, 'thread')}"
    )
    if refused:
        how += f"; the network does not take batches of {', '.join(map(str, refused))}"
    return Measurement(
        metric="throughput",
        value=rates[best],
        unit="1/s",
        better="higher",
        spread=(1000 * best / high_ms, 1000 * best / low_ms),
        conditions={
            **subject.conditions,
            "batch": best,
            "threads": threads,
            **{f"batch_{size}_per_s": round(rates[size], 3) for size in sizes},
        },
        count=len(blocks[0]),
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


def _first_ms(calls: Calls) -> float:
    """Return a rough time of a run; raises where the network does not take the batch."""
    return float(np.median(warm_up(calls, runs=3, seconds=0.0)))
