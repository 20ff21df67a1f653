"""What results are made of: layers with integer weights, and the rounding of activations.

All are written in `torch.ops.quantized_decomposed`, which the exporters translate: to
QuantizeLinear and DequantizeLinear in ONNX. Each has `arguments()`, from which an equal structure
is made; its tensors then come from the state dict.
"""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import RecipeError, suggest
from tersor.core.layers import Layers
from tersor.ops.quantize import channel_scales, symmetric_codes

_OPS = torch.ops.quantized_decomposed
_Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Codes of weights: (code - zero) * scale, for codes of low..high."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int


class Quantize(nn.Module):
    """Round activations to 8-bit codes and back: what the runtime's integer operators see.

    Calls of one instance at several places share the scale.

    Args:
        scale: Step between two codes, float32.
        zero: The code of 0.
        low: Lowest code: 0 for uint8, -128 for int8.
        high: Highest code.
    """

    scale: float
    zero: int
    low: int
    high: int

    def __init__(self, scale: float, zero: int, low: int = 0, high: int = 255) -> None:
        super().__init__()
        self.scale, self.zero, self.low, self.high = scale, zero, low, high

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"scale": self.scale, "zero": self.zero, "low": self.low, "high": self.high}

    def forward(self, x: Tensor) -> Tensor:
        """Return the values that the codes of `x` stand for."""
        dtype = torch.int8 if self.low < 0 else torch.uint8
        grid = (self.scale, self.zero, self.low, self.high, dtype)
        made: Tensor = _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(x, *grid), *grid)
        return made

    def extra_repr(self) -> str:
        """Describe the grid."""
        return f"scale={self.scale:.4g}, zero={self.zero}, codes={self.low}..{self.high}"


class _Integer(nn.Module, ABC):
    """A layer with int8 weights and one scale for each output channel."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: nn.Parameter | None
    bits: int
    """Of a code: 2 to 8; each is kept in a byte."""
    input_scale: float
    """Of the codes that come in, once the network is settled; 0: not known."""
    _axis: ClassVar[int] = 0
    """Output channels among the dimensions of `weight`."""

    def _make(self, shape: tuple[int, ...], bias: bool, bits: int, input_scale: float) -> None:
        self.bits, self.input_scale, channels = bits, input_scale, shape[self._axis]
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero", torch.zeros(channels, dtype=torch.int64))
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return _arguments(self)

    def values(self) -> Tensor:
        """Return the float weights that the codes stand for."""
        grid = (self.scale, self.zero, self._axis, -127, 127, torch.int8)
        made: Tensor = _OPS.dequantize_per_channel(self.weight, *grid)
        return made

    def grid(self) -> Grid:
        """Return what the codes mean, with one entry for each weight after broadcasting."""
        shape: list[int] = [1] * self.weight.dim()
        shape[self._axis] = -1
        most = 2 ** (self.bits - 1) - 1
        return Grid(self.scale.view(shape), self.zero.view(shape), -most, most)

    @abstractmethod
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with these float weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; on codes of a known scale as runtimes do, with exact sums of products.

        Sums beyond 2**24, which take rows of more than 500 weights that all agree, are rounded.
        Exported, and while biases are trained, the layer computes with float weights; runtimes turn
        those into the same.
        """
        if not self.input_scale or self.training or torch.compiler.is_exporting():
            return self.compute(x, self.values(), self.bias)
        step = self.scale * self.input_scale
        bias = None if self.bias is None else (self.bias / step).round()
        sums = self.compute((x / self.input_scale).round(), self.weight.to(x.dtype), bias)
        inner = sums.dim() - 2 if self.weight.dim() > 2 else 0
        return sums * step.view(-1, *[1] * inner)


class _IntegerConv(_Integer):
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: _Sizes
    padding: _Sizes | str
    dilation: _Sizes
    groups: int
    _dimensions: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Sizes,
        stride: _Sizes = 1,
        padding: _Sizes | str = 0,
        dilation: _Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        bits: int = 8,
        input_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _many(kernel_size, self._dimensions), stride
        self.padding, self.dilation, self.groups = padding, dilation, groups
        self._make(
            (out_channels, in_channels // groups, *self.kernel_size), bias, bits, input_scale
        )

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with these float weights."""
        apply: Any = F.conv1d if self._dimensions == 1 else F.conv2d
        made: Tensor = apply(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return made


class QuantConv1d(_IntegerConv):
    """Conv1d with int8 weights, one scale for each output channel."""

    _dimensions = 1


class QuantConv2d(_IntegerConv):
    """Conv2d with int8 weights, one scale for each output channel."""

    _dimensions = 2


class QuantConvTranspose2d(_Integer):
    """ConvTranspose2d without groups, with int8 weights, one scale for each output channel."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: _Sizes
    padding: _Sizes
    output_padding: _Sizes
    dilation: _Sizes
    _axis = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Sizes,
        stride: _Sizes = 1,
        padding: _Sizes = 0,
        output_padding: _Sizes = 0,
        dilation: _Sizes = 1,
        bias: bool = True,
        bits: int = 8,
        input_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _many(kernel_size, 2), stride
        self.padding, self.output_padding, self.dilation = padding, output_padding, dilation
        self._make((in_channels, out_channels, *self.kernel_size), bias, bits, input_scale)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with these float weights."""
        apply: Any = F.conv_transpose2d
        made: Tensor = apply(
            x, weight, bias, self.stride, self.padding, self.output_padding, 1, self.dilation
        )
        return made


class QuantLinear(_Integer):
    """Linear with int8 weights, one scale for each output."""

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        input_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._make((out_features, in_features), bias, bits, input_scale)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by these float weights."""
        return F.linear(x, weight, bias)


class GroupedLinear(nn.Module):
    """Linear with weights of few bits, one scale for each group along a row.

    Args:
        in_features: Length of a row.
        out_features: Number of rows.
        bits: 2 to 8; codes are kept in a byte each, and packed in files that can hold them so.
        group_size: Values that share a scale; divides `in_features`.
        symmetric: Signed codes without zeros; else unsigned codes with a zero for each group.
        bias: Whether there is one.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    bits: int
    group_size: int
    symmetric: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int = 32,
        symmetric: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        groups = in_features // group_size
        dtype = torch.int8 if symmetric else torch.uint8
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=dtype))
        self.register_buffer("scale", torch.ones(out_features, groups))
        zero = None if symmetric else torch.zeros(out_features, groups, dtype=torch.uint8)
        self.register_buffer("zero", zero)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return _arguments(self)

    def values(self) -> Tensor:
        """Return the float weights that the codes stand for."""
        low, high = self._ends()
        zero = None if self.zero is None else self.zero.to(torch.int32)
        made: Tensor = _OPS.dequantize_per_channel_group(
            self.weight,
            self.scale,
            zero,
            low,
            high,
            self.weight.dtype,
            self.group_size,
            torch.float32,
        )
        return made

    def grid(self) -> Grid:
        """Return what the codes mean, with one entry for each weight."""
        scale = self.scale.repeat_interleave(self.group_size, 1)
        zero = torch.zeros_like(self.scale) if self.zero is None else self.zero
        return Grid(scale, zero.repeat_interleave(self.group_size, 1), *self._ends())

    def _ends(self) -> tuple[int, int]:
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        return low, low + 2**self.bits - 1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by these float weights."""
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the dequantized weights."""
        return self.compute(x, self.values(), self.bias)


class QuantEmbedding(nn.Module):
    """Embedding with int8 rows, one scale for each row; it looks codes up and multiplies.

    Source:
        Row-wise scales as in Guan et al., arXiv:1911.02079; symmetric, where theirs have a zero.
    """

    weight: Tensor
    scale: Tensor
    num_embeddings: int
    embedding_dim: int

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_embeddings, 1))

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}

    def values(self) -> Tensor:
        """Return the float rows that the codes stand for."""
        return self.weight.to(self.scale.dtype) * self.scale

    def grid(self) -> Grid:
        """Return what the codes mean, with one entry for each weight after broadcasting."""
        return Grid(self.scale, torch.zeros_like(self.scale, dtype=torch.int64), -127, 127)

    def forward(self, x: Tensor) -> Tensor:
        """Look rows up, (...) -> (..., D)."""
        codes = F.embedding(x, self.weight).to(self.scale.dtype)
        return codes * F.embedding(x, self.scale)


INTEGER = (QuantConv1d, QuantConv2d, QuantConvTranspose2d, QuantLinear)
QUANTIZED = (*INTEGER, GroupedLinear)


def why_not(layer: nn.Module) -> str | None:
    """Say why a layer cannot get int8 weights, or None."""
    if isinstance(layer, QUANTIZED):
        return "quantized before"
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear):
        return f"{type(layer).__name__} has no integer form here"
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    if reason := not_float32(layer.weight):
        return reason
    if not isinstance(layer, nn.Linear) and layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode!r}"
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups != 1:
        return "a transposed convolution with groups"
    return None


def not_float32(weight: Tensor) -> str | None:
    """Say what weights are instead of float32, or None."""
    if weight.dtype is torch.float32:
        return None
    return f"its weights are {str(weight.dtype).removeprefix('torch.')}"


def check_patterns(layers: Layers, names: list[str]) -> None:
    """Refuse a pattern that matches no layer: it is most likely misspelt."""
    wrong = [p for p in layers.unused(names) if p != "*"]
    if wrong:
        nearest = suggest(wrong[0].lstrip("!"), names)
        raise RecipeError(f"layers: pattern {wrong[0]!r} matches no layer.{nearest}")


def channels_of(layer: nn.Module) -> int:
    """Tell which dimension of a layer's weights its output channels are."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def rows(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Return a layer's weights, or others of their shape, with a row for each output, (O, I)."""
    given = layer.weight if weight is None else weight
    assert isinstance(given, Tensor)
    return given.detach().transpose(0, channels_of(layer)).flatten(1)


def quantized(layer: nn.Module, scale_O: Tensor, bits: int = 8) -> nn.Module:
    """Return a layer like `layer` with integer weights; the bias is shared.

    Args:
        layer: A layer for which `why_not` is None.
        scale_O: Scale of each output channel.
        bits: Of a code, 2 to 8; kept in a byte.
    """
    made: QuantLinear | QuantConv1d | QuantConv2d | QuantConvTranspose2d
    if isinstance(layer, nn.Linear):
        made = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, bits)
    elif isinstance(layer, nn.ConvTranspose2d):
        made = QuantConvTranspose2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,  # type: ignore[arg-type]  # a transposed convolution has no "same"
            layer.output_padding,
            layer.dilation,
            layer.bias is not None,
            bits,
        )
    else:
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
        made = (QuantConv1d if isinstance(layer, nn.Conv1d) else QuantConv2d)(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            bits,
        )
    codes_OI = symmetric_codes(rows(layer), scale_O, bits=bits)
    shape = layer.weight.shape
    if isinstance(layer, nn.ConvTranspose2d):
        codes = codes_OI.view(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()
    else:
        codes = codes_OI.view(shape)
    made.weight, made.scale = codes, scale_O
    made.register_parameter("bias", layer.bias)  # type: ignore[arg-type]  # the stubs forget None
    return made.train(layer.training)


def quantized_embedding(layer: nn.Embedding, *, power_of_two: bool = False) -> QuantEmbedding:
    """Return an embedding like `layer` with int8 rows.

    Args:
        layer: Its weights are float32.
        power_of_two: Scales 2**n, the next one up.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    made = QuantEmbedding(layer.num_embeddings, layer.embedding_dim)
    rows_VD = layer.weight.detach()
    scale_V = channel_scales(rows_VD, power_of_two=power_of_two)
    made.weight, made.scale = symmetric_codes(rows_VD, scale_V), scale_V[:, None]
    return made.eval()


def _arguments(layer: nn.Module) -> dict[str, Any]:
    """Return what the constructor was given; each argument is an attribute of the same name."""
    made = {name: getattr(layer, name) for name in inspect.signature(type(layer)).parameters}
    return {**made, "bias": layer.bias is not None}


def _many(size: _Sizes, count: int) -> tuple[int, ...]:
    return (size,) * count if isinstance(size, int) else tuple(size)
