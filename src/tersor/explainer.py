"""explain(): where the time of a network goes, in float and in integers, and why that pays or not.

The network is quantized as `static` or `dynamic` would, and both run under the runtime's own
profiler. What each kind of operator takes before and after is set beside the work it does:
multiply-accumulates, and how many of them each weight serves once it is read.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor import benchmark, trainer
from tersor.candidate import Candidate, export
from tersor.core import plugins
from tersor.core.context import Context, Data
from tersor.core.errors import DataError, ModelError, RecipeError, TargetError, suggest
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs, Model
from tersor.core.operators import part_of
from tersor.core.packing import unpacked
from tersor.core.runtime import Arrays, OperatorTime, Target
from tersor.core.statistics import Comparison
from tersor.feeds import arrays_of, timing_inputs
from tersor.ops.fake_quantize import settle
from tersor.ops.losses import labelled_loss
from tersor.ops.lower import plain_attention
from tersor.plan import make_inputs, try_forward

_QUANTIZERS = ("static", "dynamic")
_RUNS = 50
_REUSE = 16
"""Products for each weight read below which reading, not arithmetic, is taken for the limit."""
_SMALL_MS = 0.01
"""Operators shorter than this are mostly overhead."""
_NO_GAIN = 1.3
_LAYERS = ("convolutions", "recurrent layers", "linear layers")


@dataclass(kw_only=True)
class Work:
    """What the layers of one kind do in a run."""

    macs: int = 0
    read: int = 0
    """Weights, counted each time they are read."""
    layers: set[str] = field(default_factory=set)
    depthwise: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """Operators of one kind, in float and in integers."""

    name: str
    float_ms: float
    """Of one run, as the runtime's profiler has it."""
    int8_ms: float
    macs: int = 0
    """Multiply-accumulates of one run; 0: not counted."""
    reuse: float = 0.0
    """Multiply-accumulates for each weight that is read; 0: no weights."""
    operators: int = 0
    """Of this kind, in float."""
    depthwise: int = 0
    """Depthwise convolutions among them."""
    why_float: str = ""
    """Why no layer of this kind is in integers, where none is."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a network gains what it gains from 8-bit integers on a target."""

    target: Target
    batch: int
    threads: int
    technique: str
    """What put it on integers."""
    comparison: Comparison
    """How many times faster the integers are, end to end, interleaved."""
    parts: tuple[Part, ...]
    """Largest in float first."""
    left_in_float: Mapping[str, str] = field(default_factory=dict)
    """Layer -> why."""
    reasons: tuple[str, ...] = ()
    """In words: the layers, the slowest in float first, then what is outside them."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        rows = [(p.name, f"{p.float_ms:.4g}", f"{p.int8_ms:.4g}", p.why_float) for p in self.parts]
        title = f"{self.technique} on {self.target}: {self.comparison.speedup:.2f}x"
        return shown(title, ("part", "float, ms", "integers, ms", ""), rows, self.reasons)


def explain(
    model: Model,
    data: Data,
    *,
    target: Target | None = None,
    technique: str | None = None,
    batch: int = 1,
    budget_s: float = 6.0,
) -> Explanation:
    """Say what 8-bit integers buy on a target, kind of operator by kind.

    Args:
        model: A network in Python.
        data: Batches; `calibration`, or the first split there is, for ranges and for timing.
        target: onnxruntime:cpu by default.
        technique: `static`, or `dynamic`, which is taken where the network has recurrent layers.
        batch: Samples in a timed batch.
        budget_s: Of the contest.

    Raises:
        RecipeError: another technique. ModelError: the network is no module. DataError: no batches.
        TargetError: the runtime has no profiler, or cannot run the network.
        UnfitError: no layer can be quantized.
    """
    if technique not in (None, *_QUANTIZERS):
        raise RecipeError(
            f"technique {technique!r} is neither {' nor '.join(_QUANTIZERS)}."
            f"{suggest(technique, _QUANTIZERS)}"
        )
    chosen = target or Target(runtime="onnxruntime")
    runtime = plugins.runtime(chosen.runtime)
    if runtime.profile is None:
        raise TargetError(
            f"{chosen.runtime} does not tell where its time goes; explain on "
            f"{' or '.join(n for n in plugins.names('runtimes') if plugins.runtime(n).profile)}"
        )
    if model.form != "module":
        raise ModelError(
            f"explain quantizes the network, which takes a network in Python; this one has form "
            f"{model.form!r}. Give FILE.py:FACTORY"
        )
    batches = next((s for s in (data.calibration, data.test, data.train) if s is not None), None)
    if batches is None:
        raise DataError("the data have no batches; give at least calibration or test")
    inputs = make_inputs(model, data)
    net = model.net.eval()
    try_forward(net, inputs)
    kind = technique or ("dynamic" if _recurrent(net) else "static")
    made, left = _quantized(model, kind, inputs, Data(calibration=batches), chosen)
    sample = arrays_of({k: v for k, v in next(iter(batches)).items() if k in inputs.example})
    feeds = [{n: b[n] for n in inputs.example} for b in timing_inputs(batches, batch)]
    work = work_of(net, feeds[0])
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        places = (Path(folder) / "float", Path(folder) / "int8")
        pair: list[Candidate] = []
        try:
            for each, place in zip((net, made), places, strict=True):
                pair.append(export(each, place, inputs, chosen, sample))
            found = benchmark.contest(
                pair[0].runner, pair[1].runner, feeds, min_effect=0.01, budget_s=budget_s
            )
        finally:
            for candidate in pair:
                candidate.close()
        repeated = [feeds[i % len(feeds)] for i in range(_RUNS)]
        times = []
        for each in pair:
            with unpacked(each.files[0]) as file:
                times.append(runtime.profile(file, each.target, repeated))
        before, after = times
    parts = _parts(before, after, work, left)
    return Explanation(
        target=chosen,
        batch=batch,
        threads=chosen.threads or usable_cores(),
        technique=kind,
        comparison=found,
        parts=parts,
        left_in_float=left,
        reasons=_reasons(parts, found, left),
    )


def _recurrent(net: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in net.modules())


def _quantized(
    model: Model, technique: str, inputs: Inputs, data: Data, target: Target
) -> tuple[Any, Mapping[str, str]]:
    """Apply the technique to a copy of the network."""
    step = plugins.technique(technique)

    def unused(nets: Sequence[Any]) -> Sequence[float]:
        raise RecipeError(f"{technique} does not time anything")

    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        context = Context(
            inputs=inputs,
            data=data,
            target=target,
            loss=labelled_loss,
            fit=trainer.fit,
            latency=unused,
            work_dir=Path(folder),
        )
        made = step.apply(copy.deepcopy(model.net), step.config(), context)
    return settle(made), context.facts.get("left_in_float", {})


def work_of(net: nn.Module, feed: Arrays) -> dict[str, Work]:
    """Count multiply-accumulates and weights read, for each kind of layer, on one batch."""
    found: dict[str, Work] = {}
    names = {module: name for name, module in net.named_modules()}

    def hook(layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        weights, reads, deep = 0, 1, False
        if isinstance(layer, nn.modules.conv._ConvNd):
            part, weights = "convolutions", layer.weight.numel()
            deep = layer.groups > 1 and layer.groups == layer.in_channels
            macs = (given[0] if layer.transposed else made).numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            part, weights = "linear layers", layer.weight.numel()
            macs = made.numel() * layer.in_features
        elif isinstance(layer, nn.MultiheadAttention):
            part, weights = "linear layers", 4 * layer.embed_dim**2
            macs = made[0].numel() * 4 * layer.embed_dim
        elif isinstance(layer, nn.RNNBase):
            x = given[0] if isinstance(given[0], Tensor) else given[0].data
            part = "recurrent layers"
            weights = sum(p.numel() for n, p in layer.named_parameters() if "weight" in n)
            reads = x.shape[1 if layer.batch_first and x.dim() == 3 else 0]
            macs = x.numel() // x.shape[-1] * weights
        if weights:
            work = found.setdefault(part, Work())
            work.macs, work.read = work.macs + macs, work.read + reads * weights
            work.layers.add(names[layer])
            work.depthwise += deep

    hooks = [module.register_forward_hook(hook) for module in net.modules()]
    try:
        with plain_attention(), torch.no_grad():
            net(**{name: torch.from_numpy(array) for name, array in feed.items()})
    finally:
        for each in hooks:
            each.remove()
    return found


def _parts(
    before: Sequence[OperatorTime],
    after: Sequence[OperatorTime],
    work: Mapping[str, Work],
    left: Mapping[str, str],
) -> tuple[Part, ...]:
    def summed(operators: Sequence[OperatorTime]) -> dict[str, float]:
        made: dict[str, float] = {}
        for operator in operators:
            made[part_of(operator)] = made.get(part_of(operator), 0.0) + operator.ms
        return made

    old, new = summed(before), summed(after)
    made = []
    for name in sorted({*old, *new}, key=lambda name: -old.get(name, 0.0)):
        own = work.get(name, Work())
        stays = [left[layer] for layer in sorted(own.layers) if layer in left]
        made.append(
            Part(
                name=name,
                float_ms=old.get(name, 0.0),
                int8_ms=new.get(name, 0.0),
                macs=own.macs,
                reuse=own.macs / own.read if own.read else 0.0,
                operators=sum(part_of(operator) == name for operator in before),
                depthwise=own.depthwise,
                why_float=stays[0] if stays and len(stays) == len(own.layers) else "",
            )
        )
    return tuple(made)


def _reasons(parts: Sequence[Part], found: Comparison, left: Mapping[str, str]) -> tuple[str, ...]:
    old, new = sum(p.float_ms for p in parts), sum(p.int8_ms for p in parts)
    said = []
    if found.verdict != "faster":
        said.append(f"integers do not make this network faster here: {found.verdict}")
    said += [
        _layers_said(part, part.float_ms / old)
        for part in parts
        if part.name in _LAYERS and part.float_ms >= 0.03 * old
    ]
    other_old, other_new = (
        sum(getattr(p, side) for p in parts if p.name not in _LAYERS)
        for side in ("float_ms", "int8_ms")
    )
    rounding = next((p.int8_ms for p in parts if p.name == "rounding"), 0.0)
    if other_new >= 0.03 * new:
        taken = f", {_share(rounding, new)} for rounding itself" if rounding >= 0.01 * new else ""
        said.append(
            f"what is outside the layers takes {_share(other_old, old)} of the time in float and "
            f"{_share(other_new, new)} in integers{taken}: were the layers free, the network would "
            f"be {old / other_new:.1f}x as fast"
        )
    if left:
        names = ", ".join(list(left)[:3]) + (" ..." if len(left) > 3 else "")
        said.append(f"in float stay {names}: {'; '.join(sorted(set(left.values())))}")
    return tuple(said)


def _layers_said(part: Part, share: float) -> str:
    gain = part.float_ms / max(part.int8_ms, 1e-4)  # a profiler may count whole microseconds
    said = f"{part.name} take {100 * share:.0f} % of the time in float"
    if part.why_float:
        return f"{said} and stay there: {part.why_float}"
    said += f" and are {gain:.1f}x as fast in integers: "
    times = f"{part.reuse:.0f} products" if part.reuse >= 1.5 else "one product"
    served = f"each weight that is read serves {times}"
    if part.name == "recurrent layers":
        return said + (
            f"every step waits for the one before, and {served}, so reading weights is the limit. "
            "Integers are a quarter of the bytes; gates and states stay in float"
        )
    if part.depthwise:
        return said + (
            f"{served}, but {part.depthwise} of {part.operators} are depthwise: there each input "
            "serves few products, and moving data is the limit"
        )
    if part.reuse and part.reuse < _REUSE:
        return said + f"{served}, so reading weights is the limit; integers are a quarter of that"
    each = part.float_ms / max(part.operators, 1)
    if each < _SMALL_MS:
        return said + (
            f"{served}, but an operator takes {1e3 * each:.0f} us, of which starting it is a good "
            "part; larger batches gain more"
        )
    if gain < _NO_GAIN:
        return (
            said + f"{served}, so arithmetic is the limit, and this machine's integers add little"
        )
    return said + f"{served}, so arithmetic is the limit, and integers do more of it at once"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"
