"""Numbers on a grid: scales, zero points and codes of weights and activations.

A real x is stored as the code q = round(x / scale) + zero, kept inside [low, high]; it stands for
(q - zero) * scale.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# O output channels, I values of one channel, G groups of a channel.

_TINY = 1e-30
"""Smallest scale: below it 1 / scale, or the product of two scales, leaves float32."""
_NARROWEST, _FACTORS = 0.3, 71
"""Ranges that are tried when clipping: shares of the full one, and how many."""
_BIAS_CODES = 2.0**30
"""A bias is added to a 32-bit sum of products; half of that range is left to the products."""


def activation_grid(
    low: float,
    high: float,
    *,
    symmetric: bool = False,
    inside: bool = False,
    power_of_two: bool = False,
) -> tuple[float, int, int, int]:
    """Return scale, zero, lowest and highest code of 8 bits for values of a range.

    The range is widened to hold 0, which gets a code of its own: padding and ReLU stay exact. A
    range without extent gets scale 1.

    Args:
        low: Smallest value to represent.
        high: Largest value to represent.
        symmetric: Codes -128..127 with zero 0, as TensorRT asks for; else 0..255 with any zero.
        inside: Round the scale so that no code stands for more than `high`. A runtime leaves out a
            clip at `high` only then.
        power_of_two: Scales 2**n, the next one up, of symmetric codes: those of fixed-point
            hardware.

    Raises:
        ValueError: an end of the range is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"range {low}..{high} is not finite")
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        bound = max(-low, high)
        scale = max(bound / 127, _TINY) if bound else 1.0
        if power_of_two:
            return next_power_of_two(scale), 0, -128, 127
        most = bound / 127 if inside and high == bound else None
        return exact_scale(scale, 0, most), 0, -128, 127
    if high == low:
        return 1.0, 0, 0, 255
    scale = max((high - low) / 255, _TINY)
    zero = min(255, max(0, round(-low / scale)))
    if inside and zero < 255:
        return exact_scale(min(scale, high / (255 - zero)), zero, high / (255 - zero)), zero, 0, 255
    return exact_scale(scale, zero), zero, 0, 255


def next_power_of_two(scale: float) -> float:
    """Return the smallest 2**n that is not below `scale`, which is positive."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))


def exact_scale(scale: float, zero: int, most: float | None = None) -> float:
    """Return a scale nearby with which float32 computes the codes without an error of its own.

    OpenVINO describes a grid by its ends and adds `-low * (255 / (high - low))` for the zero; for
    most scales that is not quite the zero, and values between two codes fall the other way. Scales
    with 16 significant bits make the ends exact; of these the next one whose zero is exact is
    taken, within 0.1 %.

    Args:
        scale: Positive and finite.
        zero: Code of 0, 0 to 255.
        most: The scale must stay below this.
    """
    mantissa, exponent = math.frexp(scale)
    units = math.floor(mantissa * 2**16) if most is not None else round(mantissa * 2**16)
    step = -1 if most is not None else 1
    for i in range(32):
        near = float(np.float32(math.ldexp(units + i * step, exponent - 16)))
        if (most is None or near <= most * (1 - 1e-7)) and _zero_is_exact(near, zero):
            return near
    return float(np.float32(scale if most is None else scale * (1 - 2e-7)))


def _zero_is_exact(scale: float, zero: int) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.float32(-zero * scale), np.float32((255 - zero) * scale)
        return bool(-low * (np.float32(255) / (high - low)) == np.float32(zero))


def channel_scales(
    weight_OI: Float[Tensor, "O I"],
    *,
    bits: int = 8,
    clip: bool = False,
    bias_O: Float[Tensor, "O"] | None = None,
    input_scale: float | None = None,
    power_of_two: bool = False,
) -> Float[Tensor, "O"]:
    """Return the scale of each output channel for symmetric codes.

    A runtime stores the bias in steps of (weight scale * input scale) with 32 bits. Where the
    weights of a channel are so small, or all zero, that its bias would not fit, the scale is
    widened.

    Args:
        weight_OI: Weights, one row for each channel.
        bits: Bits of a code.
        clip: Choose the range with the smallest squared error; else the largest weight is its end.
        bias_O: Bias that is added to the products.
        input_scale: Scale of the layer's input.
        power_of_two: Scales 2**n, the next one up.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    _check_finite(weight_OI)
    most = 2 ** (bits - 1) - 1
    scale_O = weight_OI.abs().amax(1) / most
    if clip:
        scale_O = _least_error(weight_OI[:, None], scale_O[:, None], -most, most)[:, 0]
    if bias_O is not None and input_scale is not None:
        scale_O = scale_O.maximum(bias_O.abs() / (input_scale * _BIAS_CODES))
    scale_O = torch.where(scale_O > 0, scale_O.clamp_min(_TINY), 1.0)
    if power_of_two:
        scale_O = torch.tensor([next_power_of_two(scale) for scale in scale_O.tolist()])
    return scale_O


def _least_error(
    groups_OGS: Float[Tensor, "O G S"], scale_OG: Float[Tensor, "O G"], low: int, high: int
) -> Float[Tensor, "O G"]:
    """Shrink each group's scale to where rounding and clipping err least together."""
    best_OG, error_OG = scale_OG, torch.full_like(scale_OG, math.inf)
    for factor in torch.linspace(1.0, _NARROWEST, _FACTORS).tolist():
        tried_OG = scale_OG * factor
        safe_OG1 = torch.where(tried_OG.abs() < _TINY, 1.0, tried_OG)[..., None]
        rounded = (groups_OGS / safe_OG1).round_().clamp_(low, high).mul_(safe_OG1)
        found_OG = rounded.sub_(groups_OGS).square_().sum(2)
        better = found_OG < error_OG
        best_OG = torch.where(better, tried_OG, best_OG)
        error_OG = torch.where(better, found_OG, error_OG)
    return best_OG


def symmetric_codes(
    weight_OI: Float[Tensor, "O I"], scale_O: Float[Tensor, "O"], *, bits: int = 8
) -> Int[Tensor, "O I"]:
    """Round weights to codes of zero 0, as int8. The lowest code is left out: -127..127, -7..7."""
    most = 2 ** (bits - 1) - 1
    return (weight_OI / scale_O[:, None]).round().clamp(-most, most).to(torch.int8)


def group_codes(
    weight_OI: Float[Tensor, "O I"],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip: bool = False,
) -> tuple[Int[Tensor, "O I"], Float[Tensor, "O G"], Int[Tensor, "O G"] | None]:
    """Quantize weights in groups along a row, each with its own scale.

    A symmetric scale is the better, in squared error, of "the largest magnitude is the lowest code"
    (-8 of 4 bits) and "it is the highest" (7); its sign may thus be negative.

    Args:
        weight_OI: Weights, float.
        bits: 2 to 8.
        group_size: Values that share a scale; divides I.
        symmetric: Signed codes without a zero; else unsigned codes with a zero for each group.
        clip: Narrow each range to the one with the smallest squared error.

    Returns:
        Codes (int8 or uint8), scales (float32), zeros (uint8) or None.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    _check_finite(weight_OI)
    groups_OGS = weight_OI.float().view(len(weight_OI), -1, group_size)
    if symmetric:
        codes, scale_OG = _symmetric_groups(groups_OGS, bits, clip)
        return codes.flatten(1).to(torch.int8), scale_OG, None
    best = list(_asymmetric_groups(groups_OGS, bits, 1.0))
    for factor in torch.linspace(1.0, _NARROWEST, _FACTORS).tolist()[1:] if clip else ():
        found = _asymmetric_groups(groups_OGS, bits, factor)
        better_OG = found[-1] < best[-1]
        best = [
            torch.where(better_OG[..., None] if new.dim() == 3 else better_OG, new, old)
            for new, old in zip(found, best, strict=True)
        ]
    codes, scale_OG, zero_OG, _ = best
    return codes.flatten(1).to(torch.uint8), scale_OG, zero_OG.to(torch.uint8)


def _asymmetric_groups(
    groups_OGS: Float[Tensor, "O G S"], bits: int, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales, zeros and squared errors for ranges shrunk by a factor."""
    most = 2**bits - 1
    low_OG = groups_OGS.amin(2).clamp_max(0) * factor
    high_OG = groups_OGS.amax(2).clamp_min(0) * factor
    scale_OG = (high_OG - low_OG) / most
    scale_OG = torch.where(scale_OG > 0, scale_OG.clamp_min(_TINY), 1.0)
    zero_OG = (-low_OG / scale_OG).round().clamp(0, most)
    codes = ((groups_OGS / scale_OG[..., None]).round() + zero_OG[..., None]).clamp(0, most)
    rounded = (codes - zero_OG[..., None]) * scale_OG[..., None]
    return codes, scale_OG, zero_OG, (rounded - groups_OGS).square().sum(2)


def _symmetric_groups(
    groups_OGS: Float[Tensor, "O G S"], bits: int, clip: bool
) -> tuple[Tensor, Tensor]:
    """Return codes and scales, with the better of either end on the largest magnitude."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    at = groups_OGS.abs().argmax(2, keepdim=True)
    extreme_OG = groups_OGS.gather(2, at).squeeze(2)
    found = []
    for code in (highest, lowest):
        scale_OG = extreme_OG / code
        if clip:
            scale_OG = _least_error(groups_OGS, scale_OG, lowest, highest)
        scale_OG = torch.where(scale_OG.abs() < _TINY, 1.0, scale_OG)
        codes = (groups_OGS / scale_OG[..., None]).round().clamp(lowest, highest)
        error_OG = (codes * scale_OG[..., None] - groups_OGS).square().sum(2)
        found.append((codes, scale_OG, error_OG))
    (codes, scale_OG, error_OG), (other, other_scale, other_error) = found
    better = other_error < error_OG
    return torch.where(better[..., None], other, codes), torch.where(better, other_scale, scale_OG)


def _check_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("its weights hold NaN or infinity")
