"""Static: weights and activations as 8-bit integers, with ranges measured on calibration data."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

from torch import fx, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, ModelError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import calibrators
from tersor.ops.calibrate import histograms
from tersor.ops.capture import annotate, capture
from tersor.ops.fold import fold_batch_norms
from tersor.ops.modules import Quantize, check_patterns, quantized, rows, why_not
from tersor.ops.placement import Point, insert, place
from tersor.ops.quantize import activation_grid, channel_scales
from tersor.ops.twin import remember

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True, kw_only=True)
class Static:
    """Settings of static quantization."""

    bits: Literal[8] = 8
    """Bits of activations."""
    weight_bits: int = 8
    """Bits of weights, 2 to 8. Runtimes compute with bytes: fewer bits lose accuracy, save nothing
    by themselves, and compress better."""
    weight_range: Literal["max", "mse"] = "max"
    """Where a channel's codes end: at its largest weight, or where the squared error is least."""
    calibrator: Literal["min_max", "percentile", "entropy", "mse"] = "min_max"
    """How ranges follow from histograms of activations."""
    percentile: float = 99.99
    """Share of the values that calibrator `percentile` keeps, in percent, in (50, 100]."""
    symmetric: bool = False
    """Activations as int8 around 0, as TensorRT asks for; else uint8 with any zero."""
    per_channel: bool = True
    """A scale for each output channel of the weights; else one for each layer."""
    float_ends: bool = False
    """Leave the first and the last layer in float."""
    layers: Layers = Layers()
    """Which layers get integer weights."""

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be 2 to 8, got {self.weight_bits}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be in (50, 100], got {self.percentile}")

    def weaker(self) -> Self | None:
        """Clip less harmfully, then leave the two most sensitive layers in float."""
        if self.calibrator != "mse":
            return replace(self, calibrator="mse")
        return None if self.float_ends else replace(self, float_ends=True)


@technique(needs=("calibration",), paper="arXiv:1712.05877")
def static(net: nn.Module, config: Static, context: Context) -> nn.Module:
    """Capture the network, fold batch norms, measure ranges, and round.

    The result is a graph whose layers hold int8 weights and whose tensors are rounded where
    runtimes fuse it (`ops.placement`). Bias stays float. Layers in float are in the facts, with the
    reason.

    Source:
        Jacob et al., arXiv:1712.05877: integer-arithmetic-only inference, after training. Scales of
        weights are those of each output channel (Krishnamoorthi, arXiv:1806.08342).
    """
    captured = capture(net.eval(), context.inputs)
    folded = fold_batch_norms(captured, context.inputs)
    chosen, left = _choose(captured, config)
    context.record(batch_norms_folded=folded)
    if not chosen:
        context.record(layers=0, left_in_float=left)
        return captured
    points = place(captured, chosen)
    batches = context.data.calibration
    if batches is None:
        raise DataError("static needs calibration data: a few hundred samples, without labels")
    watched = context.track(batches, "calibrating")
    bins = 0 if config.calibrator == "min_max" else 2048
    counted, samples = histograms(
        captured, [p.observed for p in points], watched, context.inputs, bins=bins
    )
    calibrator = _calibrator(config)
    rounded = [
        (point, _rounding(point, calibrator(histogram), config))
        for point, histogram in zip(points, counted, strict=True)
    ]
    remember(captured)
    for name in chosen:
        captured.set_submodule(name, _integer(captured, name, rounded, config))
    insert(captured, rounded)
    annotate(captured, context.inputs)
    context.record(
        layers=len(chosen),
        left_in_float=left,
        roundings=len(points),
        calibrator=config.calibrator,
        samples=samples,
    )
    return captured


def _choose(captured: fx.GraphModule, config: Static) -> tuple[list[str], dict[str, str]]:
    """Return the layers to quantize in the order of the graph, and why others stay as they are."""
    modules = dict(captured.named_modules())
    called = Counter(str(n.target) for n in captured.graph.nodes if n.op == "call_module")
    names = [
        n
        for n in called
        if isinstance(modules[n], _LAYERS) or why_not(modules[n]) == "quantized before"
    ]
    check_patterns(config.layers, names)
    able = [n for n in names if why_not(modules[n]) is None]
    ends = {able[0], able[-1]} if config.float_ends and able else set()
    chosen, left = [], {}
    for name in names:
        reason = why_not(modules[name])
        if reason is None and not config.layers.holds(name):
            reason = "excluded by layers"
        if reason is None and name in ends:
            reason = "first or last layer"
        if reason is None:
            chosen.append(name)
        else:
            left[name] = reason
    attentions = [
        n.name
        for n in captured.graph.nodes
        if n.target is nn.functional.scaled_dot_product_attention
    ]
    left.update(
        dict.fromkeys(
            attentions, "attention: its softmax is float, and so are the products around it"
        )
    )
    return chosen, left


def _calibrator(config: Static) -> calibrators.Calibrator:
    if config.calibrator == "percentile":
        return partial(calibrators.percentile, percent=config.percentile)
    by_name: dict[str, calibrators.Calibrator] = {
        "min_max": calibrators.min_max,
        "entropy": calibrators.entropy,
        "mse": calibrators.mse,
    }
    return by_name[config.calibrator]


def _rounding(point: Point, ends: tuple[float, float], config: Static) -> Quantize:
    low, high = ends
    inside = point.ceiling is not None and high <= point.ceiling
    return Quantize(*activation_grid(low, high, symmetric=config.symmetric, inside=inside))


def _integer(
    captured: fx.GraphModule, name: str, rounded: list[tuple[Point, Quantize]], config: Static
) -> nn.Module:
    """Return layer `name` with integer weights."""
    layer = captured.get_submodule(name)
    bias = layer.bias
    scales = [
        module.scale
        for point, module in rounded
        for node, users in point.places.items()
        for user in (node.users if users is None else users)
        if user.op == "call_module" and user.target == name
    ]
    try:
        scale_O = channel_scales(
            rows(layer),
            bits=config.weight_bits,
            clip=config.weight_range == "mse",
            bias_O=bias.detach() if isinstance(bias, nn.Parameter) else None,
            input_scale=min(scales, default=None),
        )
    except ValueError as error:
        raise ModelError(f"layer {name!r} cannot be quantized: {error}") from error
    if not config.per_channel:
        scale_O = scale_O.max().expand_as(scale_O).clone()
    return quantized(layer, scale_O, config.weight_bits)
