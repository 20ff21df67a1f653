"""Numbers on a grid: scales, zero points and codes of weights and activations.

A real x is stored as the code q = round(x / scale) + zero, kept inside [low, high]; it stands for
(q - zero) * scale.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# O output channels, I values of one channel, G groups of a channel.

_TINY = 1e-30
"""Smallest scale: below it 1 / scale, or the product of two scales, leaves float32."""
_BIAS_CODES = 2.0**30
"""A bias is added to a 32-bit sum of products; half of that range is left to the products."""


def activation_grid(
    low: float, high: float, *, symmetric: bool = False, inside: bool = False
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

    Raises:
        ValueError: an end of the range is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"range {low}..{high} is not finite")
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        bound = max(-low, high)
        scale = max(bound / 127, _TINY) if bound else 1.0
        return _float32(scale, bound / 127 if inside and high == bound else None), 0, -128, 127
    if high == low:
        return 1.0, 0, 0, 255
    scale = max((high - low) / 255, _TINY)
    zero = min(255, max(0, round(-low / scale)))
    if inside and zero < 255:
        return _float32(min(scale, high / (255 - zero)), high / (255 - zero)), zero, 0, 255
    return _float32(scale), zero, 0, 255


def _float32(scale: float, bound: float | None = None) -> float:
    """Round to float32, which the runtimes compute in; down where a bound must not be passed."""
    rounded = torch.tensor(scale, dtype=torch.float32)
    while bound is not None and float(rounded) > bound * (1 - 1e-7):
        rounded = torch.nextafter(rounded, torch.tensor(0.0))
    return float(rounded)


def channel_scales(
    weight_OI: Float[Tensor, "O I"],
    *,
    bits: int = 8,
    bias_O: Float[Tensor, "O"] | None = None,
    input_scale: float | None = None,
) -> Float[Tensor, "O"]:
    """Return the scale of each output channel for symmetric codes.

    A runtime stores the bias in steps of (weight scale * input scale) with 32 bits. Where the
    weights of a channel are so small, or all zero, that its bias would not fit, the scale is
    widened.

    Args:
        weight_OI: Weights, one row for each channel.
        bits: Bits of a code.
        bias_O: Bias that is added to the products.
        input_scale: Scale of the layer's input.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    _check_finite(weight_OI)
    scale_O = weight_OI.abs().amax(1) / (2 ** (bits - 1) - 1)
    if bias_O is not None and input_scale is not None:
        scale_O = scale_O.maximum(bias_O.abs() / (input_scale * _BIAS_CODES))
    return torch.where(scale_O > 0, scale_O.clamp_min(_TINY), 1.0)


def symmetric_codes(
    weight_OI: Float[Tensor, "O I"], scale_O: Float[Tensor, "O"], *, bits: int = 8
) -> Int[Tensor, "O I"]:
    """Round weights to codes of zero 0, as int8. The lowest code is left out: -127..127, -7..7."""
    most = 2 ** (bits - 1) - 1
    return (weight_OI / scale_O[:, None]).round().clamp(-most, most).to(torch.int8)


def group_codes(
    weight_OI: Float[Tensor, "O I"], *, bits: int, group_size: int, symmetric: bool
) -> tuple[Int[Tensor, "O I"], Float[Tensor, "O G"], Int[Tensor, "O G"] | None]:
    """Quantize weights in groups along a row, each with its own scale.

    A symmetric scale is the better, in squared error, of "the largest magnitude is the lowest code"
    (-8, or -128) and "it is the highest" (7, or 127); its sign may thus be negative.

    Args:
        weight_OI: Weights, float.
        bits: 4 or 8.
        group_size: Values that share a scale; divides I.
        symmetric: Signed codes without a zero; else unsigned codes with a zero for each group.

    Returns:
        Codes (int8 or uint8), scales (float32), zeros (uint8) or None.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    _check_finite(weight_OI)
    groups_OGS = weight_OI.float().view(len(weight_OI), -1, group_size)
    if not symmetric:
        low_OG = groups_OGS.amin(2).clamp_max(0)
        high_OG = groups_OGS.amax(2).clamp_min(0)
        scale_OG = (high_OG - low_OG) / (2**bits - 1)
        scale_OG = torch.where(scale_OG > 0, scale_OG.clamp_min(_TINY), 1.0)
        zero_OG = (-low_OG / scale_OG).round().clamp(0, 2**bits - 1)
        codes = (groups_OGS / scale_OG[..., None]).round() + zero_OG[..., None]
        return (
            codes.clamp(0, 2**bits - 1).flatten(1).to(torch.uint8),
            scale_OG,
            zero_OG.to(torch.uint8),
        )
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    at = groups_OGS.abs().argmax(2, keepdim=True)
    extreme_OG = groups_OGS.gather(2, at).squeeze(2)
    best_codes, best_scale, best_error = None, None, None
    for code in (highest, lowest):
        scale_OG = extreme_OG / code
        tiny = scale_OG.abs() < _TINY
        scale_OG = torch.where(tiny, 1.0, scale_OG)
        codes = (groups_OGS / scale_OG[..., None]).round().clamp(lowest, highest)
        error_OG = (codes * scale_OG[..., None] - groups_OGS).square().sum(2)
        if best_codes is None or best_scale is None or best_error is None:
            best_codes, best_scale, best_error = codes, scale_OG, error_OG
            continue
        better = error_OG < best_error
        best_codes = torch.where(better[..., None], codes, best_codes)
        best_scale = torch.where(better, scale_OG, best_scale)
    assert best_codes is not None
    assert best_scale is not None
    return best_codes.flatten(1).to(torch.int8), best_scale, None


def _check_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("its weights hold NaN or infinity")
