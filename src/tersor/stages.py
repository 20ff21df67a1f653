"""The stages of a run: apply, export, measure, judge, store."""

import copy
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor import _ratios, benchmark, workspace
from tersor.candidate import Candidate, Scores, arrays_of, export, latencies, reopen, score
from tersor.core import plugins
from tersor.core.context import Context, Data, Fit, Track, under_way
from tersor.core.errors import StepError, TargetError, TersorError, UnfitError
from tersor.core.hardware import environment
from tersor.core.metric import Measurement
from tersor.core.model import Inputs
from tersor.core.recipe import Recipe, stage_name, step_name
from tersor.core.report import LimitReport, Ratio, Report, StageReport, Verdict
from tersor.core.resampling import Paired
from tersor.core.schema import Mistakes, changed, from_plain, to_plain
from tersor.operator_times import operator_times
from tersor.ops import edits, losses, masks, pt2, sharing
from tersor.ops.fake_quantize import settle
from tersor.ops.lower import form_of, lower
from tersor.verdict import SPEEDS, Decision, Evidence, check_limits, judge

WEAKER_TRIES = 2
"""How often a stage that breaks a limit is tried again, weaker."""
SAME_OUTPUTS = 1e-3
"""Relative root-mean-square change of the outputs that sums in another order explain."""
STAGE_EFFECT = 0.01
"""Smallest speed difference that a stage can be kept or dropped for."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The network at one point of the run: in memory, on the target, and what was measured."""

    net: Any
    candidate: Candidate
    scores: Scores
    folder: Path | None = None
    """The finished stage that it comes from."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attempt at a stage; without a state it could not be applied."""

    stage: tuple[Any, ...]
    decision: Decision
    state: State | None = None
    speed: Ratio | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """What was measured of the network."""
        return () if self.state is None else tuple(self.state.scores.measurements.values())

    def plain(self) -> dict[str, Any]:
        """Return what a report says of an attempt."""
        return {
            "settings": [_settings(c) for c in self.stage],
            "reason": self.decision.reason,
            "measurements": to_plain(list(self.measurements)),
            "speed": to_plain(self.speed),
        }

    def close(self) -> None:
        """Free the network on the target."""
        if self.state is not None:
            self.state.candidate.close()


@dataclass(kw_only=True)
class Run:
    """What stays the same over a run."""

    recipe: Recipe
    inputs: Inputs
    data: Data
    original: Any
    names: tuple[str, ...]
    batch: int
    seed: int
    fit: Fit
    work: Path
    teacher: Any = None
    display: Track
    warnings: list[str] = field(default_factory=list)
    predicted: Sequence[tuple[float, float]] = ()
    """Of each stage, how many times better the goal's metric was to become."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked where little is lost: before the steps of a stage, and while training."""
    first: State | None = None
    """The untouched network, once it was measured."""

    def stop_if_asked(self) -> None:
        """End the run here if somebody asked for it.

        Raises:
            KeyboardInterrupt: somebody did.
        """
        if self.should_stop():
            raise KeyboardInterrupt

    def start(self) -> State:
        """Export and measure the untouched network: "before"."""
        self.first = self._measured(self.original, self.work / "original")
        goal = self.recipe.goal
        for name in () if goal is None else (goal.best, *goal.limits):
            if name not in self.first.scores.measurements:
                proxy = plugins.metric(name).proxy
                why = self.first.scores.measurements[proxy].how
                raise TargetError(f"the goal speaks of {name}; {why}. Set the goal on {proxy}")
        return self.first

    def stage(self, index: int, stage: tuple[Any, ...], before: State) -> tuple[State, StageReport]:
        """Apply one stage, weaker where it is too strong, and judge it."""
        found = workspace.finished(self.work, index)
        if found is not None:
            return self._restored(index, found, before)
        started = time.perf_counter()
        name = stage_name(stage)
        rejected: list[Mapping[str, Any]] = []
        folder = workspace.begin(self.work, index)
        trial = self.trial(index, 0, stage, before, folder)
        while trial.decision.too_strong and len(rejected) < WEAKER_TRIES:
            weaker = _weaker(trial.stage)
            if weaker is None:
                break
            trial.close()
            rejected.append(trial.plain())
            trial = self.trial(index, len(rejected), weaker, before, folder)
        done = StageReport(
            name=name,
            verdict=self._verdict(trial, bool(rejected)),
            reason=trial.decision.reason,
            measurements=trial.measurements,
            speed=trial.speed,
            seconds=time.perf_counter() - started,
            settings=tuple(_settings(c) for c in trial.stage),
            facts=trial.facts,
            attempts=tuple(rejected),
            predicted=self.predicted[index] if index < len(self.predicted) else None,
        )
        after = trial.state
        if after is None or not trial.decision.keep:
            trial.close()
            workspace.clear(folder)
            workspace.finish(self.work, index, {"stage": done})
            return before, done
        workspace.clear(folder, keep=after.candidate.files[0].parent, under="target")
        self._store(after.net, folder)
        names = [file.name for file in after.candidate.files]
        workspace.finish(self.work, index, {"stage": done, "target": names})
        # what is stored is what goes on, so that a resumed run cannot differ
        after.candidate.close()
        return self._restored(
            index, {"stage": to_plain(done), "target": names}, before, after.scores
        )

    def _restored(
        self, index: int, found: Mapping[str, Any], before: State, scores: Scores | None = None
    ) -> tuple[State, StageReport]:
        """Open a finished stage from its folder."""
        mistakes = Mistakes()
        done = from_plain(StageReport, found["stage"], ("stage",), mistakes)
        assert done is not None, mistakes.found
        if done.verdict == "dropped":
            return before, done
        folder = self.work / f"{index:02d}"
        net = self._replayed(folder)
        files = [folder / "target" / name for name in found["target"]]
        candidate = reopen(net, files, self.recipe.target)
        if scores is None:
            scores = self._scores(candidate)
        if before is not self.first:
            before.candidate.close()
        return State(net=net, candidate=candidate, scores=scores, folder=folder), done

    def _store(self, net: Any, folder: Path) -> None:
        form = form_of(net)
        if form == "module":
            edits.store(net, self.original, folder)
        elif form == "exported":
            torch.export.save(net, folder / "network.pt2")
        else:
            (folder / "network.onnx").write_bytes(net.SerializeToString(deterministic=True))

    def _replayed(self, folder: Path) -> Any:
        if (folder / "network.json").exists():
            return edits.replay(folder, copy.deepcopy(self.original))
        if (folder / "network.pt2").exists():
            return pt2.read(folder / "network.pt2")
        import onnx

        return onnx.load(folder / "network.onnx")

    def trial(
        self, index: int, attempt: int, stage: tuple[Any, ...], before: State, folder: Path
    ) -> "Trial":
        """Apply a stage and judge it; with a goal, one that does not fit is judged for that.

        Args:
            index: Of the stage.
            attempt: At it.
            stage: Configs of its steps.
            before: What it is applied to, and compared with.
            folder: For its files.
        """
        try:
            after, facts = self._apply(index, attempt, stage, before, folder)
        except UnfitError as error:
            if self.recipe.goal is None:
                raise
            unfit = Decision(
                keep=False, reason=f"cannot be applied: {error}", too_strong=error.too_strong
            )
            return Trial(stage=stage, decision=unfit)
        decision, speed = self._judge(before, after)
        return Trial(stage=stage, decision=decision, state=after, speed=speed, facts=facts)

    def _verdict(self, trial: "Trial", weakened: bool) -> Verdict:
        if self.recipe.goal is None:
            return "applied"
        if not trial.decision.keep:
            return "dropped"
        return "weakened" if weakened else "kept"

    def _apply(
        self, index: int, attempt: int, stage: tuple[Any, ...], before: State, folder: Path
    ) -> tuple[State, dict[str, Any]]:
        net = copy.deepcopy(before.net)
        facts: dict[str, Any] = {}
        for number, config in enumerate(stage):
            step = plugins.technique_of(config)
            place = f"step {number + 1} of stage {index + 1} ({step.name})"
            checkpoints = folder / workspace.CHECKPOINTS / f"{attempt}-{number}-{step.name}"
            checkpoints.mkdir(parents=True, exist_ok=True)
            own: dict[str, Any] = {}
            self.stop_if_asked()
            context = self._context(checkpoints, own)
            torch.manual_seed(self.seed)
            np.random.seed(self.seed)
            try:
                net = step.apply(lower(net, step.form, self.inputs), config, context)
            except (TersorError, KeyboardInterrupt):
                raise
            except Exception as error:
                raise StepError(f"{place}: {type(error).__name__}: {error}") from error
            if net is None:
                raise StepError(f"{place} returned nothing; a technique must return the network")
            if form_of(net) == "module":
                net.eval()
            facts[step.name] = to_plain(own)
        net = settle(masks.settle(net))
        gc.collect()
        return self._measured(net, folder / "tries" / str(attempt)), facts

    def _context(self, checkpoints: Path, facts: dict[str, Any]) -> Context:
        def timed(nets: Sequence[Any]) -> Sequence[float]:
            return latencies(
                nets, self.inputs, self.recipe.target, self.data, checkpoints, batch=self.batch
            )

        return Context(
            inputs=self.inputs,
            data=self.data.without_test(),
            target=self.recipe.target,
            loss=losses.task_loss(self.data, self.recipe.training.label_smoothing),
            fit=sharing.keeping(self.fit),
            latency=timed,
            work_dir=checkpoints,
            seed=self.seed,
            reference=self.original,
            teacher=self.teacher,
            batch=self.batch,
            facts=facts,
            display=self.display,
        )

    def _measured(self, net: Any, folder: Path) -> State:
        sample = arrays_of(next(iter(self.data.validation or ())), self.inputs.example)
        target = self.recipe.target
        with under_way(self.display, f"exporting to {target}"):
            candidate = export(net, folder, self.inputs, target, sample, batch=self.batch)
        with under_way(self.display, "measuring"):
            return State(net=net, candidate=candidate, scores=self._scores(candidate))

    def _scores(self, candidate: Candidate) -> Scores:
        names = [n for n in self.names if n not in SLOW or self._decides(n)]
        reference = None if self.first is None else self.first.scores.outputs
        return score(
            candidate, names, "validation", self.data, batch=self.batch, reference=reference
        )

    def _decides(self, name: str) -> bool:
        goal = self.recipe.goal
        return goal is not None and (name == goal.best or name in goal.limits)

    def _judge(self, before: State, after: State) -> tuple[Decision, Ratio | None]:
        goal = self.recipe.goal
        if goal is None:
            return Decision(keep=True, reason="applied as written: no goal was given"), None
        contest = None
        if any(n in SPEEDS for n in (goal.best, *goal.limits)):
            with under_way(self.display, "timing it against the stage before"):
                contest = benchmark.contest(
                    before.candidate.runner,
                    after.candidate.runner,
                    self._timed("validation"),
                    min_effect=STAGE_EFFECT,
                    seed=self.seed,
                )
        assert self.first is not None
        quality = {}
        for name, found in self._changes(before.scores, after.scores).items():
            ends = found.difference, found.low, found.high
            falls = before.scores.measurements[name].better == "lower"
            quality[name] = (-ends[0], -ends[2], -ends[1]) if falls else ends
        scale = float(np.sqrt(np.mean(np.square(before.scores.outputs, dtype=np.float64)))) or 1.0
        moved = after.scores.outputs.astype(np.float64) - before.scores.outputs
        seen = Evidence(
            original=self.first.scores.measurements,
            before=before.scores.measurements,
            after=after.scores.measurements,
            contest=contest,
            unchanged=float(np.sqrt(np.mean(np.square(moved)))) / scale <= SAME_OUTPUTS,
            quality=quality,
        )
        return judge(goal, seen), None if contest is None else _ratios.of_contest(contest)

    def _changes(self, before: Scores, after: Scores) -> dict[str, Paired]:
        """Compare every quality metric on the same samples, where there are labels."""
        if before.labels is None:
            return {}
        changes = {
            name: benchmark.paired(
                name,
                before.outputs,
                after.outputs,
                before.labels,
                quality=self.data.quality,
                seed=self.seed,
            )
            for name in before.measurements
        }
        return {name: found for name, found in changes.items() if found is not None}

    def _timed(self, split: str) -> list[Any]:
        names = list(self.inputs.example)
        batches = ({n: b[n] for n in names} for b in getattr(self.data, split))
        return benchmark.timing_inputs(batches, self.batch)

    def final(
        self, before: State, after: State, stages: tuple[StageReport, ...], strict: bool
    ) -> Report:
        """Measure before and after on `test`, which no decision has seen."""
        first = score(
            before.candidate, self.names, "test", self.data, batch=self.batch, reference=None
        )
        last = score(
            after.candidate,
            self.names,
            "test",
            self.data,
            batch=self.batch,
            reference=first.outputs,
        )
        intervals: dict[str, tuple[float, float]] = {}
        ratios = [
            _ratios.of_figures(first.measurements[n], last.measurements[n])
            for n in first.measurements
            if n not in SPEEDS
        ]
        changes = self._changes(first, last)
        for name, found in changes.items():
            m = first.measurements[name]
            most = 100.0 if m.unit == "%" else math.inf
            intervals[name] = (m.value + found.low, min(m.value + found.high, most))
            if m.value >= 0:
                intervals[name] = (max(intervals[name][0], 0.0), intervals[name][1])
        ratios = [
            _ratios.with_interval(r, first.measurements[r.metric], changes[r.metric])
            if r.metric in changes
            else r
            for r in ratios
        ]
        if "latency" in self.names:
            c = benchmark.contest(
                before.candidate.runner, after.candidate.runner, self._timed("test"), seed=self.seed
            )
            ratios.insert(0, _ratios.of_contest(c))
        limits: tuple[LimitReport, ...] = ()
        if self.recipe.goal is not None:
            limits = check_limits(
                self.recipe.goal, first.measurements, last.measurements, intervals, strict
            )
        return Report(
            target=after.candidate.target.text,
            recipe=self.recipe.plain(),
            before=tuple(first.measurements.values()),
            after=tuple(last.measurements.values()),
            start=() if self.first is None else tuple(self.first.scores.measurements.values()),
            stages=stages,
            ratios=tuple(ratios),
            limits=limits,
            reached=all(limit.holds for limit in limits),
            warnings=(*self.warnings, *_small(first), *_unavailable(first)),
            operators=operator_times(before.candidate, after.candidate, self._timed("test")),
            environment={**environment(), "seed": self.seed, "batch": self.batch},
        )


SLOW = ("peak_memory", "energy", "cpu_seconds")
"""Measured after every stage only where the goal speaks of them."""


def _settings(config: Any) -> dict[str, Any]:
    """Return a step as in a recipe: its name and the settings that are not the default."""
    return {step_name(config): changed(config)}


def _weaker(stage: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the stage with every step that can be weaker weakened; None if none can."""
    any_weaker = False
    made = []
    for config in stage:
        weaker = config.weaker() if hasattr(config, "weaker") else None
        any_weaker |= weaker is not None
        made.append(config if weaker is None else weaker)
    return tuple(made) if any_weaker else None


def _small(scores: Scores) -> list[str]:
    count = len(scores.outputs)
    if count >= 1000:
        return []
    return [f"the final split has only {count} samples: a difference of one point is within noise"]


def _unavailable(scores: Scores) -> list[str]:
    """Say what could not be measured here, and what was in its place."""
    return [m.how for m in scores.measurements.values() if "unavailable" in m.conditions.values()]
