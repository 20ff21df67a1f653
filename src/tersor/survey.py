"""survey(): one network on every runtime. Does it export, run, agree, and what does it cost there?

Each runtime works in child processes: one that fails, or crashes, is a row with a reason, and the
others go on. All that run are then timed in turns.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tersor import benchmark
from tersor.candidate import Candidate, export, inputs_for, score
from tersor.core import environments, plugins
from tersor.core.context import Data, Track, silent
from tersor.core.errors import DataError, DependencyError, RecipeError, TersorError, suggest
from tersor.core.metric import Measurement
from tersor.core.model import Inputs, Model, may_lower
from tersor.core.runtime import Runtime, Target
from tersor.core.statistics import log_ratio_interval, median_interval, quantile_interval
from tersor.core.timing import Calls, quiet, time_runs, warm_up
from tersor.feeds import array_of, arrays_of, timing_inputs
from tersor.ops.lower import lower
from tersor.ops.torch_runner import TorchRunner

METRICS = ("size", "peak_memory")
"""Measured for every runtime besides the quality and the times."""
TIMED_S = 1.5
"""Seconds of timed runs of each runtime, alone, for the percentiles."""
_FIRST = "onnxruntime"
BLOCKS_S = 2.0
"""Seconds of each runtime in the contest of all."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one runtime made of the network."""

    runtime: str
    status: Literal["ran", "failed", "skipped"]
    """failed: it is here, and does not run this network; skipped: it is not here."""
    reason: str = ""
    """Why it did not run."""
    exported: bool = False
    """Whether it wrote its files."""
    export_s: float | None = None
    """Seconds of writing and loading them, and of the comparison with the network in memory."""
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    """By metric; latency is the median, latency_p90 the 90th percentile, both of one batch."""
    speed: tuple[float, float, float] | None = None
    """How many times faster than the first row that ran, with a 95 % interval; interleaved."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A network on every runtime."""

    subject: str
    batch: int
    threads: int
    split: str
    """Where quality was measured."""
    rows: tuple[Row, ...]
    how: str
    """How the times were taken."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown
        from tersor.core.report_view import figure

        names = list(dict.fromkeys(name for row in self.rows for name in row.measurements))
        rows = [
            (row.runtime, row.status, *(figure(row.measurements.get(n)) for n in names), row.reason)
            for row in self.rows
        ]
        title = f"{self.subject}: batch {self.batch}, threads {self.threads}"
        return shown(title, ("runtime", "status", *names, "reason"), rows, [self.how])


def survey(
    model: Model,
    *,
    data: Data,
    inputs: Inputs,
    runtimes: Sequence[str] = (),
    metrics: Sequence[str] = METRICS,
    batch: int = 1,
    threads: int = 0,
    split: str = "test",
    seed: int = 0,
    display: Track = silent,
) -> Survey:
    """Export a network to every runtime, run and measure it there.

    Args:
        model: In any form. A runtime of an earlier form is skipped.
        data: Holds `split`; quality is measured where it has labels.
        inputs: How to call the network.
        runtimes: Names; all that there are by default.
        metrics: Measured besides quality and times.
        batch: Samples of a timed batch.
        threads: Of a run; 0 means all usable cores.
        split: The split that quality is measured on and inputs are taken from.
        seed: Decides the order of turns and the bootstrap.
        display: Progress.

    Raises:
        RecipeError: an unknown runtime. DataError: the data lack the split.
    """
    # the others are compared with the first one
    names = tuple(runtimes) or tuple(sorted(plugins.names("runtimes"), key=lambda n: n != _FIRST))
    for name in names:
        if name not in plugins.names("runtimes"):
            raise RecipeError(
                f"unknown runtime {name!r}.{suggest(name, plugins.names('runtimes'))}"
            )
    batches = getattr(data, split, None) or ()
    first = next(iter(batches), None)
    if first is None:
        raise DataError(f"the data have no split {split!r} to measure on")
    classes = "labels" in first and array_of(first["labels"]).dtype.kind in "iub"
    wanted = [*dict.fromkeys([*metrics, "fidelity", *(["accuracy"] if classes else [])])]
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder, ExitStack() as open_runners:
        work = _Work(model, inputs, data, Path(folder), wanted, batch, threads, split)
        rows: list[Row] = []
        running: dict[int, Calls] = {}
        for name in display(names, "running on each runtime", len(names)):
            row, candidate = work.row(name)
            if candidate is not None:
                open_runners.callback(candidate.close)
                try:
                    timed = timing_inputs(batches, batch)
                    running[len(rows)] = [candidate.runner.bind(arrays) for arrays in timed]
                except Exception as error:
                    row = replace(row, status="failed", reason=_words(error))
            rows.append(row)
        for i, made in _timed(running, seed).items():
            rows[i] = replace(
                rows[i], speed=made[0], measurements={**rows[i].measurements, **made[1]}
            )
    return Survey(
        subject=model.origin,
        batch=batch,
        threads=threads,
        split=split,
        rows=tuple(rows),
        how=f"percentiles of each alone, for {TIMED_S:g} s after warming up; ratios of medians of "
        "turns interleaved in random order, 95 % block bootstrap; times are taken in the process "
        "that runs the network",
    )


class _Work:
    """What the rows share: the network in the forms that were needed so far, and its outputs."""

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        data: Data,
        folder: Path,
        metrics: Sequence[str],
        batch: int,
        threads: int,
        split: str,
    ) -> None:
        self.model, self.inputs, self.data, self.folder = model, inputs, data, folder
        self.metrics, self.batch, self.threads, self.split = metrics, batch, threads, split
        self.lowered: dict[tuple[str, bool], Any] = {}
        self.reference = _in_memory(model, inputs, data, split)

    def row(self, name: str) -> tuple[Row, Candidate | None]:
        """Try one runtime."""
        runtime = plugins.own_runtime(name)
        skipped = _skipped(name, runtime, self.model)
        if skipped:
            return Row(runtime=name, status="skipped", reason=skipped), None
        target = Target(runtime=name, options={"threads": self.threads})
        candidate, place = None, self.folder / name
        try:
            first = next(iter(getattr(self.data, self.split)))
            lowered = self._lowered(runtime)
            began = time.perf_counter()
            candidate = export(
                self.model.net,
                place,
                self.inputs,
                target,
                {name: arrays_of(first)[name] for name in self.inputs.example},
                batch=self.batch,
                runtime=plugins.apart(name),
                lowered=lowered,
            )
            export_s = time.perf_counter() - began
            made = self._measured(candidate)
        except Exception as error:
            if candidate is not None:
                candidate.close()
            written = place.is_dir() and any(place.iterdir())
            kind = "skipped" if isinstance(error, DependencyError) else "failed"
            return (
                Row(runtime=name, status=kind, reason=_words(error), exported=written),  # type: ignore[arg-type]  # one of two literals
                None,
            )
        row = Row(runtime=name, status="ran", exported=True, export_s=export_s, measurements=made)
        return row, candidate

    def _lowered(self, runtime: Runtime) -> Any:
        """Lower once for all runtimes that take the same."""
        key = (runtime.takes, runtime.fixed_batch)
        if key not in self.lowered:
            way = inputs_for(runtime, self.inputs, self.batch)
            self.lowered[key] = lower(self.model.net, runtime.takes, way)
        return self.lowered[key]

    def _measured(self, candidate: Candidate) -> dict[str, Measurement]:
        scores = score(
            candidate,
            self.metrics,
            self.split,
            self.data,
            batch=self.batch,
            reference=self.reference,
        )
        if self.reference is None:  # an ONNX file: the first runtime is what others are compared to
            self.reference = scores.outputs
        return dict(scores.measurements)


def _in_memory(model: Model, inputs: Inputs, data: Data, split: str) -> np.ndarray | None:
    """Return the outputs of the network as it is in memory; None for an ONNX file."""
    if model.form == "onnx":
        return None
    net = model.net if model.form == "module" else model.net.module()
    runner = TorchRunner(net, list(inputs.example), Target(runtime="torch_eager"))
    return benchmark.evaluate(runner, getattr(data, split))[0]


def _skipped(name: str, runtime: Runtime, model: Model) -> str:
    """Say why a runtime is not tried; nothing where it is."""
    if not may_lower(model.form, runtime.takes):
        return f"takes a network of form {runtime.takes}, this one is of form {model.form}"
    for package in (*runtime.to_export, *runtime.to_run):
        if not plugins.installed(package) and environments.python(name) is None:
            return str(plugins.missing("runtimes", name, package))
    return ""


def _words(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, TersorError) else f"{type(error).__name__}: {text}"[:400]


def _timed(
    running: Mapping[int, Calls], seed: int
) -> dict[int, tuple[tuple[float, float, float], dict[str, Measurement]]]:
    """Time each alone for percentiles, then all in turns for ratios to the first."""
    if not running:
        return {}
    alone = {i: _percentiles(calls) for i, calls in running.items()}
    blocks = benchmark.interleave(
        list(running.values()), budget_s=BLOCKS_S * len(running), seed=seed, warm_up_s=0.2
    )
    found = {}
    for i, times_ms in zip(running, blocks, strict=True):
        logs = np.log(blocks[0]) - np.log(times_ms)
        middle, low, high = np.exp(log_ratio_interval(logs, seed=seed))
        found[i] = ((float(middle), float(low), float(high)), alone[i])
    return found


def _percentiles(calls: Calls) -> dict[str, Measurement]:
    """Measure the median and the 90th percentile of a run."""
    warm_up(calls)
    taken: list[np.ndarray] = []
    began = time.perf_counter()
    with quiet():
        while not taken or time.perf_counter() - began < TIMED_S:
            taken.append(time_runs(calls, len(taken), 1))
    times_ms = np.concatenate(taken)
    high = quantile_interval(times_ms, 0.9)
    made = {
        "latency": Measurement(
            metric="latency",
            value=float(np.median(times_ms)),
            unit="ms",
            better="lower",
            spread=median_interval(times_ms),
            count=times_ms.size,
            how=f"median of {times_ms.size} runs",
        )
    }
    if high is not None:
        made["latency_p90"] = Measurement(
            metric="latency_p90",
            value=float(np.quantile(times_ms, 0.9)),
            unit="ms",
            better="lower",
            spread=high,
            count=times_ms.size,
            how=f"90th percentile of {times_ms.size} runs",
        )
    return made
