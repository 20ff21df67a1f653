"""Mixed precision: bits layer by layer, fewest and integers where they harm least."""

import copy
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import fx, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.fake_quantize import settle
from tersor.ops.fold import fold_batch_norms
from tersor.ops.knapsack import Losses, solve
from tersor.ops.modules import check_patterns
from tersor.ops.placement import place
from tersor.ops.quality import Judge
from tersor.ops.twin import gather
from tersor.quantization._bits import size_budget, under_latency
from tersor.quantization._integer import (
    Calibrator,
    Rounded,
    choose,
    make_integer,
    measure_points,
    measure_ranges,
    round_embeddings,
    weight_scales,
)
from tersor.quantization._sensitivity import FLOAT, sensitivities

_DEFAULT_SIZE = 0.2
_LEAST_DROP = 0.05
"""Points; a smaller drop than this is not asked for by itself."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Settings of mixed precision: `size`, `latency` or both, or `drop`; else `size: 0.2`."""

    size: float | None = None
    """Most that the weights of linear layers and convolutions may take, packed, as a share of
    float32: 0.25 is 8 bits each, 0.125 is 4. Embeddings have 8 bits and do not count; recurrent
    layers stay in float."""
    latency: float | None = None
    """Most that the network may take on the target, measured, as a share of the float network's
    latency. Layers stay in float while there is time."""
    drop: float | None = None
    """Leave the most sensitive layers in float, as few as can be, until at most this is lost on the
    validation data: in points of accuracy, or in the data's own quality; without labels, in points
    of equal answers. The others get 8 bits."""
    weight_bits: tuple[int, ...] = ()
    """Bits to choose from, each 2 to 8; 32 leaves a layer in float. If not given: 8, 6, 5, 4 under
    a `size`; 32, 8 under a `latency` or a `drop`; all of these under a `size` and a `latency`."""
    assign: tuple[str, ...] = ()
    """Bits by pattern, as `"layer1.*=4"`, the first that fits; what a run found is in its report in
    this form. Every layer must fit one; nothing is searched then, and no budget is looked at."""
    samples: int = 128
    """Calibration samples that sensitivities are measured on."""
    calibrator: Calibrator = "min_max"
    """How ranges follow from histograms of activations."""
    percentile: float = 99.99
    """Share of the values that calibrator `percentile` keeps, in percent, in (50, 100]."""
    symmetric: bool = False
    """Activations as int8 around 0, as TensorRT asks for; else uint8 with any zero."""
    layers: Layers = Layers()
    """Which layers get integer weights."""

    def __post_init__(self) -> None:
        if self.size is not None and not 0 < self.size <= 1:
            raise ValueError(f"size must be in (0, 1], got {self.size}")
        if self.latency is not None and not 0 < self.latency < 1:
            raise ValueError(f"latency must be in (0, 1), got {self.latency}")
        if self.drop is not None and not self.drop >= 0:
            raise ValueError(f"drop must not be negative, got {self.drop}")
        if self.drop is not None and (self.size is not None or self.latency is not None):
            raise ValueError("give drop, or size and latency, not both")
        wrong = [b for b in self.weight_bits if not (2 <= b <= 8 or b == FLOAT)]
        if wrong or set(self.bits) == {FLOAT}:
            raise ValueError(
                f"weight_bits must each be 2 to 8, or 32 beside others, got {self.weight_bits}"
            )
        if FLOAT not in self.bits and (self.latency is not None or self.drop is not None):
            raise ValueError(
                f"under a latency or a drop layers stay in float: add 32 to weight_bits, got "
                f"{self.weight_bits}"
            )
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be in (50, 100], got {self.percentile}")
        for entry in self.assign:
            _parse(entry)

    @property
    def bits(self) -> tuple[int, ...]:
        """What is chosen from."""
        if self.weight_bits:
            return tuple(dict.fromkeys(self.weight_bits))
        if self.latency is None and self.drop is None:
            return (8, 6, 5, 4)
        return (FLOAT, 8) if self.size is None else (FLOAT, 8, 6, 5, 4)

    def weaker(self) -> Self | None:
        """Take half of the way to 8 bits and to the float network's time, or half of the drop."""
        if self.assign:
            return None
        if self.drop is not None:
            return replace(self, drop=self.drop / 2) if self.drop >= 2 * _LEAST_DROP else None
        size = self.size
        if size is None and self.latency is None:
            size = _DEFAULT_SIZE
        if size is not None and size < 0.25:
            size = (size + 0.25) / 2
            size = 0.25 if size > 0.24 else size
        latency = self.latency
        if latency is not None and latency < 0.9:
            latency = round((1 + latency) / 2, 3)
        made = replace(self, size=size, latency=latency)
        return None if made == self else made


@technique(needs=("calibration",), paper="arXiv:2001.00281")
def mixed_precision(net: nn.Module, config: MixedPrecision, context: Context) -> nn.Module:
    """Measure what each layer loses with each number of bits, and choose the least loss in all.

    The sensitivity of a layer is the divergence between the float network's outputs and those with
    this layer alone rounded (mean squared error where outputs are numbers); where it may stay in
    float, the rounding of its activations counts, too. The choice is an exact integer program:
    losses add up, budgets hold. Runtimes compute with bytes, so fewer bits save room, not time;
    ONNX Runtime's files are packed. Time is saved by layers in integers, and measured: whole
    networks are exported to the target and timed in turns, the one that is chosen, too. Under a
    `drop` layers are left in float in the order of their sensitivities; how many is found by
    halving, and decided on the validation data, in integers. Activations get 8 bits, as in
    `static`. Sensitivities, all networks that were tried and the choice, as a setting that can be
    pasted into a recipe, are in the facts.

    Raises:
        DataError: no calibration data, or a batch that does not fit; no validation data for `drop`.
        DependencyError: scipy is not installed.
        RecipeError: `assign` leaves a layer out.
        UnfitError: no choice of bits is within the budget, or no layer can be quantized.

    Source:
        Yao et al., HAWQ-V3, arXiv:2011.10680, section 3.4, for the integer program; sensitivities
        are measured as in ZeroQ, Cai et al., arXiv:2001.00281, section 3.2. We measure latencies in
        whole networks where HAWQ-V3 adds up those of single layers.
    """
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    fold_batch_norms(captured, context.inputs)
    chosen, left = choose(captured, config.layers)
    tables, kept = round_embeddings(captured, config.layers)
    if not chosen:
        raise UnfitError("no layer of this network can get integer weights")
    counts = {name: _weights(captured, name).numel() for name in chosen}
    losses: Losses = {}
    if config.assign:
        bits = _assigned(chosen, config.assign)
    else:
        batch = gather(captured, context.data.calibration, context.inputs, config.samples)
        few = replace(context, data=replace(context.data, calibration=[batch]))
        losses = _measured(captured, chosen, config, few, batch)
        if config.drop is not None:
            bits = _excluded(captured, losses, config, context)
        else:
            bits = _budgeted(captured, losses, counts, config, few)
    integers = [name for name in chosen if bits[name] != FLOAT]
    left.update({name: "float has the least loss here" for name in chosen if bits[name] == FLOAT})
    assign = [f"{name}={bits[name]}" for name in chosen]
    context.record(
        layers=len(integers),
        embeddings=len(tables),
        left_in_float={**left, **kept},
        sensitivities={n: {str(b): loss for b, loss in own.items()} for n, own in losses.items()},
        recipe={"mixed_precision": {"assign": assign, **_changed(config)}},
        size=sum(counts[n] * bits[n] for n in chosen) / (FLOAT * sum(counts.values())),
    )
    if integers:
        context.record(samples=_round(captured, bits, config, context))
    return captured


def _round(
    captured: fx.GraphModule, bits: Mapping[str, int], config: MixedPrecision, context: Context
) -> int:
    """Give layers their integers, and return the number of calibration samples."""
    integers = [name for name in bits if bits[name] != FLOAT]
    rounded, samples = measure_ranges(
        captured,
        integers,
        context,
        calibrator=config.calibrator,
        percentile=config.percentile,
        symmetric=config.symmetric,
    )
    scales = {n: weight_scales(captured, n, rounded, bits=bits[n], clip=True) for n in integers}
    make_integer(captured, scales, bits, rounded, context)
    return samples


def _copied(
    captured: fx.GraphModule, bits: Mapping[str, int], config: MixedPrecision, context: Context
) -> nn.Module:
    """Return the network with these bits as runtimes will compute it; `captured` stays."""
    made = copy.deepcopy(captured)
    _round(made, bits, config, context)
    settle(made)
    return made


def _measured(
    captured: fx.GraphModule,
    chosen: Sequence[str],
    config: MixedPrecision,
    few: Context,
    batch: Mapping[str, torch.Tensor],
) -> Losses:
    """Measure sensitivities; of activations, too, where a layer has the choice to keep them."""
    roundings: dict[str, Rounded] = dict.fromkeys(chosen, ())
    if FLOAT in config.bits:
        points = {name: place(captured, [name], few.target.runtime) for name in chosen}
        made, _ = measure_points(
            captured,
            [point for own in points.values() for point in own],
            few,
            calibrator=config.calibrator,
            percentile=config.percentile,
            symmetric=config.symmetric,
        )
        rest = iter(made)
        roundings = {name: [next(rest) for _ in own] for name, own in points.items()}
    return sensitivities(captured, chosen, config.bits, batch, few, roundings)


def _budgeted(
    captured: fx.GraphModule,
    losses: Losses,
    counts: Mapping[str, int],
    config: MixedPrecision,
    few: Context,
) -> dict[str, int]:
    """Choose under a size, a latency or both."""
    size = config.size
    if size is None and config.latency is None:
        size = _DEFAULT_SIZE
    budgets = [] if size is None else [size_budget(losses, counts, size)]
    if config.latency is None:
        return solve(losses, *budgets)

    def build(floats: Collection[str]) -> nn.Module:
        bits = {name: FLOAT if name in floats else 8 for name in losses}
        return captured if len(floats) == len(losses) else _copied(captured, bits, config, few)

    work = {name: _work(captured, name) for name in losses}
    return under_latency(losses, work, config.latency, build, few, *budgets)


def _excluded(
    captured: fx.GraphModule, losses: Losses, config: MixedPrecision, context: Context
) -> dict[str, int]:
    """Leave the most sensitive layers in float, as few as hold the drop.

    Raises:
        DataError: no validation data.
        UnfitError: not even the least sensitive layer alone can be in integers.
    """
    if context.data.validation is None:
        raise DataError(
            "mixed_precision: drop is decided on validation data, and there is none; add the split "
            "or give size or latency"
        )
    assert config.drop is not None
    judge = Judge(context.data, captured)
    most = max(b for b in config.bits if b != FLOAT)
    order = sorted(losses, key=lambda name: losses[name][most], reverse=True)
    steps: list[dict[str, float]] = []

    def bits(count: int) -> dict[str, int]:
        floats = set(order[:count])
        return {name: FLOAT if name in floats else most for name in losses}

    def holds(count: int) -> bool:
        score = judge.score(_copied(captured, bits(count), config, context))
        lost = judge.reference - score
        steps.append({"left_in_float": count, judge.kind: score, "drop": lost})
        context.record(exclusion=steps, float={judge.kind: judge.reference})
        return lost <= (config.drop or 0.0) + 1e-9

    broken, held = -1, len(order)
    middle = 0
    while held - broken > 1:
        if holds(middle):
            held = middle
        else:
            broken = middle
        middle = (broken + held) // 2
    if held == len(order):
        raise UnfitError(
            f"drop {config.drop:g} cannot be held: with layer {order[-1]!r} alone in integers "
            f"{judge.kind} falls by {steps[-1]['drop']:.3g}",
            too_strong=False,
        )
    return bits(held)


def _weights(captured: fx.GraphModule, name: str) -> torch.Tensor:
    weight = captured.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _work(captured: fx.GraphModule, name: str) -> float:
    """Count the multiply-accumulates of a layer on the example, over all calls."""
    layer, weight = captured.get_submodule(name), _weights(captured, name)
    total = 0
    for node in captured.graph.nodes:
        if node.op == "call_module" and node.target == name:
            side = node.all_input_nodes[0] if isinstance(layer, nn.ConvTranspose2d) else node
            places = torch.Size(side.meta["shape"]).numel() // weight.shape[0]
            total += places * weight.numel()
    return float(total)


def _assigned(chosen: Sequence[str], entries: Sequence[str]) -> dict[str, int]:
    rules = [_parse(entry) for entry in entries]
    check_patterns(Layers(patterns=tuple(pattern for pattern, _ in rules)), list(chosen))
    made = {}
    for name in chosen:
        fits = [bits for pattern, bits in rules if fnmatch.fnmatchcase(name, pattern)]
        if not fits:
            raise RecipeError(f'mixed_precision: assign says nothing for layer {name!r}; add "*=8"')
        made[name] = fits[0]
    return made


def _changed(config: MixedPrecision) -> dict[str, object]:
    """Return the settings beside `assign` that decide what is made, where they are not default."""
    usual = MixedPrecision()
    made: dict[str, object] = {
        name: getattr(config, name)
        for name in ("calibrator", "percentile", "symmetric")
        if getattr(config, name) != getattr(usual, name)
    }
    return made if config.layers == usual.layers else {**made, "layers": [*config.layers.patterns]}


def _parse(entry: str) -> tuple[str, int]:
    pattern, _, bits = entry.rpartition("=")
    if not pattern or not bits.isdigit() or not (2 <= int(bits) <= 8 or int(bits) == FLOAT):
        raise ValueError(
            f'assign takes entries as "layer1.*=4", with 2 to 8 bits or 32, got {entry!r}'
        )
    return pattern, int(bits)
