"""measure(), compare(): fair timing.

A claim of speed is a ratio of interleaved runs with an interval. `core/timing.py` takes turns,
`core/statistics.py` judges; here both meet networks.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core import plugins, resampling
from tersor.core.artifact import Artifact
from tersor.core.context import SPLITS, Data, Track, silent
from tersor.core.errors import DataError, ModelError, suggest
from tersor.core.hardware import preflight, probe, usable_cores
from tersor.core.metric import Measurement, Subject
from tersor.core.resampling import Paired
from tersor.core.runtime import Arrays, Runner, Target
from tersor.core.statistics import Comparison, judge
from tersor.core.timing import MIN_BLOCKS, interleave
from tersor.feeds import arrays_of, check_finite, evaluate, tell_not_finite, timing_inputs
from tersor.subjects import Place, fitting, made_inputs, place

__all__ = [
    "compare",
    "contest",
    "evaluate",
    "interleave",
    "measure",
    "measure_subject",
    "paired",
    "self_check",
    "slowed",
    "timing_inputs",
]
MIN_EFFECT = 0.03
"""Smallest relative difference of speed that is called one."""
_NOWHERE = Target(runtime="none")  # scores are of arrays, wherever they were made
_MISSING: Mapping[str, str] = {
    "labels": "labels; add 'labels' to the batches of the data",
    "outputs": "data to run; give data with a split of samples",
    "reference": "the original network's outputs; give the original as reference",
    "quality": "the data's own quality; give 'quality' next to the splits: a function of outputs "
    "and labels that returns a number",
    "inputs": "inputs; give data",
    "runner": "a loaded network",
    "net": "the network in memory",
    "files": "the exported files",
}


def contest(
    a: Runner,
    b: Runner,
    inputs: Sequence[Arrays],
    *,
    b_inputs: Sequence[Arrays] | None = None,
    min_effect: float = MIN_EFFECT,
    budget_s: float = 6.0,
    seed: int = 0,
    warm_up_s: float = 0.5,
) -> Comparison:
    """Time two loaded networks against each other.

    Args:
        a: The one to compare with.
        b: The other.
        inputs: At least 16 distinct batches of one size.
        b_inputs: The same batches under b's names, where those differ.
        min_effect: Relative difference below which no verdict is given.
        budget_s: Timing goes on until the interval is within 2 %, but about this long at most.
        seed: Decides the order of turns and the bootstrap.
        warm_up_s: Warm-up of each.

    Returns:
        How many times faster b is, with a 95 % interval and a verdict.
    """
    calls = [
        [a.bind(arrays) for arrays in inputs],
        [b.bind(arrays) for arrays in b_inputs or inputs],
    ]
    began = time.perf_counter()
    a_ms, b_ms = interleave(calls, budget_s=budget_s, seed=seed, warm_up_s=warm_up_s)
    spent_s = time.perf_counter() - began
    found = judge(a_ms, b_ms, min_effect=min_effect, seed=seed)
    note = "" if found.stable else "; unstable: the interval is wider than 2 %"
    if found.blocks < MIN_BLOCKS:
        note += f"; only {found.blocks} blocks, of {MIN_BLOCKS} wanted, in the time given"
    how = (
        f"median ratio of {found.blocks} interleaved blocks in {spent_s:.1f} s (of each turn's "
        "runs the lower quartile), 95 % block bootstrap, minimum effect "
        f"{100 * min_effect:g} %{note}"
    )
    return replace(found, how=how)


def measure_subject(subject: Subject, names: Sequence[str]) -> tuple[Measurement, ...]:
    """Measure everything in `names`, in order; each says on which target.

    Raises:
        RecipeError: no such metric. DataError, ModelError: the subject lacks what a metric needs.
        TargetError: outputs are not finite.
    """
    chosen = [plugins.metric(name) for name in names]
    if subject.outputs is not None:
        check_finite(subject.outputs, subject.split)
    for each in chosen:
        for need in each.needs:
            if getattr(subject, need) is None:
                on = f" (split {subject.split!r})" if need == "labels" and subject.split else ""
                kind = ModelError if need in ("net", "runner", "files") else DataError
                raise kind(f"the metric {each.name!r} needs {_MISSING[need]}{on}")
    made = [each.measure(subject) for each in chosen]
    target = subject.target.text
    return tuple(replace(m, conditions={"target": target, **m.conditions}) for m in made)


def paired(
    name: str,
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    *,
    quality: Callable[[Any, Any], float] | None = None,
    seed: int = 0,
) -> Paired | None:
    """Say how a quality metric changed between two networks that saw the same samples.

    Args:
        name: A metric of outputs and labels, such as "accuracy", "f1" or "perplexity".
        before: The first network's outputs over a split, samples first.
        after: The second network's.
        labels: Of that split.
        quality: The data's own, for the metric "quality".
        seed: Decides the draws, where the test is a bootstrap.

    Returns:
        The change with its 95 % interval and p value; None where the metric is none of outputs and
        labels, or the samples are too few to tell.

    Raises:
        RecipeError: no such metric. DataError: labels do not fit, or outputs differ in shape.
    """
    score = plugins.metric(name).score
    if score is None:
        return None
    if len(before) != len(after):
        raise DataError(
            f"outputs are of {len(before)} samples before but {len(after)} after; compare two "
            "networks on the same split"
        )
    first, second = (
        score(Subject(target=_NOWHERE, outputs=outputs, labels=labels, quality=quality))
        for outputs in (before, after)
    )
    return resampling.paired(first, second, seed)


def measure(
    subject: Artifact | str | Path,
    metrics: Sequence[str] = ("size", "latency"),
    *,
    data: Data | None = None,
    target: Target | None = None,
    batch: int = 1,
    threads: int | None = None,
    split: str = "test",
    reference: Artifact | str | Path | None = None,
) -> tuple[Measurement, ...]:
    """Measure an artifact or a model file.

    Args:
        subject: An Artifact, its directory, or a model file.
        metrics: Names of metrics.
        data: Batches; without them inputs are made from the network's signature.
        target: Where to run a bare model file.
        batch: Samples in a timed batch.
        threads: Of a run; 0 means all usable cores.
        split: The split that quality is measured on.
        reference: The original, for fidelity.

    Raises:
        TersorError: the narrowest kind; says what is missing and what to do.
    """
    needs = {need for name in metrics for need in plugins.metric(name).needs}
    found = place(subject, target=target, threads=threads)
    batches = _split(data, split)
    inputs = None
    if "inputs" in needs:
        inputs = fitting(found, _inputs(found, batches, batch))
    runner = found.load() if needs & {"runner", "outputs"} else None
    try:
        outputs = labels = original = None
        if runner is not None and inputs is not None:
            tell_not_finite(found.name, runner.bind(inputs[0])(), random=batches is None)
        if "outputs" in needs and batches is not None:
            assert runner is not None
            outputs, labels = evaluate(runner, _renamed(found, batches))
        if "reference" in needs and reference is not None and batches is not None:
            other = place(reference, target=target, threads=threads)
            loaded = other.load()
            original, _ = evaluate(loaded, _renamed(other, batches))
            loaded.close()
        made = Subject(
            target=found.target,
            net=found.net() if "net" in needs else None,
            files=found.files,
            runner=runner,
            inputs=inputs,
            outputs=outputs,
            labels=labels,
            reference=original,
            split=split if outputs is not None else "",
            quality=None if data is None else data.quality,
            conditions={"batch": batch, "threads": found.target.threads or usable_cores()},
        )
        return measure_subject(made, metrics)
    finally:
        if runner is not None:
            runner.close()


def compare(
    a: Artifact | str | Path,
    b: Artifact | str | Path,
    *,
    data: Data | None = None,
    target: Target | None = None,
    batch: int | None = None,
    threads: int | None = None,
    min_effect: float = MIN_EFFECT,
    budget_s: float = 20.0,
    aa: int = 0,
    seed: int = 0,
    split: str = "test",
    display: Track = silent,
) -> Comparison:
    """Say whether b is faster or slower than a.

    Args:
        a: An Artifact, its directory, or a model file.
        b: The other.
        data: Batches to take inputs from; else they are made from the networks' signature.
        target: Where to run bare model files.
        batch: Samples in a batch; 1 by default.
        threads: Of a run; 0 means all usable cores.
        min_effect: Relative difference below which no verdict is given.
        budget_s: Longest time of the contest.
        aa: Repetitions of a self check: a against a second copy of a, 2 to 3 s each.
        seed: Decides inputs, orders and the bootstrap.
        split: The split that inputs are taken from.
        display: Progress of the self check.

    Returns:
        The comparison, with what made the machine unfit in `warnings`.

    Raises:
        TersorError: the narrowest kind; says what is missing and what to do.
    """
    warnings = preflight(probe())
    size = batch or 1
    left, right = (place(x, target=target, threads=threads) for x in (a, b))
    batches = _split(data, split)
    ours = _inputs(left, batches, size, seed)
    runners = (left.load(), right.load())
    try:
        found = contest(
            *runners,
            fitting(left, ours),
            b_inputs=fitting(right, ours),
            min_effect=min_effect,
            budget_s=budget_s,
            seed=seed,
        )
    finally:
        for runner in runners:
            runner.close()
    check = None
    if aa:
        check = self_check(
            left.load,
            fitting(left, ours),
            repetitions=aa,
            min_effect=min_effect,
            budget_s=min(2.0, budget_s),
            seed=seed,
            display=display,
        )
    cores = left.target.threads or usable_cores()
    return replace(
        found,
        conditions={"batch": size, "threads": cores, "a": left.name, "b": right.name},
        warnings=warnings,
        self_check=check,
    )


def self_check(
    load: Callable[[], Runner],
    inputs: Sequence[Arrays],
    *,
    repetitions: int = 100,
    min_effect: float = MIN_EFFECT,
    budget_s: float = 2.0,
    warm_up_s: float = 0.25,
    planted: float = 0.0,
    seed: int = 0,
    display: Track = silent,
) -> dict[str, Any]:
    """Compare a network with itself, again and again: how often is a difference claimed?

    Args:
        load: Loads the network; called twice for each repetition, since two copies in memory are
            not equally fast to the last percent.
        inputs: At least 16 distinct batches of one size.
        repetitions: Contests.
        min_effect: As in the comparison that is checked.
        budget_s: Time of each contest beyond its warm-up.
        warm_up_s: Warm-up of each copy in each contest.
        planted: The second copy is really made slower by this share: how often is it found?
        seed: Decides orders and bootstraps; each repetition has its own.
        display: Progress.

    Returns:
        Plain data: how often b was called "faster" and "slower"; how often the interval alone (a
        minimum effect of 0) says there is a difference; the ratios with their intervals.
    """
    contests = []
    began = time.perf_counter()
    for i in display(range(repetitions), "self check", repetitions):
        a, b = load(), load()
        try:
            contests.append(
                contest(
                    a,
                    slowed(b, planted) if planted else b,
                    inputs,
                    min_effect=min_effect,
                    budget_s=budget_s,
                    seed=seed + i,
                    warm_up_s=warm_up_s,
                )
            )
        finally:
            a.close()
            b.close()
    truth = 1 / (1 + planted)
    errors = np.abs([c.speedup / truth - 1 for c in contests])
    return {
        "repetitions": repetitions,
        "min_effect": min_effect,
        "planted": planted,
        "faster": sum(c.verdict == "faster" for c in contests),
        "slower": sum(c.verdict == "slower" for c in contests),
        "interval_without_1": sum(not c.low <= 1 <= c.high for c in contests),
        "interval_without_truth": sum(not c.low <= truth <= c.high for c in contests),
        "unstable": sum(not c.stable for c in contests),
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "median_ms": float(np.median([c.a_ms for c in contests])),
        "median_blocks": float(np.median([c.blocks for c in contests])),
        "seconds": time.perf_counter() - began,
        "ratios": [[c.low, c.speedup, c.high] for c in contests],
    }


def slowed(runner: Runner, share: float) -> Runner:
    """Return a runner that is really slower: each run waits, busy, for `share` of its own time."""
    return _Slowed(runner, share)


class _Slowed:
    def __init__(self, runner: Runner, share: float) -> None:
        self.runner, self.share = runner, share

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        call, clock = self.runner.bind(inputs), time.perf_counter_ns

        def slower() -> Arrays:
            began = clock()
            made = call()
            ended = clock()
            until = ended + self.share * (ended - began)
            while clock() < until:
                pass
            return made

        return slower

    def close(self) -> None:
        self.runner.close()


def _split(data: Data | None, split: str) -> Iterable[Mapping[str, Any]] | None:
    if data is None:
        return None
    batches: Iterable[Mapping[str, Any]] | None = getattr(data, split, None)
    if split not in SPLITS or batches is None:
        present = [name for name in SPLITS if getattr(data, name) is not None]
        raise DataError(
            f"the data have no split {split!r}.{suggest(split, present)} They have "
            f"{', '.join(present) or 'none'}"
        )
    return batches


def _inputs(
    found: Place, batches: Iterable[Mapping[str, Any]] | None, batch: int, seed: int = 0
) -> list[Arrays]:
    if batches is None:
        return made_inputs(found, batch, seed=seed)
    return timing_inputs(batches, batch)


def _renamed(found: Place, batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Give batches the names of the network's inputs, keeping the labels."""
    for batch in batches:
        feeds = fitting(found, [arrays_of(batch)])[0]
        yield {**feeds, "labels": batch["labels"]} if "labels" in batch else feeds
