"""Static: weights and activations as 8-bit integers, with ranges measured on calibration data."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import nn

from tersor.core.context import Context
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.fold import fold_batch_norms
from tersor.quantization._integer import (
    Calibrator,
    choose,
    make_integer,
    measure_ranges,
    round_embeddings,
    weight_scales,
)


@dataclass(frozen=True, kw_only=True)
class Static:
    """Settings of static quantization."""

    bits: Literal[8] = 8
    """Bits of activations."""
    weight_bits: int = 8
    """Bits of weights, 2 to 8. Runtimes compute with bytes: fewer bits save no time; files for ONNX
    Runtime hold them packed."""
    weight_range: Literal["max", "mse"] = "max"
    """Where a channel's codes end: at its largest weight, or where the squared error is least."""
    calibrator: Calibrator = "min_max"
    """How ranges follow from histograms of activations."""
    percentile: float = 99.99
    """Share of the values that calibrator `percentile` keeps, in percent, in (50, 100]."""
    symmetric: bool = False
    """Activations as int8 around 0, as TensorRT asks for; else uint8 with any zero."""
    power_of_two: bool = False
    """Scales 2**n, so that codes are fixed-point numbers: what FPGAs compute with. The next power
    up, so up to a bit is lost; needs `symmetric`."""
    per_channel: bool = True
    """A scale for each output channel of the weights; else one for each layer."""
    float_ends: bool = False
    """Leave the first and the last layer in float; embeddings do not count as layers here."""
    layers: Layers = Layers()
    """Which layers get integer weights."""

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be 2 to 8, got {self.weight_bits}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be in (50, 100], got {self.percentile}")
        if self.power_of_two and not self.symmetric:
            raise ValueError("power_of_two needs symmetric: fixed-point numbers have no zero point")

    def weaker(self) -> Self | None:
        """Clip less harmfully, then leave the two most sensitive layers in float."""
        if self.calibrator != "mse":
            return replace(self, calibrator="mse")
        return None if self.float_ends else replace(self, float_ends=True)


@technique(needs=("calibration",), paper="arXiv:1712.05877")
def static(net: nn.Module, config: Static, context: Context) -> nn.Module:
    """Capture the network, fold batch norms, measure ranges, and round.

    The result is a graph whose layers hold int8 weights and whose tensors are rounded where
    runtimes fuse it (`ops.placement`). Bias stays float. Embeddings get int8 rows. Layers in float
    are in the facts, with the reason.

    Source:
        Jacob et al., arXiv:1712.05877: integer-arithmetic-only inference, after training. Scales of
        weights are those of each output channel (Krishnamoorthi, arXiv:1806.08342).
    """
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    folded = fold_batch_norms(captured, context.inputs)
    chosen, left = choose(captured, config.layers)
    if config.float_ends:
        ends = {*chosen[:1], *chosen[-1:]}
        chosen = [name for name in chosen if name not in ends]
        left.update(dict.fromkeys(sorted(ends), "first or last layer"))
    context.record(batch_norms_folded=folded)
    tables, kept = round_embeddings(captured, config.layers, power_of_two=config.power_of_two)
    context.record(layers=len(chosen), embeddings=len(tables), left_in_float={**left, **kept})
    if not chosen:
        return captured
    rounded, samples = measure_ranges(
        captured,
        chosen,
        context,
        calibrator=config.calibrator,
        percentile=config.percentile,
        symmetric=config.symmetric,
        power_of_two=config.power_of_two,
    )
    clip, bits = config.weight_range == "mse", config.weight_bits
    scales = {
        name: weight_scales(
            captured, name, rounded, bits=bits, clip=clip, power_of_two=config.power_of_two
        )
        for name in chosen
    }
    if not config.per_channel:
        scales = {name: s.max().expand_as(s).clone() for name, s in scales.items()}
    make_integer(captured, scales, dict.fromkeys(chosen, bits), rounded, context)
    context.record(roundings=len(rounded), calibrator=config.calibrator, samples=samples)
    return captured
