"""sweep(): batch sizes x threads x instances: where is the knee, and what keeps a latency?

A cell has one measured time, that of a batch in one instance; everything else follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tersor.core.context import Track, silent
from tersor.core.errors import RecipeError, TersorError
from tersor.core.loops import Runs
from tersor.core.remote import ChildError
from tersor.core.runtime import Arrays
from tersor.core.schema import to_plain
from tersor.core.statistics import median_interval
from tersor.instances import Instance, together

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
ENOUGH = 0.95
"""Share of the best throughput that the knee has."""
ROUNDS = 10
"""Times that each batch size has its turn, in an order drawn anew."""
SECONDS = 1.0
"""Of timed runs of a cell."""
SLOWEST_MS = 2000.0
"""A batch that is expected to take longer is not tried."""
STALL = 10.0
"""A run that takes so many times the median is a stall: counted, never removed."""
_WARM_UP_S = 0.1

Start = Callable[[int], Instance]
"""Load a network to run with so many threads."""
Make = Callable[[int], Sequence[Arrays]]
"""Make distinct input batches of so many samples."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One batch size on so many threads of so many processes."""

    batch: int
    threads: int
    """Of each instance."""
    instances: int
    status: Literal["ran", "skipped", "failed"] = "ran"
    reason: str = ""
    """Why it did not run."""
    batch_ms: float = float("nan")
    """Milliseconds that an instance needs for a batch: median over rounds."""
    low_ms: float = float("nan")
    high_ms: float = float("nan")
    """The 95 % interval of `batch_ms`."""
    runs: int = 0
    stalls: int = 0
    """Runs that took 10 times the median or longer; they are in the times."""

    @property
    def sample_ms(self) -> float:
        """Milliseconds of an instance for a sample."""
        return self.batch_ms / self.batch

    @property
    def batches_per_s(self) -> float:
        """Batches in a second, of all instances."""
        return 1000 * self.instances / self.batch_ms

    @property
    def samples_per_s(self) -> float:
        """Samples in a second, of all instances."""
        return self.batch * self.batches_per_s

    def plain(self) -> dict[str, Any]:
        """Return plain data, with what follows from the time."""
        about = {"batch": self.batch, "threads": self.threads, "instances": self.instances}
        if self.status != "ran":
            return {**about, "status": self.status, "reason": self.reason}
        derived = ("sample_ms", "batches_per_s", "samples_per_s")
        return {**to_plain(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sweep` found."""

    cells: tuple[Cell, ...]

    @property
    def ran(self) -> list[Cell]:
        """The cells that were measured."""
        return [cell for cell in self.cells if cell.status == "ran"]

    @property
    def best(self) -> Cell | None:
        """The cell with the most samples in a second."""
        return max(self.ran, key=lambda cell: cell.samples_per_s, default=None)

    @property
    def knee(self) -> Cell | None:
        """The smallest batch that reaches 95 % of the best throughput; of those the fastest."""
        if self.best is None:
            return None
        least = ENOUGH * self.best.samples_per_s
        enough = [cell for cell in self.ran if cell.samples_per_s >= least]
        return min(enough, key=lambda cell: (cell.batch, -cell.samples_per_s))

    @property
    def pareto(self) -> list[Cell]:
        """Cells that no other one beats in both latency and throughput, fastest batch first."""
        front: list[Cell] = []
        for cell in sorted(self.ran, key=lambda cell: (cell.batch_ms, -cell.samples_per_s)):
            if not front or cell.samples_per_s > front[-1].samples_per_s:
                front.append(cell)
        return front

    def within(self, limit_ms: float) -> Cell | None:
        """Return the largest batch whose whole interval keeps a latency, in its fastest cell."""
        inside = [cell for cell in self.ran if cell.high_ms <= limit_ms]
        return max(inside, key=lambda cell: (cell.batch, cell.samples_per_s), default=None)

    def fastest_within(self, limit_ms: float) -> Cell | None:
        """Return the cell with the most samples in a second that keeps a latency."""
        inside = [cell for cell in self.ran if cell.high_ms <= limit_ms]
        return max(inside, key=lambda cell: cell.samples_per_s, default=None)

    def plain(self, limit_ms: float | None = None) -> dict[str, Any]:
        """Return plain data, with what was picked."""
        picked: dict[str, Cell | None] = {"knee": self.knee, "best": self.best}
        if limit_ms is not None:
            picked["within_limit"] = self.within(limit_ms)
            picked["fastest_within_limit"] = self.fastest_within(limit_ms)
        return {
            "cells": [cell.plain() for cell in self.cells],
            "pareto": [cell.plain() for cell in self.pareto],
            "latency_limit_ms": limit_ms,
            **{name: None if cell is None else cell.plain() for name, cell in picked.items()},
        }

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        rows = [
            (
                cell.batch,
                cell.threads,
                cell.instances,
                *(
                    (f"{cell.batch_ms:.4g}", f"{cell.samples_per_s:.4g}")
                    if cell.status == "ran"
                    else ("", "")
                ),
                cell.reason,
            )
            for cell in self.cells
        ]
        head = ("batch", "threads", "instances", "ms a batch", "samples/s", "")
        return shown("", head, rows)


def grid(cores: int) -> list[tuple[int, int]]:
    """List threads x instances: powers of two, and all cores; the larger ones are oversubscribed.

    Args:
        cores: That may be used.
    """
    sizes = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    return [(threads, instances) for instances in sizes for threads in sizes]


def read_cells(text: str) -> list[tuple[int, int]]:
    """Read "1x2,2x1": threads x instances.

    Raises:
        RecipeError: it cannot be read.
    """
    found = []
    for word in text.split(","):
        threads, _, instances = word.strip().partition("x")
        if not (threads.isdecimal() and instances.isdecimal() and int(threads) * int(instances)):
            raise RecipeError(
                f"--cells {text!r}: {word.strip()!r} is not THREADSxINSTANCES, such as 1x2"
            )
        found.append((int(threads), int(instances)))
    return list(dict.fromkeys(found))


def sweep(
    start: Start,
    make: Make,
    *,
    cells: Sequence[tuple[int, int]],
    batches: Sequence[int] = BATCHES,
    cores: int | None = None,
    seconds: float = SECONDS,
    seed: int = 0,
    display: Track = silent,
) -> Sweep:
    """Measure a network at every batch size, on so many threads of so many instances.

    Instances run at the same time. The batch sizes of a cell take turns, in an order drawn anew
    each round, so that a drift of the machine meets them alike; combinations of threads and
    instances follow one another. What fails is a cell that says why, and the rest goes on.

    Args:
        start: Loads the network; called once for every instance.
        make: Makes input batches.
        cells: Threads of an instance x instances.
        batches: Samples.
        cores: Cells that need more are skipped; None: none is.
        seconds: Timed runs of each cell.
        seed: Decides the order of turns.
        display: Progress.
    """
    found: list[Cell] = []
    for threads, instances in display(cells, "sweeping", len(cells)):
        blank = [Cell(batch=b, threads=threads, instances=instances) for b in sorted(batches)]
        if cores is not None and threads * instances > cores:
            reason = f"oversubscribed: {threads} x {instances} on {cores} cores"
            found += [replace(cell, status="skipped", reason=reason) for cell in blank]
            continue
        column = _Column(start, make, threads, instances)
        try:
            found += column.measure(blank, seconds, np.random.default_rng(seed))
        finally:
            column.close()
    return Sweep(cells=tuple(found))


class _Column:
    """The processes of one combination of threads and instances, started again when one dies."""

    def __init__(self, start: Start, make: Make, threads: int, instances: int) -> None:
        self.start, self.make = start, make
        self.threads, self.count = threads, instances
        self.instances: list[Instance] = []
        self.bound: dict[int, list[Any]] = {}

    def measure(
        self, blank: Sequence[Cell], seconds: float, rng: np.random.Generator
    ) -> list[Cell]:
        failed: dict[int, Cell] = {}
        times_ms: dict[int, list[float]] = {}
        services: dict[int, list[np.ndarray]] = {}
        sample_ms = 0.0
        for cell in blank:
            expected = cell.batch * sample_ms
            if expected > SLOWEST_MS:
                reason = f"expected to take {expected / 1000:.1f} s a batch"
                failed[cell.batch] = replace(cell, status="skipped", reason=reason)
                continue
            try:
                warm = self._run(cell.batch, _WARM_UP_S, 3)
                sample_ms = float(np.median(warm[0].service_ms)) / cell.batch
                times_ms[cell.batch], services[cell.batch] = [], []
            except Exception as error:  # each runtime has its own for a batch it does not take
                failed[cell.batch] = self._failed(cell, error)
        for _ in range(ROUNDS):
            for batch in rng.permutation(sorted(times_ms)).tolist():
                if batch in failed:
                    continue
                try:
                    runs = self._run(batch, seconds / ROUNDS, 1)
                except Exception as error:
                    (cell,) = (c for c in blank if c.batch == batch)
                    failed[batch] = self._failed(cell, error)
                    continue
                times_ms[batch].append(_batch_ms(runs))
                services[batch] += [each.service_ms for each in runs]
        return [
            failed.get(c.batch) or _filled(c, times_ms[c.batch], services[c.batch]) for c in blank
        ]

    def _run(self, batch: int, seconds: float, fewest: int) -> list[Runs]:
        while len(self.instances) < self.count:
            self.instances.append(self.start(self.threads))
        if batch not in self.bound:
            inputs = self.make(batch)
            self.bound[batch] = [each.bind(inputs) for each in self.instances]
        return together(self.instances, self.bound[batch], seconds=seconds, fewest=fewest)

    def _failed(self, cell: Cell, error: Exception) -> Cell:
        if isinstance(error, ChildError):  # it is gone, or hangs; the others may wait for it
            self.close()
        text = str(error).strip() or type(error).__name__
        kind = "" if isinstance(error, TersorError) else f"{type(error).__name__}: "
        return replace(cell, status="failed", reason=f"{kind}{text}"[:300])

    def close(self) -> None:
        for instance in self.instances:
            instance.close()
        self.instances, self.bound = [], {}


def _batch_ms(runs: Sequence[Runs]) -> float:
    """Return the milliseconds of a batch in one instance: of all runs of the round, none left out.

    Args:
        runs: Of each instance.
    """
    per_ms = sum(len(r.began_ns) / ((r.ended_ns[-1] - r.began_ns[0]) / 1e6) for r in runs)
    return float(len(runs) / per_ms)


def _filled(cell: Cell, times_ms: Sequence[float], services: Sequence[np.ndarray]) -> Cell:
    low_ms, high_ms = median_interval(np.array(times_ms))
    service_ms = np.concatenate(services)
    return replace(
        cell,
        batch_ms=float(np.median(times_ms)),
        low_ms=low_ms,
        high_ms=high_ms,
        runs=service_ms.size,
        stalls=stalls(service_ms),
    )


def stalls(service_ms: np.ndarray) -> int:
    """Count the runs that took 10 times the median or longer."""
    return int((service_ms >= STALL * np.median(service_ms)).sum())


def picked(found: Sweep, limit_ms: float | None) -> Mapping[str, Cell | None]:
    """Return what a reader asks for, by the words for it."""
    made = {"most samples/s": found.best, f"knee ({ENOUGH:.0%} of it)": found.knee}
    if limit_ms is not None:
        made[f"largest batch within {limit_ms:g} ms"] = found.within(limit_ms)
        made[f"most samples/s within {limit_ms:g} ms"] = found.fastest_within(limit_ms)
    return made
