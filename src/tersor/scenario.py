"""scenario(): the four ways that MLPerf loads a network: single, multi, server and offline.

Source:
    MLCommons, MLPerf inference rules: scenarios, metrics and shortest durations. Ours last as long
    as asked for, and say so where that is shorter; the percentiles are those of the runs, with
    their order-statistic intervals, instead of MLPerf's early-stopping estimates.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.loops import Runs, poisson
from tersor.core.statistics import quantile_interval
from tersor.instances import Instance
from tersor.sweep import Make, stalls

Mode = Literal["single", "multi", "server", "offline"]
MODES: tuple[Mode, ...] = ("single", "multi", "server", "offline")
SECONDS = 10.0
MLPERF_S = 600.0
"""Seconds that a run of MLPerf lasts at least, in every scenario."""
MLPERF_OFFLINE = 24_576
"""Samples of an offline run of MLPerf, at least."""
MULTI = 8
"""Samples of a query in the mode multi."""
NEEDED: Mapping[float, int] = {50: 6, 90: 36, 99: 1_000, 99.9: 10_000}
"""Fewest runs from which a percentile is told."""
OFFLINE_BATCHES = (1, 8, 32, 128)
_SEARCH_STEPS = 6
_LOWEST = 0.1  # of what the network can do: where the search for a rate begins
_SLOWEST_MS = 2000.0


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """A latency that so many percent of the queries keep."""

    percent: float
    ms: float | None
    low_ms: float | None = None
    high_ms: float | None = None
    """The 95 % order-statistic interval of independent queries, which those of a queue are not."""
    note: str = ""
    """Why it is not told."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A network under one kind of load."""

    mode: Mode
    queries: int
    batch: int
    """Samples of a query; offline: of a batch."""
    seconds: float
    """From the first query to the last answer."""
    percentiles: tuple[Percentile, ...]
    """Of latency: from a query's arrival to its answer. Offline all arrive at the beginning."""
    samples_per_s: float
    stalls: int
    """Runs of 10 times the median or longer, without the wait before; they are in every number."""
    slowest_ms: float
    """The longest latency, counted as in the percentiles."""
    short: str = ""
    """What it lacks of MLPerf's shortest run."""
    rate: float | None = None
    """server: queries in a second, as they arrived."""
    limit_ms: float | None = None
    """server: the latency that the 99th percentile was to keep."""
    note: str = ""
    latencies_ms: tuple[float, ...] = ()
    """Of every query: the percentiles follow from them."""

    def at(self, percent: float) -> Percentile:
        """Return a percentile."""
        return next(each for each in self.percentiles if each.percent == percent)

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        rows = [
            (f"{each.percent:g} %", "" if each.ms is None else f"{each.ms:.4g}", each.note)
            for each in self.percentiles
        ]
        title = f"{self.mode}: {self.queries} queries, {self.samples_per_s:.4g} samples/s"
        return shown(title, ("latency of", "ms", ""), rows, (self.note, self.short))


def scenario(
    instance: Instance,
    make: Make,
    mode: Mode,
    *,
    seconds: float = SECONDS,
    batch: int | None = None,
    rate: float | None = None,
    limit_ms: float | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Scenario:
    """Load a network in one of four ways.

    Args:
        instance: A loaded network.
        make: Makes input batches of so many samples.
        mode: single: the next query when the last one is answered. multi: the same with 8 samples
            a query. server: queries arrive at random (Poisson); latency counts from the arrival.
            offline: all samples are there at the beginning.
        seconds: Length of the run.
        batch: Samples of a query, of a batch where it is offline; None: 1, 8 for multi, and the
            fastest of a short sweep for offline.
        rate: server: queries in a second. None: the largest one whose 99th percentile keeps
            `limit_ms`, which is searched.
        limit_ms: server: the latency limit of that search.
        samples: offline: how many, instead of as many as `seconds` allow.
        seed: Decides the arrivals.

    Raises:
        TargetError: server, and no rate keeps the limit. TersorError: the network failed.
    """
    if mode == "offline":
        return _offline(instance, make, seconds, batch, samples)
    size = batch or (MULTI if mode == "multi" else 1)
    bound = instance.bind(make(size))
    warm = instance.closed(bound, seconds=0.5, fewest=3)
    if mode != "server":
        return _told(mode, instance.closed(bound, seconds=seconds), size)
    note = ""
    if rate is None:
        assert limit_ms is not None, "a rate, or a limit to search it by"
        rate, runs, note = _search(
            lambda rate, count: instance.opened(bound, poisson(rate, count, seed)),
            1000 / float(np.mean(warm.service_ms)),
            limit_ms,
            seconds,
        )
    else:
        count = max(1, math.ceil(rate * seconds))
        runs = instance.opened(bound, poisson(rate, count, seed))
    return _told("server", runs, size, rate=rate, limit_ms=limit_ms, note=note)


def percentiles(times_ms: np.ndarray) -> tuple[Percentile, ...]:
    """Tell the percentiles that so many runs allow, each with its interval."""
    found = []
    for percent, needed in NEEDED.items():
        interval = quantile_interval(times_ms, percent / 100)
        if times_ms.size < needed or interval is None:
            note = f"not enough samples ({times_ms.size:,} of {needed:,})"
            found.append(Percentile(percent=percent, ms=None, note=note))
            continue
        value = float(np.quantile(times_ms, percent / 100))
        low_ms, high_ms = interval
        found.append(Percentile(percent=percent, ms=value, low_ms=low_ms, high_ms=high_ms))
    return tuple(found)


def _told(mode: Mode, runs: Runs, batch: int, **more: Any) -> Scenario:
    latency_ms, service_ms = runs.latency_ms, runs.service_ms
    count, seconds = latency_ms.size, runs.seconds
    lacks = []
    if seconds < MLPERF_S:
        lacks.append(f"{seconds:.1f} s, MLPerf asks for {MLPERF_S:g} s")
    if mode == "offline" and count * batch < MLPERF_OFFLINE:
        lacks.append(f"{count * batch:,} samples, MLPerf asks for {MLPERF_OFFLINE:,}")
    return Scenario(
        mode=mode,
        queries=count,
        batch=batch,
        seconds=seconds,
        percentiles=percentiles(latency_ms),
        samples_per_s=count * batch / seconds,
        stalls=stalls(service_ms),
        slowest_ms=float(latency_ms.max()),
        short=f"short: {'; '.join(lacks)}" if lacks else "",
        latencies_ms=tuple(np.round(latency_ms, 5).tolist()),
        **more,
    )


def _offline(
    instance: Instance, make: Make, seconds: float, batch: int | None, samples: int | None
) -> Scenario:
    note = ""
    if batch is None:
        batch, note = _fastest(instance, make, seconds / 20)
    bound = instance.bind(make(batch))
    warm = instance.closed(bound, seconds=min(0.5, seconds), fewest=3)
    batch_s = float(np.mean(warm.service_ms)) / 1000
    count = math.ceil(seconds / batch_s) if samples is None else math.ceil(samples / batch)
    runs = instance.closed(bound, seconds=0.0, fewest=count)
    # all samples arrived when the first batch began
    arrived = Runs(
        due_ns=np.full(count, runs.began_ns[0]), began_ns=runs.began_ns, ended_ns=runs.ended_ns
    )
    return _told("offline", arrived, batch, note=note)


def _fastest(instance: Instance, make: Make, seconds: float) -> tuple[int, str]:
    """Pick the batch with the most samples in a second."""
    rates: dict[int, float] = {}
    reason: Exception | None = None
    for size in OFFLINE_BATCHES:
        if rates and 1000 * size / max(rates.values()) > _SLOWEST_MS:
            break
        try:
            bound = instance.bind(make(size))
            instance.closed(bound, seconds=0.1, fewest=2)
            runs = instance.closed(bound, seconds=seconds, fewest=3)
        except Exception as error:  # a network that takes one batch size only
            reason = error
            continue
        rates[size] = size * len(runs.began_ns) / runs.seconds
    if not rates:
        assert reason is not None
        raise reason
    best = max(rates, key=lambda size: rates[size])
    return best, f"batch {best}: the fastest of {', '.join(map(str, rates))}"


def _search(
    load: Callable[[float, int], Runs], capacity: float, limit_ms: float, seconds: float
) -> tuple[float, Runs, str]:
    """Find the largest rate whose 99th percentile keeps a limit.

    Args:
        load: Runs so many queries at a rate.
        capacity: Queries in a second that a closed loop answers.
        limit_ms: Of the 99th percentile.
        seconds: Length of the last run; at least 1,000 queries everywhere.

    Returns:
        The rate, the runs at it, and how it was found.
    """

    def keeps(runs: Runs) -> bool:
        return bool(np.quantile(runs.latency_ms, 0.99) <= limit_ms)

    least = NEEDED[99]
    low, high, kept = _LOWEST * capacity, capacity, False
    for _ in range(_SEARCH_STEPS):
        middle = math.sqrt(low * high)
        if keeps(load(middle, least)):
            low, kept = middle, True
        else:
            high = middle
    if not kept and not keeps(load(low, least)):
        raise TargetError(
            f"no rate keeps the 99th percentile of latency within {limit_ms:g} ms: it is more at "
            f"{low:.3g} queries/s, of {capacity:.3g} that the network answers one after the other; "
            "allow more, or take a faster network"
        )
    rates = [low * 0.95**i for i in range(6)]
    for rate in rates:
        runs = load(rate, max(least, math.ceil(rate * seconds)))
        if keeps(runs):
            break
    note = f"the largest of {_SEARCH_STEPS} rates tried whose 99th percentile keeps the limit"
    if not keeps(runs):
        note = "not confirmed: the 99th percentile did not keep the limit in the last run"
    elif rate != low:
        note += f"; confirmed at {rate / low:.0%} of it only"
    return rate, runs, note
