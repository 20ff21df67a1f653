"""fusions(): what a runtime fuses by itself in a network, and what each fusion step adds."""

import copy
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor import benchmark, trainer
from tersor.candidate import TOLERANCES, Candidate, export, first, latencies
from tersor.core import plugins
from tersor.core.context import Context, Data
from tersor.core.errors import DataError, DependencyError, TargetError, UnfitError
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs, Model, may_lower
from tersor.core.packing import unpacked
from tersor.core.runtime import Arrays, RanOperator, Target
from tersor.core.statistics import Comparison
from tersor.core.technique import Technique
from tersor.feeds import arrays_of, timing_inputs
from tersor.ops.calls import kind_of
from tersor.ops.capture import capture
from tersor.ops.fusion_patterns import Pattern, find_patterns, operator_names
from tersor.ops.losses import labelled_loss
from tersor.ops.lower import form_of, lower
from tersor.plan import make_inputs, try_forward

_MIN_EFFECT = 0.01
_PLAIN = ("Eltwise", "Add", "Mul", "Multiply")
"""Kinds of operators that are a pass over a tensor, and never a norm or a product."""
_RECURRENT: Mapping[str, tuple[str, ...]] = {
    "lstm": ("LSTM", "RNNSeq", "LSTMSequence", "LSTMCell"),
    "gru": ("GRU", "RNNSeq", "GRUSequence", "GRUCell"),
}


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Operators of one kind that could be one."""

    kind: str
    """Such as "conv + add + relu"; a batch norm that the export folds is not in the name."""
    found: int
    """In the network."""
    by_export: int = 0
    """Merged while the network is written for the runtime."""
    by_runtime: int = 0
    """Of the others, those that the runtime executes as one operator."""
    partly: int = 0
    """Those of which the runtime joins some operators."""
    left: int = 0
    """Those that it executes one by one."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A fusion technique, tried alone."""

    technique: str
    comparison: Comparison | None = None
    """How many times faster the network is with it, interleaved; None: it does not fit."""
    reason: str = ""
    """Why it does not fit."""
    changed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Kind -> operators of one kind in one piece (before, after), where they differ."""
    operators: tuple[int, int] = (0, 0)
    """That the runtime executes, before and after."""
    same: bool = False
    """Whether they are the same operators: then a difference in time is noise, or the placing of
    weights in memory."""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Fusions:
    """What a runtime fuses in a network, and what steps add."""

    target: Target
    batch: int
    threads: int
    rows: tuple[Fused, ...]
    operators: int
    """That the runtime executes."""
    steps: tuple[Step, ...] = ()

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        rows = [(r.kind, r.found, r.by_export, r.by_runtime, r.left) for r in self.rows]
        steps = [
            (
                s.technique,
                s.reason or ("" if s.comparison is None else f"{s.comparison.speedup:.2f}x"),
            )
            for s in self.steps
        ]
        head = ("kind", "found", "by the export", "by the runtime", "left")
        return shown(f"fused on {self.target}", head, rows) + shown("", ("step", "speed"), steps)


def fusions(
    model: Model,
    data: Data,
    *,
    target: Target | None = None,
    batch: int = 1,
    steps: bool = True,
    budget_s: float = 4.0,
) -> Fusions:
    """Say which fusions a runtime makes by itself, and what each of ours adds.

    Counts are read from the runtime's own optimized graph. Each fusion technique is applied alone,
    with its defaults, to a copy of the network, and timed against the network as it is.

    Args:
        model: A network of any form that the runtime can be reached from.
        data: Batches; `calibration`, or the first split there is, for exporting and timing.
        target: onnxruntime:cpu by default.
        batch: Samples in a timed batch.
        steps: Whether to try the techniques.
        budget_s: Of each contest.

    Raises:
        TargetError: the runtime does not tell what it executes. DataError: no batches.
    """
    chosen = target or Target(runtime="onnxruntime")
    runtime = plugins.runtime(chosen.runtime)
    if runtime.fused is None:
        able = [n for n in plugins.names("runtimes") if plugins.runtime(n).fused]
        raise TargetError(
            f"{chosen.runtime} does not tell what it executes; look at {' or '.join(able)}"
        )
    batches = next((s for s in (data.calibration, data.test, data.train) if s is not None), None)
    if batches is None:
        raise DataError("the data have no batches; give at least calibration or test")
    inputs = make_inputs(model, data)
    if model.form == "module":
        model.net.eval()
        try_forward(model.net, inputs)
    sample = arrays_of({k: v for k, v in next(iter(batches)).items() if k in inputs.example})
    feeds = [{n: b[n] for n in inputs.example} for b in timing_inputs(batches, batch)]
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        place = Path(folder)
        plain = _Written(model.net, place / "plain", inputs, chosen, sample)
        tried = []
        try:
            for technique in _techniques(model) if steps else ():
                context = _context(inputs, batches, chosen, batch, place / technique.name)
                tried.append(_tried(technique, model, plain, context, sample, feeds, budget_s))
        finally:
            plain.candidate.close()
    return Fusions(
        target=chosen,
        batch=batch,
        threads=chosen.threads or usable_cores(),
        rows=plain.rows,
        operators=len(plain.ran),
        steps=tuple(tried),
    )


class _Written:
    """A network on the target, with what the runtime makes of it."""

    def __init__(
        self, net: Any, folder: Path, inputs: Inputs, target: Target, sample: Arrays
    ) -> None:
        runtime = plugins.runtime(target.runtime)
        assert runtime.fused is not None
        written = lower(net, "onnx", inputs)
        patterns, aliases = find_patterns(written), operator_names(written)
        self.candidate: Candidate = export(written, folder, inputs, target, sample)
        with unpacked(self.candidate.files[0]) as file:
            ran = runtime.fused(file, self.candidate.target)
        self.ran = [
            replace(r, covers=tuple(aliases.get(n, n) for n in r.covers)) for r in ran if _works(r)
        ]
        self.outputs = first(self.candidate.runner.bind(sample)())
        norms = _batch_norms(net, inputs) if form_of(net) == "module" else 0
        self.rows = _rows(patterns, self.ran, norms)


def _kinds(written: "_Written") -> Counter[str]:
    return Counter(operator.kind for operator in written.ran)


def _works(operator: RanOperator) -> bool:
    """Leave out what a runtime lists beside its operators."""
    return operator.kind not in ("Input", "Output", "Const", "Parameter", "Result")


def _batch_norms(net: Any, inputs: Inputs) -> int:
    """Count batch norms that follow a convolution or linear layer."""
    captured = capture(copy.deepcopy(net), inputs)
    modules = dict(captured.named_modules())
    return sum(
        kind_of(node, modules) == "batch_norm"
        and kind_of(node.args[0], modules) in ("conv", "linear")
        for node in captured.graph.nodes
        if node.args
    )


def _rows(
    patterns: Sequence[Pattern], ran: Sequence[RanOperator], batch_norms: int
) -> tuple[Fused, ...]:
    counts: dict[str, Counter[str]] = {}
    owners = {name: operator for operator in ran for name in operator.covers}
    for pattern in patterns:
        verdict = _verdict(pattern, owners)
        counts.setdefault(pattern.kind, Counter())[verdict] += 1
    for kind, own in counts.items():
        if kind in _RECURRENT and own["left"]:
            # their names are lost where a runtime builds them anew; they are never taken apart
            whole = sum(operator.kind in _RECURRENT[kind] for operator in ran)
            named = min(own["left"], max(whole - own["fused"], 0))
            own.update({"fused": named, "left": -named})
    rows = []
    if batch_norms:
        still = sum(own.total() for kind, own in counts.items() if "batch norm" in kind)
        rows.append(
            Fused(kind="layer + batch norm", found=batch_norms, by_export=batch_norms - still)
        )
    rows += [
        Fused(
            kind=kind,
            found=own.total(),
            by_runtime=own["fused"],
            partly=own["partly"],
            left=own["left"],
        )
        for kind, own in sorted(counts.items(), key=lambda item: -item[1].total())
    ]
    return tuple(rows)


def _verdict(pattern: Pattern, owners: Mapping[str, RanOperator]) -> str:
    """Tell whether a pattern is one operator ("fused"), shares some ("partly"), or not ("left")."""
    *before, last = (owners.get(name) for name in pattern.operators)
    if last is None:
        return "left"
    if not before:
        return "partly" if last.kind in _PLAIN else "fused"
    # an operator without a trace was built into the one that bears the last one's name
    if all(owner is None or owner is last for owner in before):
        return "left" if last.kind in _PLAIN and None in before else "fused"
    return "partly" if any(owner is last for owner in before) else "left"


def _techniques(model: Model) -> list[Technique]:
    """List the fusion techniques that a network of this form can still be given."""
    found = []
    for name, module in plugins.names("techniques").items():
        if module.split(".")[-2:-1] != ["fusion"]:
            continue
        try:
            technique = plugins.technique(name)
        except DependencyError:
            continue
        if may_lower(model.form, technique.form):
            found.append(technique)
    return found


def _context(
    inputs: Inputs, batches: Iterable[Any], target: Target, batch: int, folder: Path
) -> Context:
    data = Data(calibration=batches)
    folder.mkdir(parents=True)

    def timed(nets: Sequence[Any]) -> Sequence[float]:
        return latencies(nets, inputs, target, data, folder, batch=batch)

    return Context(
        inputs=inputs,
        data=data,
        target=target,
        loss=labelled_loss,
        fit=trainer.fit,
        latency=timed,
        work_dir=folder,
        batch=batch,
    )


def _compare(wanted: np.ndarray, found: np.ndarray, technique: str) -> None:
    scale = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))) or 1.0
    moved = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - wanted)))) / scale
    if not moved <= TOLERANCES["fp32"]:
        raise TargetError(
            f"with {technique} the outputs differ by {moved:.2g} of their size, allowed is "
            f"{TOLERANCES['fp32']:.2g}"
        )


def _tried(
    technique: Technique,
    model: Model,
    plain: _Written,
    context: Context,
    sample: Arrays,
    feeds: Sequence[Arrays],
    budget_s: float,
) -> Step:
    given = lower(copy.deepcopy(model.net), technique.form, context.inputs)
    try:
        made = technique.apply(given, technique.config(), context)
    except (UnfitError, DependencyError, TargetError) as error:
        return Step(technique=technique.name, reason=str(error), facts=context.facts)
    if "note" in context.facts:  # a step that found nothing to do, and says so
        reason = f"{technique.name}: {context.facts['note']}"
        return Step(technique=technique.name, reason=reason, facts=context.facts)
    written = _Written(made, context.work_dir / "made", context.inputs, context.target, sample)
    try:
        _compare(plain.outputs, written.outputs, technique.name)
        found = benchmark.contest(
            plain.candidate.runner,
            written.candidate.runner,
            feeds,
            min_effect=_MIN_EFFECT,
            budget_s=budget_s,
        )
    finally:
        written.candidate.close()
    before, after = ({r.kind: r.by_runtime + r.by_export for r in w.rows} for w in (plain, written))
    return Step(
        technique=technique.name,
        comparison=found,
        changed={
            kind: (before.get(kind, 0), after.get(kind, 0))
            for kind in sorted({*before, *after})
            if before.get(kind, 0) != after.get(kind, 0)
        },
        operators=(len(plain.ran), len(written.ran)),
        same=_kinds(plain) == _kinds(written),
        facts=context.facts,
    )
