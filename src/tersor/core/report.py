"""Report: what was measured before and after, and the verdict of every stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tersor.core.metric import Measurement

Verdict = Literal["applied", "kept", "weakened", "dropped"]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Before / after of one metric, re-measured interleaved where it is a speed."""

    metric: str
    value: float
    """How many times better `after` is; above 1 is an improvement."""
    low: float
    high: float
    """The 95 % interval."""
    verdict: str
    """ "better", "worse" or "no difference"."""
    how: str = ""
    difference: tuple[float, float, float] | None = None
    """Of quality metrics: after - before on the same samples, in the metric's unit, and the ends of
    its paired 95 % interval."""
    p: float | None = None
    """Two-sided p value of the paired test that `how` names."""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One stage and what became of it."""

    name: str
    """Its techniques, joined by " + "."""
    verdict: Verdict
    """ "applied" without a goal."""
    reason: str
    """Why, with the numbers."""
    measurements: tuple[Measurement, ...] = ()
    """The network after this stage, on the split that decides."""
    speed: Ratio | None = None
    """Latency against the stage before, interleaved, where the goal speaks of a speed."""
    seconds: float = 0.0
    """Wall time of the stage: applying, exporting, measuring."""
    settings: tuple[Mapping[str, Any], ...] = ()
    """The steps as they were applied, as in a recipe."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the techniques recorded, by technique."""
    attempts: tuple[Mapping[str, Any], ...] = ()
    """Every try before the last one: settings, measurements, reason."""
    predicted: tuple[float, float] | None = None
    """How many times better `advise` predicted that the goal's metric would become: from, to."""


@dataclass(frozen=True, kw_only=True)
class LimitReport:
    """One limit of the goal, checked on the final split."""

    metric: str
    text: str
    """As the user wrote it."""
    bound: float
    value: float
    unit: str
    holds: bool
    interval: tuple[float, float] | None = None
    """Paired 95 % interval of value (change against the original, for quality metrics)."""


@dataclass(frozen=True, kw_only=True)
class OperatorReport:
    """One operator as the runtime executes it."""

    name: str
    """The runtime's profiler's."""
    kind: str
    """The runtime's word for it, such as QLinearConv."""
    part: str
    """Kind of work: "convolutions", "rounding" ..."""
    ms: float
    """Of one run."""
    layer: str = ""
    """The layer of the network that it computes, where that is known."""


@dataclass(frozen=True, kw_only=True)
class OperatorsReport:
    """Where the time goes, before and after."""

    before: tuple[OperatorReport, ...] = ()
    after: tuple[OperatorReport, ...] = ()
    how: str = ""
    """How the times were taken, or why there are none."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a run has to say."""

    schema: int = 1
    origin: str = ""
    """Where the network came from."""
    target: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe, as plain data."""
    before: tuple[Measurement, ...] = ()
    """The untouched network, exported to the same target in fp32."""
    after: tuple[Measurement, ...] = ()
    start: tuple[Measurement, ...] = ()
    """The untouched network on the split that decides, as the stages are measured."""
    stages: tuple[StageReport, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    limits: tuple[LimitReport, ...] = ()
    reached: bool = True
    """Whether every limit holds at the end."""
    warnings: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Machine, library versions, threads, seed."""
    operators: OperatorsReport | None = None
    """Where the time goes; None: written before reports had it."""
    seconds: float = 0.0
    command: str = ""
    """How to repeat the run."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown
        from tersor.core.report_view import change, figure, headline, pairs

        rows = [(p.metric, figure(p.before), figure(p.after), change(p)) for p in pairs(self)]
        stages = [(s.name, s.verdict, s.reason) for s in self.stages]
        limits = "" if self.reached else "a limit is not reached"
        return shown(
            headline(self), ("metric", "before", "after", "change"), rows, (limits, *self.warnings)
        ) + shown("", ("stage", "verdict", "reason"), stages)
