"""Layers whose weights are kept in floating point of 8 or 16 bits, and computed in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.ops.modules import QUANTIZED, not_float32, rows

# O output channels, I weights of one

FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""e4m3: 3 bits of mantissa, up to 448. e5m2: 2 bits of mantissa, up to 57344."""
DTYPES = {**FLOAT8, "fp16": torch.float16}
"""fp16: 10 bits of mantissa, up to 65504; without a scale."""
_Convolution = nn.Conv1d | nn.Conv2d
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class _Float8(nn.Module):
    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None
    format: str

    def _make(self, shape: tuple[int, ...], bias: bool, format: str) -> None:
        self.format = format
        self.register_buffer("weight", torch.zeros(shape, dtype=DTYPES[format]))
        self.register_buffer("scale", torch.ones(shape[0]))
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape[0])) if bias else None)

    def values(self) -> Tensor:
        """Return the float32 weights. A cast, not DequantizeLinear, which runtimes fold less."""
        if self.format not in FLOAT8:
            return self.weight.to(torch.float32)
        scale = self.scale.view(-1, *[1] * (self.weight.dim() - 1))
        return self.weight.to(torch.float32) * scale


class Float8Linear(_Float8):
    """Linear with weights in 8-bit floating point, one scale for each output."""

    in_features: int
    out_features: int

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, format: str = "fp8_e4m3"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._make((out_features, in_features), bias, format)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("in_features", "out_features", "format")
        return {**{n: getattr(self, n) for n in names}, "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the float32 weights."""
        return F.linear(x, self.values(), self.bias)


class Float8Conv(_Float8):
    """Conv1d or Conv2d, by the length of `kernel_size`, with weights in 8-bit floating point."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...] | str,
        dilation: tuple[int, ...],
        groups: int = 1,
        bias: bool = True,
        format: str = "fp8_e4m3",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = (
            in_channels,
            out_channels,
            kernel_size,
        )
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self._make((out_channels, in_channels // groups, *kernel_size), bias, format)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        made = {n: getattr(self, n) for n in (*names, "groups", "format")}
        return {**made, "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the float32 weights."""
        apply: Any = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        made: Tensor = apply(
            x, self.values(), self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return made


def why_not_float8(layer: nn.Module) -> str | None:
    """Say why a layer's weights cannot be kept in 8-bit floating point, or None."""
    if isinstance(layer, QUANTIZED):
        return "quantized before"
    if type(layer) not in _KINDS:
        return f"{type(layer).__name__} has no form with 8-bit floating point here"
    assert isinstance(layer.weight, Tensor)
    if reason := not_float32(layer.weight):
        return reason
    if isinstance(layer, _Convolution) and layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode!r}"
    return None


def float8(layer: nn.Module, format: str) -> nn.Module:
    """Return a layer like `layer` with weights in 8-bit floating point; the bias is shared.

    The largest weight of each output channel becomes the largest number of the format, so that the
    small ones fall on its subnormal numbers as late as possible; a channel of zeros keeps scale 1.
    With fp16 all do.

    Args:
        layer: A layer for which `why_not_float8` is None.
        format: A key of `DTYPES`.

    Raises:
        ValueError: weights are NaN or infinite, or larger than fp16 holds.

    Source:
        Micikevicius et al., FP8 formats for deep learning, arXiv:2209.05433: the two formats, and
        scaling into their range. Our scales are those of output channels.
    """
    made: Float8Linear | Float8Conv
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        made = Float8Linear(layer.in_features, layer.out_features, has_bias, format)
    else:
        assert isinstance(layer, _Convolution)
        made = Float8Conv(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            has_bias,
            format,
        )
    weight_OI = rows(layer)
    if not torch.isfinite(weight_OI).all():
        raise ValueError("weights are NaN or infinite")
    most = torch.finfo(DTYPES[format]).max
    scale_O = weight_OI.abs().amax(1) / most
    if format not in FLOAT8:
        if (scale_O > 1).any():
            raise ValueError(f"weights reach {float(weight_OI.abs().max()):.3g}, fp16 {most:g}")
        scale_O = torch.ones_like(scale_O)
    scale_O[scale_O == 0] = 1.0
    codes_OI = (weight_OI / scale_O[:, None]).clamp(-most, most).to(DTYPES[format])
    made.weight, made.scale = codes_OI.view(made.weight.shape), scale_O
    made.register_parameter("bias", layer.bias)  # type: ignore[arg-type]  # the stubs forget None
    return made.train(layer.training)
