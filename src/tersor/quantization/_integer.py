"""What techniques share that put layers on integers: which, where they round, with which scales."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.context import Context
from tersor.core.errors import DataError, ModelError, UnfitError
from tersor.core.layers import Layers
from tersor.ops import calibrators
from tersor.ops.attention import split_attention
from tersor.ops.calibrate import histograms
from tersor.ops.capture import annotate, capture
from tersor.ops.fake_quantize import FakeLayer, FakeRounding, Ranges
from tersor.ops.fold import find_batch_norms, fold_batch_norms
from tersor.ops.modules import (
    Quantize,
    check_patterns,
    not_float32,
    quantized,
    quantized_embedding,
    rows,
    why_not,
)
from tersor.ops.placement import Point, insert, place
from tersor.ops.quantize import activation_grid, channel_scales
from tersor.ops.twin import remember

Calibrator = Literal["min_max", "moving_average", "percentile", "entropy", "mse"]
Rounded = Sequence[tuple[Point, Quantize]]
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)


def choose(captured: fx.GraphModule, layers: Layers) -> tuple[list[str], dict[str, str]]:
    """Return the layers to quantize in the order of the graph, and why others stay as they are."""
    modules = dict(captured.named_modules())
    called = Counter(str(n.target) for n in captured.graph.nodes if n.op == "call_module")
    names = [
        n
        for n in called
        if isinstance(modules[n], _LAYERS) or why_not(modules[n]) == "quantized before"
    ]
    check_patterns(layers, [*names, *embeddings(captured)])
    chosen, left = [], {}
    for name in names:
        reason = _why_not(modules[name])
        if reason is None and not layers.holds(name):
            reason = "excluded by layers"
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


def _why_not(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.RNNBase):
        kind = type(layer).__name__
        more = {"LSTM": "; `dynamic` and `weight_only` do", "GRU": "; `weight_only` does"}
        return f"{kind}: `static` rounds none{more.get(kind, '')}"
    return why_not(layer)


def embeddings(captured: fx.GraphModule) -> list[str]:
    """Return the embeddings that a graph calls."""
    called = {str(n.target) for n in captured.graph.nodes if n.op == "call_module"}
    return [n for n, m in captured.named_modules() if n in called and isinstance(m, nn.Embedding)]


def round_embeddings(
    captured: fx.GraphModule, layers: Layers, *, power_of_two: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Give embeddings int8 rows: a table is looked up, not multiplied, so this saves room only.

    Returns:
        The embeddings, and why others stay as they are.

    Raises:
        ModelError: weights are NaN or infinite.
    """
    read = {str(n.target).rpartition(".")[0] for n in captured.graph.nodes if n.op == "get_attr"}
    done, left = [], {}
    for name in embeddings(captured):
        layer = captured.get_submodule(name)
        assert isinstance(layer, nn.Embedding)
        if name in read:
            left[name] = "an embedding whose table is read elsewhere, too"
        elif layer.max_norm is not None:
            left[name] = "an embedding with max_norm"
        elif reason := not_float32(layer.weight):
            left[name] = reason
        elif not layers.holds(name):
            left[name] = "excluded by layers"
        else:
            done.append(name)
    remember(captured)
    for name in done:
        layer = captured.get_submodule(name)
        assert isinstance(layer, nn.Embedding)
        try:
            made = quantized_embedding(layer, power_of_two=power_of_two)
        except ValueError as error:
            raise ModelError(f"layer {name!r} cannot be quantized: {error}") from error
        captured.set_submodule(name, made)
    return done, left


def measure_ranges(
    captured: fx.GraphModule,
    chosen: Sequence[str],
    context: Context,
    *,
    calibrator: Calibrator,
    percentile: float = 99.99,
    symmetric: bool = False,
    power_of_two: bool = False,
) -> tuple[list[tuple[Point, Quantize]], int]:
    """Decide where to round for the chosen layers, and on which grids, from calibration data.

    Returns:
        Places with their roundings, and the number of samples.

    Raises:
        DataError: no calibration data, or a batch that does not fit.
    """
    points = place(captured, chosen, context.target.runtime)
    return measure_points(
        captured,
        points,
        context,
        calibrator=calibrator,
        percentile=percentile,
        symmetric=symmetric,
        power_of_two=power_of_two,
    )


def measure_points(
    captured: fx.GraphModule,
    points: Sequence[Point],
    context: Context,
    *,
    calibrator: Calibrator,
    percentile: float = 99.99,
    symmetric: bool = False,
    power_of_two: bool = False,
) -> tuple[list[tuple[Point, Quantize]], int]:
    """Decide on the grids of given places; as `measure_ranges`."""
    if context.data.calibration is None:
        raise DataError("calibration data is needed: a few hundred samples, without labels")
    counted, samples = histograms(
        captured,
        [p.observed for p in points],
        context.track(context.data.calibration, "calibrating"),
        context.inputs,
        bins=0 if calibrator in ("min_max", "moving_average") else 2048,
        each=calibrator == "moving_average",
    )
    made = []
    for point, histogram in zip(points, counted, strict=True):
        low, high = _calibrators(percentile)[calibrator](histogram)
        inside = point.ceiling is not None and high <= point.ceiling
        grid = activation_grid(
            low, high, symmetric=symmetric, inside=inside, power_of_two=power_of_two
        )
        made.append((point, Quantize(*grid)))
    return made, samples


def _calibrators(percent: float) -> Mapping[Calibrator, calibrators.Calibrator]:
    return {
        "min_max": calibrators.min_max,
        "moving_average": calibrators.moving_average,
        "percentile": partial(calibrators.percentile, percent=percent),
        "entropy": calibrators.entropy,
        "mse": calibrators.mse,
    }


def weight_scales(
    captured: fx.GraphModule,
    name: str,
    rounded: Rounded,
    *,
    bits: int,
    clip: bool,
    power_of_two: bool = False,
) -> Tensor:
    """Return the scale of each output channel of layer `name`.

    Raises:
        ModelError: its weights are NaN or infinite.
    """
    layer = captured.get_submodule(name)
    bias = layer.bias
    inputs = [
        module.scale
        for point, module in rounded
        for node, users in point.places.items()
        for user in (node.users if users is None else users)
        if user.op == "call_module" and user.target == name
    ]
    try:
        return channel_scales(
            rows(layer),
            bits=bits,
            clip=clip,
            bias_O=bias.detach() if isinstance(bias, nn.Parameter) else None,
            input_scale=min(inputs, default=None),
            power_of_two=power_of_two,
        )
    except ValueError as error:
        raise ModelError(f"layer {name!r} cannot be quantized: {error}") from error


def make_integer(
    captured: fx.GraphModule,
    scales: Mapping[str, Tensor],
    bits: Mapping[str, int],
    rounded: Rounded,
    context: Context,
) -> None:
    """Give layers integer weights of these scales and bits, and insert the roundings."""
    remember(captured)
    for name, scale_O in scales.items():
        captured.set_submodule(name, quantized(captured.get_submodule(name), scale_O, bits[name]))
    insert(captured, rounded)
    annotate(captured, context.inputs)


def make_trainable(
    net: nn.Module,
    context: Context,
    *,
    bits: int,
    symmetric: bool,
    ranges: Ranges,
    freeze: float,
    layers: Layers,
) -> fx.GraphModule:
    """Capture a network and put rounding that can be trained where `static` rounds.

    Batch norms stay trainable inside the layers that they are folded into; dropout is taken out.

    Raises:
        UnfitError: no layer can get integer weights.
    """
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    own: dict[str, tuple[nn.Module, _BatchNorm]] = {}
    for name, bn in find_batch_norms(captured):
        layer, norm = captured.get_submodule(name), captured.get_submodule(bn)
        assert isinstance(norm, _BatchNorm)
        own[name] = copy.deepcopy(layer), copy.deepcopy(norm)
    folded = fold_batch_norms(captured, context.inputs)
    chosen, left = choose(captured, layers)
    if not chosen:
        raise UnfitError("no layer of this network can get integer weights")
    rounded, samples = measure_ranges(
        captured, chosen, context, calibrator="mse", symmetric=symmetric
    )
    for name in chosen:
        scale_O = weight_scales(captured, name, rounded, bits=bits, clip=bits < 8)
        layer, norm_or_none = own.get(name, (captured.get_submodule(name), None))
        fake = FakeLayer(layer, norm_or_none, scale_O, bits=bits, ranges=ranges, freeze=freeze)
        captured.set_submodule(name, fake)
    trained = [
        (
            point,
            FakeRounding(
                start,
                ceiling=point.ceiling is not None,
                symmetric=symmetric,
                ranges=ranges,
                freeze=freeze,
            ),
        )
        for point, start in rounded
    ]
    insert(captured, trained)
    left.update(dict.fromkeys(embeddings(captured), "an embedding; training leaves it as it is"))
    context.record(
        layers=len(chosen),
        left_in_float=left,
        roundings=len(rounded),
        batch_norms_folded=folded,
        samples=samples,
    )
    return captured.eval()
