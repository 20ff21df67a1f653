"""Metric and Measurement: size, latency and accuracy are the same kind of thing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from tersor.core.runtime import Arrays, Runner, Target

if TYPE_CHECKING:
    from tersor.core.resampling import Score

Better = Literal["lower", "higher"]
Task = Literal["classes", "scores", "tokens", "positions", "pixels", "numbers", "boxes"]
"""What the labels of a network are; see `scoring.tasks_of`."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured figure, and how it was measured."""

    metric: str
    """Name of a file in `metrics/`."""
    value: float
    """The figure, in `unit`."""
    unit: str
    """ "ms", "B", "%", "1/s", "1", "J", "s"."""
    better: Better
    """Which direction is an improvement."""
    spread: tuple[float, float] | None = None
    """The 95 % confidence interval of `value`."""
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)
    """batch, threads, precision, split ..."""
    count: int = 1
    """Runs or samples behind the value."""
    how: str = ""
    """For a reader: "median of 200 runs after 20, batch 1, 1 thread"."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown
        from tersor.core.report_view import figure

        return shown("", ("metric", "value", "how"), [(self.metric, figure(self), self.how)])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a metric looks at; what does not apply is None."""

    target: Target
    """Where it runs."""
    net: Any = None
    """The network in memory: nn.Module, ExportedProgram or onnx.ModelProto."""
    files: Sequence[Path] | None = None
    """All files the runtime needs, the first one to be loaded."""
    runner: Runner | None = None
    """The loaded network."""
    inputs: Sequence[Arrays] | None = None
    """At least 16 distinct input batches of the batch size asked for, for timing."""
    outputs: np.ndarray | None = None
    """First output over a whole split, samples first."""
    labels: np.ndarray | None = None
    """Labels of that split."""
    reference: np.ndarray | None = None
    """First output of the original network over that split."""
    split: str = ""
    """Name of the split behind outputs and labels."""
    quality: Callable[[Any, Any], float] | None = None
    """The user's own metric: (outputs, labels) of a whole split -> number."""
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)
    """batch and threads, as they go into the measurement."""


Measure = Callable[[Subject], Measurement]
M = TypeVar("M", bound=Measure)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is known of a file in `metrics/`."""

    name: str
    unit: str
    better: Better
    needs: tuple[str, ...]
    summary: str
    measure: Measure
    score: "Callable[[Subject], Score] | None" = None
    """How a split is scored sample by sample, which a paired test needs."""
    tasks: tuple[Task, ...] = ()
    """What labels it has a meaning for; none: any."""
    proxy: str = ""
    """The metric that is measured in its place where a machine cannot measure it."""


def metric(
    *,
    unit: str,
    better: Better,
    needs: tuple[str, ...] = (),
    score: "Callable[[Subject], Score] | None" = None,
    tasks: tuple[Task, ...] = (),
    proxy: str = "",
) -> Callable[[M], M]:
    """Mark a function as the metric of its file.

    Args:
        unit: Unit of the value.
        better: Which direction is an improvement.
        needs: Fields of Subject that must not be None.
        score: How outputs and labels are scored sample by sample; changes are then paired.
        tasks: What labels it has a meaning for; with others it is refused before there is work.
        proxy: The metric that it returns in its place where the machine has no means to measure it;
            the measurement's condition of the metric's own name is then "unavailable".
    """

    def mark(measure: M) -> M:
        measure.__metric__ = {  # type: ignore[attr-defined]  # read back by plugins.metric
            "unit": unit,
            "better": better,
            "needs": needs,
            "score": score,
            "tasks": tasks,
            "proxy": proxy,
        }
        return measure

    return mark
