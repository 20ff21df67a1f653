"""Weight-only: weights as integers of 8 to 2 bits, activations in float; smaller files."""

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.context import Context
from tersor.core.errors import ModelError, RecipeError
from tersor.core.layers import Layers
from tersor.core.runtime import Target
from tersor.core.technique import technique
from tersor.ops import recurrent
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.fold import fold_batch_norms
from tersor.ops.modules import GroupedLinear, check_patterns, quantized, rows, why_not
from tersor.ops.quantize import channel_scales, group_codes
from tersor.quantization._integer import embeddings, round_embeddings

_KINDS = (
    nn.Linear,
    _ConvNd,
    nn.RNNBase,
    nn.MultiheadAttention,
    recurrent.RoundedRecurrent,
)
_RECURRENT = ("onnxruntime", "openvino", "torch_eager", "torch_export")
"""Runtimes that recurrent layers with integer weights are tested on."""


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """Settings of weight-only quantization."""

    bits: Literal[8, 4, 3, 2] = 8
    """Bits of a weight. Convolutions, LSTMs and GRUs are left in float below 8. Files for ONNX
    Runtime hold 3 and 2 bits packed, those for other runtimes in a byte each. ONNX Runtime
    multiplies by 8 bits with activations rounded to 8 bits in blocks of a row, by fewer bits with
    float activations."""
    group_size: int | None = None
    """Weights of a row that share a scale, at least 2; -1: the whole row. Unset: 32 below 8 bits
    where it divides the row, else -1. ONNX Runtime multiplies by packed weights only for powers of
    two from 16 on."""
    symmetric: bool = True
    """Codes around 0; else each group has a zero of its own."""
    weight_range: Literal["max", "mse"] = "max"
    """Where a group's codes end: at its largest weight, or where the squared error is smallest."""
    layers: Layers = Layers()
    """Which linear layers, convolutions, LSTMs, GRUs and embeddings."""

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size != -1 and self.group_size < 2:
            raise ValueError(f"group_size must be -1 or at least 2, got {self.group_size}")


@technique()
def weight_only(net: nn.Module, config: WeightOnly, context: Context) -> nn.Module:
    """Replace linear layers, at 8 bits convolutions, LSTMs and GRUs, by ones of integer weights.

    Rounding is to nearest; `adaround` in the same stage learns it. The runtimes multiply in
    float32; whether that is faster than float weights depends on memory bandwidth. Convolutions get
    one symmetric scale for each output channel whatever the group size, recurrent layers one for
    each row of each gate; their files are smaller, and the runtime computes as before. Embeddings
    get 8 bits, a scale for each row, whatever `bits`. Batch norms are folded first, which changes
    no code: a channel's scale takes them in. What stays in float is in the facts, with the reason.

    Raises:
        RecipeError: the group size does not divide a layer's columns; a pattern matches no layer.
        ModelError: weights are NaN or infinite.
    """
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    folded = fold_batch_norms(captured, context.inputs)
    called = {str(n.target) for n in captured.graph.nodes if n.op == "call_module"}
    layers = {
        name: layer
        for name, layer in captured.named_modules()
        if name in called and (isinstance(layer, _KINDS) or why_not(layer) == "quantized before")
    }
    check_patterns(config.layers, [*layers, *embeddings(captured)])
    left: dict[str, str] = {}
    chosen: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        reason = _why_not(layer, config, context.target)
        if reason is None and not config.layers.holds(name):
            reason = "excluded by layers"
        if reason is None:
            chosen[name] = layer
        else:
            left[name] = reason
    for name, layer in chosen.items():
        if isinstance(layer, nn.Linear):
            _check_size(name, layer.in_features, config)
    tables, kept = round_embeddings(captured, config.layers)
    for name, layer in context.track(chosen.items(), "rounding weights", len(chosen)):
        try:
            captured.set_submodule(name, _rounded(layer, config))
        except ValueError as error:
            raise ModelError(f"layer {name!r} cannot be quantized: {error}") from error
    sizes = {n: m.group_size for n, m in captured.named_modules() if isinstance(m, GroupedLinear)}
    context.record(
        layers=len(chosen),
        embeddings=len(tables),
        left_in_float={**left, **kept},
        bits=config.bits,
        group_sizes=sizes,
        batch_norms_folded=folded,
    )
    return captured


def _why_not(layer: nn.Module, config: WeightOnly, target: Target) -> str | None:
    """Say why a layer stays in float, or None."""
    if isinstance(layer, nn.Linear):
        return why_not(layer)
    if isinstance(layer, (nn.RNNBase, recurrent.RoundedRecurrent)):
        reason = recurrent.why_not(layer)
        if reason is None and target.runtime not in _RECURRENT:
            kind = type(layer).__name__
            reason = f"{kind}, whose integer weights were not tried on {target.runtime}"
    else:
        reason = why_not(layer)
    if reason is None and config.bits < 8:
        kind = "a convolution" if isinstance(layer, _ConvNd) else type(layer).__name__
        reason = f"{kind}, which no runtime here computes from {config.bits}-bit weights"
    return reason


def _check_size(name: str, columns: int, config: WeightOnly) -> None:
    wanted = config.group_size
    if wanted is None or wanted == -1 or columns % wanted == 0:
        return
    divisors = [d for d in range(2, columns) if columns % d == 0]
    nearest = min(divisors, key=lambda d: abs(d - wanted), default=None)
    use = f"group_size {nearest} or -1" if nearest else "group_size -1"
    raise RecipeError(
        f"weight_only: layer {name!r} has {columns} columns, not a multiple of group_size "
        f'{wanted}; use {use}, or leave it out: layers: ["!{name}"]'
    )


def _size(columns: int, config: WeightOnly) -> int:
    """Return the values of a row of `columns` that share a scale."""
    if config.group_size is None:
        return 32 if config.bits < 8 and columns % 32 == 0 else columns
    return columns if config.group_size == -1 else config.group_size


def _rounded(layer: nn.Module, config: WeightOnly) -> nn.Module:
    clip = config.weight_range == "mse"
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        return recurrent.rounded(layer, clip=clip)
    if not isinstance(layer, nn.Linear):
        return quantized(layer, channel_scales(rows(layer), clip=clip))
    size = _size(layer.in_features, config)
    if config.bits == 8 and config.symmetric and size == layer.in_features:
        return quantized(layer, channel_scales(rows(layer), clip=clip))
    made = GroupedLinear(
        layer.in_features,
        layer.out_features,
        bits=config.bits,
        group_size=size,
        symmetric=config.symmetric,
        bias=layer.bias is not None,
    )
    codes, scale, zero = group_codes(
        layer.weight.detach(),
        bits=config.bits,
        group_size=size,
        symmetric=config.symmetric,
        clip=clip,
    )
    made.weight, made.scale, made.zero, made.bias = codes, scale, zero, layer.bias
    return made.eval()
