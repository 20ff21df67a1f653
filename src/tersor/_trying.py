"""The trials of advise(): what becomes of each idea, and what that lets expect of a whole run."""

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tersor import roofline
from tersor._advice import (
    Idea,
    facts_of,
    foldings,
    fusions,
    lacking,
    packers,
    quantizers,
    shrinkers,
    trained,
)
from tersor.core import plugins
from tersor.core.context import Batch, Fit
from tersor.core.errors import TersorError
from tersor.core.goal import Limit, inside
from tersor.explainer import work_of
from tersor.feeds import timing_inputs
from tersor.stages import Run, State, Trial
from tersor.verdict import SPEEDS, bound_of, show

TRIED_S = 20.0
"""Seconds of training that a smaller network is given before it is judged."""
HOPE = 0.63
"""A network may lack as many times the allowed loss as it is to train longer, to this power: nine
times as long, four times the loss."""
LEAST = 1.05
"""Gain below which a smaller network is not worth its training, or a smaller file its packing."""
MOST_EPOCHS = 50.0
SPREAD = 1.3
"""A gain that was seen is predicted within this factor of it, both ways."""
WEAKER = 1.6
"""The same downwards for steps that `compress` makes weaker where they break a limit."""
EXACT = 1.1
"""The same for sizes, which depend on the steps before alone."""
AGAIN = 0.8
"""Share of the best gain from which on a number format is tried after the next fusions, too."""
MOST_RANGE = 1.95
"""Upper end of a range to its lower one, at most."""
_SAME = 1.005
"""Ratio below which two figures are called the same."""
_TIMED = 3
"""Batches that a trainer is timed on."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A stage that pays, and what it can be expected to buy."""

    stage: tuple[Any, ...]
    """Its steps, as in a recipe."""
    why: str
    gain: tuple[float, float]
    """How many times better the goal's metric becomes: from, to."""
    seen: str
    """What the trial showed."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A stage that was tried, or looked at, and is not in the recipe."""

    stage: tuple[Any, ...]
    reason: str


class Brief:
    """A trainer that stops after some seconds; it learns how long a pass over the data takes."""

    fit: Fit
    seconds: float
    epoch_s: float
    """Of the last training."""
    epochs: float
    """Passes that it had."""

    def __init__(self, fit: Fit, seconds: float) -> None:
        self.fit, self.seconds = fit, seconds
        self.epoch_s = self.epochs = 0.0

    def __call__(
        self, net: nn.Module, loss: Any, *, batches: Iterable[Batch], epochs: float, **settings: Any
    ) -> nn.Module:
        """Train for as long as that; the learning rate falls to zero on the way."""
        settings.pop("checkpoint", None)
        few = list(itertools.islice(batches, _TIMED))
        began = time.perf_counter()
        self.fit(copy.deepcopy(net), loss, batches=few, epochs=1.0, **settings)
        a_batch = (time.perf_counter() - began) / max(1, len(few))
        total = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
        self.epoch_s = a_batch * total
        self.epochs = min(epochs, max(1, int(self.seconds / a_batch)) / max(1, total))
        made: nn.Module = self.fit(net, loss, batches=batches, epochs=self.epochs, **settings)
        return made


@dataclass(kw_only=True)
class Trials:
    """The trials, and what came of them."""

    run: Run
    brief: Brief
    minutes: float
    should_stop: Callable[[], bool]
    refusals: list[Refusal] = field(default_factory=list)
    prepared: list[Suggestion] = field(default_factory=list)
    shrunk: list[Suggestion] = field(default_factory=list)
    quantized: list[Suggestion] = field(default_factory=list)
    packed: list[Suggestion] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.first = self.run.start()
        self.starts = [_Start(state=self.first)]
        """What number formats are tried on."""
        self.states: list[State] = []
        """That are to be closed."""
        self.last = self.first
        """With fusions and number format."""
        run, goal = self.run, self.run.recipe.goal
        assert goal is not None
        self.goal = goal
        batches = next(b for b in (run.data.calibration, run.data.validation) if b is not None)
        names = list(run.inputs.example)
        self.feeds = timing_inputs(({n: b[n] for n in names} for b in batches), run.batch)
        work = work_of(run.original, self.feeds[0])
        self.facts = facts_of(
            run.original, run.inputs, work, run.recipe.target, run.data, goal, MOST_EPOCHS
        )

    @property
    def phases(self) -> list[Callable[[], None]]:
        """What is tried, in the order of trying; smaller networks come first in the recipe."""
        return [self.prepare, self.quantize, self.pack, self.shrink]

    def suggestions(self) -> tuple[Suggestion, ...]:
        """Return what pays, in the order of the recipe."""
        return (*self.shrunk, *self.prepared, *self.quantized, *self.packed)

    def profiled(self) -> tuple[str, ...]:
        """Say what limits the network here; nothing where the runtime does not tell."""
        file, target = self.first.candidate.files[0], self.first.candidate.target
        runtime = plugins.runtime(target.runtime)
        if file.suffix != ".onnx" or runtime.profile is None or runtime.fused is None:
            return ()
        found = roofline.profile(file, target, self.feeds[:4], batch=self.run.batch)
        return found.words

    def prepare(self) -> None:
        """Try what changes no output, group by group."""
        self.starts = [self._chain(foldings(self.facts), self.starts[0])]
        for group in fusions(self.facts):
            after = self._chain(group, self.starts[-1])
            if after is not self.starts[-1]:
                self.starts.append(after)

    def _chain(self, ideas: Sequence[Idea], start: "_Start") -> "_Start":
        """Apply ideas one after the other, those that pay."""
        for idea in ideas:
            trial = self._tried(idea.stage, start.state)
            if trial is None:
                continue
            gain = _gain(trial, self.goal.best, start.state)
            if trial.state is None or not trial.decision.keep:
                self._refused(idea.stage, trial)
                continue
            self.states.append(trial.state)
            made = _suggestion(idea, idea.stage, gain, trial, SPREAD)
            start = _Start(
                state=trial.state, kept=(*start.kept, made), gain=start.gain * max(gain, 1.0)
            )
        return start

    def quantize(self) -> None:
        """Take the number format that comes nearest to the limits and, of those, buys most.

        It is tried with and without the fusions.
        """
        best = max(self.starts, key=lambda each: each.gain)
        most, near, self.prepared = best.gain, self._reached(best.state), list(best.kept)
        self.last = best.state
        found: list[tuple[float, float, Suggestion]] = []
        ideas = quantizers(self.facts)
        for start in self.starts:
            gains: dict[int, float] = {}
            for number, idea in enumerate(ideas):
                trial = self._tried(idea.stage, start.state)
                if trial is None:
                    continue
                if trial.state is None or not trial.decision.keep:
                    self._refused(idea.stage, trial)
                    continue
                gain = _gain(trial, self.goal.best, start.state)
                reached = self._reached(trial.state)
                gains[number] = gain
                made = _suggestion(idea, idea.stage, gain, trial, SPREAD)
                found.append((reached, gain * start.gain, made))
                if (reached, gain * start.gain) <= (near, most):
                    trial.close()
                    continue
                near, most = reached, gain * start.gain
                self.prepared, self.quantized = list(start.kept), [made]
                self.states.append(trial.state)
                self.last = trial.state
            # what was far behind on one start is not tried on the next
            close = AGAIN * max(gains.values(), default=0.0)
            ideas = [ideas[number] for number, gain in gains.items() if gain >= close] or ideas
        for reached, total, other in found:
            if other not in self.quantized:
                reason = _behind(self.goal.best, bool(self.quantized), near - reached, most / total)
                told = Refusal(stage=other.stage, reason=f"{reason} ({other.seen})")
                self.refusals.append(told)

    def _reached(self, state: State) -> float:
        """Tell how much of the limits a network reaches, to the percent; 1: all of them."""
        share = 1.0
        for name, text in self.goal.limits.items():
            original = self.first.scores.measurements[name]
            after = state.scores.measurements[name]
            bound = bound_of(name, Limit.parse(text), original)
            if not inside(after.value, bound, after.better):
                ends = sorted((abs(after.value), abs(bound)))
                share *= ends[0] / max(ends[1], 1e-12)
        return round(share, 2)

    def pack(self) -> None:
        """Take packing where files that hold everything so far become smaller by it."""
        if self.facts.best != "size" and self._reached(self.last) == 1.0:
            return
        for idea in packers(self.facts):
            trial = self._tried(idea.stage, self.last)
            if trial is None:
                continue
            gain = _smaller(trial, self.last)
            if trial.state is None or not trial.decision.keep or gain <= LEAST:
                reason = trial.decision.reason
                if trial.decision.keep:
                    reason = f"only {gain:.2f}x smaller ({reason})"
                self.refusals.append(Refusal(stage=idea.stage, reason=reason))
            else:
                bought = _gain(trial, self.goal.best, self.last)
                self.packed = [_suggestion(idea, idea.stage, bought, trial, SPREAD)]
            trial.close()

    def shrink(self) -> None:
        """Take the smallest network that seconds of training bring near enough to the limits."""
        if self.run.data.train is None or not self.minutes:
            bare = self.run.data.train is None
            why = "the data have no train batches" if bare else "--minutes leaves no time for it"
            self.refusals.append(
                Refusal(
                    stage=shrinkers(self.facts)[0][0].stage,
                    reason=f"a smaller network needs training, and {why}",
                )
            )
            return
        for family in shrinkers(self.facts):
            # the one in the middle tells on which side of it to look
            middle = len(family) // 2
            found = self._shrunk(family[middle])
            if found is not None:
                found = self._stronger(family[:middle], found)
            else:
                milder = (self._shrunk(idea) for idea in family[middle + 1 :])
                found = next((each for each in milder if each is not None), None)
            if found is not None:
                self.shrunk = [found]
                return

    def _stronger(self, family: Sequence[Idea], found: Suggestion) -> Suggestion:
        """Go on to stronger cuts as long as they may recover."""
        for idea in reversed(family):
            other = self._shrunk(idea)
            if other is None:
                break
            found = other
        return found

    def _shrunk(self, idea: Idea) -> Suggestion | None:
        """Try a smaller network; None where more training will not bring it inside the limits."""
        trial = self._tried(idea.stage, self.first)
        if trial is None:
            return None
        near, lacks = self._near(trial)
        gain = _gain(trial, self.goal.best, self.first)
        trial.close()
        if trial.state is not None and near and gain > LEAST:
            stage = trained(idea.stage, self._epochs())
            made = _suggestion(idea, stage, gain, trial, WEAKER)
            return replace(made, seen=f"{made.seen}; {lacks}")
        reason = lacks if gain > LEAST or trial.state is None else f"only {gain:.2f}x"
        self.refusals.append(Refusal(stage=idea.stage, reason=reason))
        return None

    def _epochs(self) -> float:
        """Return as many passes as there is time for."""
        most = self.minutes * 60 / max(self.brief.epoch_s, 1e-3)
        return float(f"{min(MOST_EPOCHS, most):.2g}")

    def _near(self, trial: Trial) -> tuple[bool, str]:
        """Tell whether more training may bring a network inside the limits, and what it lacks."""
        if trial.state is None:
            return False, trial.decision.reason
        said, near = [], True
        hope = (self.minutes * 60 / self.brief.seconds) ** HOPE
        for name, text in self.goal.limits.items():
            original = self.first.scores.measurements[name]
            after = trial.state.scores.measurements[name]
            bound = bound_of(name, Limit.parse(text), original)
            sign = 1.0 if original.better == "higher" else -1.0
            lacks = sign * (bound - after.value)
            allowed = abs(original.value - bound)
            near = near and lacks <= hope * allowed
            said.append(f"{name} {show(after)}, limit {show(replace(after, value=bound))}")
        return near, f"after {self.brief.epochs:.2g} epochs of training: {'; '.join(said)}"

    def _tried(self, stage: tuple[Any, ...], before: State) -> Trial | None:
        """Apply a stage; None where the network has nothing for it, or the data lack something."""
        absent = lacking(stage, self.run.data)
        if absent:
            self.refusals.append(Refusal(stage=stage, reason=absent))
            return None
        if self.should_stop():
            raise KeyboardInterrupt
        self.number += 1
        folder = self.run.work / f"trial-{self.number}"
        folder.mkdir()
        try:
            trial = self.run.trial(0, 0, stage, before, folder)
        except TersorError as error:
            self.refusals.append(Refusal(stage=stage, reason=str(error)))
            return None
        if trial.state is None and not trial.decision.too_strong:
            self.refusals.append(Refusal(stage=stage, reason=trial.decision.reason))
            return None
        return trial

    def _refused(self, stage: tuple[Any, ...], trial: Trial) -> None:
        self.refusals.append(Refusal(stage=stage, reason=trial.decision.reason))
        trial.close()

    def close(self) -> None:
        """Free the networks."""
        for state in (self.first, *self.states):
            state.candidate.close()


@dataclass(frozen=True, kw_only=True)
class _Start:
    """A network with what was done to it so far."""

    state: State
    kept: tuple[Suggestion, ...] = ()
    gain: float = 1.0


def _gain(trial: Trial, best: str, before: State) -> float:
    """Return how many times better the goal's metric became."""
    if trial.state is None:
        return 1.0
    if trial.speed is not None and best in SPEEDS:
        return trial.speed.value
    old, new = before.scores.measurements[best], trial.state.scores.measurements[best]
    ratio = old.value / max(new.value, 1e-12)
    return ratio if old.better == "lower" else 1 / max(ratio, 1e-12)


def _behind(best: str, taken: bool, further: float, ratio: float) -> str:
    """Say how a number format compares with the one that is taken, or with none.

    Args:
        best: The metric to improve.
        taken: Whether one is.
        further: Share of the limits that this one reaches less.
        ratio: How many times worse it is.
    """
    than = "what is taken" if taken else "without it"
    if further > 0:
        return f"further from the limits than {than}"
    if ratio < _SAME:
        return f"{best} is no better than {than}"
    return f"{best} is {ratio:.2f}x worse than {than}"


def _smaller(trial: Trial, before: State) -> float:
    """Return how many times smaller the files became."""
    if trial.state is None:
        return 1.0
    sizes = (each.scores.measurements["size"].value for each in (before, trial.state))
    return next(sizes) / max(next(sizes), 1.0)


def _suggestion(
    idea: Idea, stage: tuple[Any, ...], gain: float, trial: Trial, below: float
) -> Suggestion:
    """Predict a stage's gain from its trial's."""
    low, high = gain / below, gain * min(SPREAD, MOST_RANGE / below)
    if below == WEAKER:
        low = max(low, 1.0)  # of a milder cut that is kept
    if trial.speed is None and below == SPREAD:
        low, high = gain / EXACT, gain * EXACT
    return Suggestion(stage=stage, why=idea.why, gain=(low, high), seen=trial.decision.reason)
