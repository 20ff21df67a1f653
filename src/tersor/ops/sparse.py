"""Layers whose weights are executed sparse: zeros are neither stored nor multiplied.

Weights are compressed rows: the values that are left of each output, and which input each belongs
to. Two operators of torch compute with them: in our own kernel (`sparse.c`) where one can be
compiled, else in torch's sparse product. Both are exact up to the order of sums, except that a zero
weight stops a NaN or an infinity, which a multiplication by zero would pass on as NaN.
"""

import ctypes
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from tersor.core.errors import ModelError
from tersor.ops import native

# B samples, I inputs of a row, O outputs, N weights that are left.

MOST_INPUTS = 2**16
"""Positions are kept in 16 bits: half of the memory that 32 would read."""
_MOST_NUMBERS = 2**31 - 1

torch.library.define(
    "tersor::sparse_linear",
    "(Tensor x, Tensor values, Tensor columns, Tensor ends, Tensor? bias) -> Tensor",
)
torch.library.define(
    "tersor::sparse_conv2d",
    "(Tensor x, Tensor values, Tensor columns, Tensor ends, Tensor? bias, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
)


def sparse_linear(
    x: Tensor, values: Tensor, columns: Tensor, ends: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply rows of `x` (..., I) by sparse weights (O, I).

    Args:
        x: Any float type; computed in float32.
        values: float32 (N), the weights that are left, row by row.
        columns: uint16 (N), the input of each.
        ends: int32 (O + 1), where each row begins and ends.
        bias: float32 (O), or None.

    Raises:
        ModelError: the positions do not fit the values or the input.
    """
    inputs, outputs = x.shape[-1], ends.numel() - 1
    weights = _checked(values, columns, ends, bias, inputs)
    library = _library(x)
    if library is None:
        rows = x.reshape(-1, inputs).float()
        made = (_csr(values, columns, ends, inputs) @ rows.T).T
        made = made if bias is None else made + bias
        return made.reshape(*x.shape[:-1], outputs).to(x.dtype).contiguous()
    given = x.float().contiguous()
    made = given.new_empty((*x.shape[:-1], outputs))
    if made.numel():
        failed = library.tersor_sparse_linear(
            given.data_ptr(),
            given.numel() // inputs,
            inputs,
            outputs,
            *weights,
            made.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the sums of a sparse layer")
    return made if x.dtype is made.dtype else made.to(x.dtype)


def _fake_linear(
    x: Tensor, values: Tensor, columns: Tensor, ends: Tensor, bias: Tensor | None
) -> Tensor:
    del values, columns, bias
    return x.new_empty((*x.shape[:-1], ends.shape[0] - 1))


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve images `x` (B, C, H, W) with sparse weights (O, C * kernel rows * kernel columns).

    Raises:
        ModelError: the positions do not fit the values or the input.
    """
    samples, channels = x.shape[:2]
    inputs, outputs = channels * kernel[0] * kernel[1], ends.numel() - 1
    weights = _checked(values, columns, ends, bias, inputs)
    sizes = [
        (x.shape[2 + i], _out(x.shape[2 + i], k, s, p, d), k, s, p, d)
        for i, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True))
    ]
    if min(number for size in sizes for number in (size[1], *size[2:4], size[5])) < 1:
        raise ModelError(f"a kernel of {tuple(kernel)} does not fit images of {tuple(x.shape[2:])}")
    library = _library(x)
    padded = [size[0] + size[3] + 2 * size[4] for size in sizes]
    if library is None or channels * math.prod(padded) > _MOST_NUMBERS:
        weight = _csr(values, columns, ends, inputs).to_dense().view(-1, channels, *kernel)
        made = F.conv2d(x.float(), weight, bias, list(stride), list(padding), list(dilation))
        return made.to(x.dtype).contiguous()
    given = x.float().contiguous()
    made = given.new_empty((samples, outputs, sizes[0][1], sizes[1][1]))
    if made.numel():
        height, width = ((ctypes.c_long * 6)(*size) for size in sizes)
        failed = library.tersor_sparse_conv2d(
            given.data_ptr(),
            samples,
            channels,
            outputs,
            height,
            width,
            *weights,
            made.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the padded image of a sparse layer")
    return made if x.dtype is made.dtype else made.to(x.dtype)


def _fake_conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    del values, columns, bias
    made = [_out(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in range(2)]
    return x.new_empty((x.shape[0], ends.shape[0] - 1, *made))


def _out(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _library(x: Tensor) -> ctypes.CDLL | None:
    """Return our kernels where they can compute with `x`."""
    return native.build().library if x.device.type == "cpu" else None


def _checked(
    values: Tensor, columns: Tensor, ends: Tensor, bias: Tensor | None, inputs: int
) -> tuple[int | None, ...]:
    """Return where the weights lie, and refuse positions that a kernel would follow out of memory.

    They are read from files. What was found is noted on a tensor, so that it costs a look a call.
    """
    at = (
        ends.data_ptr(),
        columns.data_ptr(),
        values.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )
    noted = (inputs, at)
    if getattr(columns, "_tersor_checked", None) == noted:
        return at
    outputs = ends.numel() - 1
    kinds = (values.dtype, columns.dtype, ends.dtype)
    fits = (
        kinds == (torch.float32, torch.uint16, torch.int32)
        and all(t.dim() == 1 and t.is_contiguous() for t in (values, columns, ends))
        and (bias is None or (bias.shape == (outputs,) and bias.dtype is torch.float32))
        and (bias is None or bias.is_contiguous())
        and values.numel() == columns.numel()
        and outputs >= 0
    )
    if fits:
        ordered = bool((ends[1:] >= ends[:-1]).all())
        fits = ordered and int(ends[0]) == 0 and int(ends[-1]) == values.numel()
    if not fits or (columns.numel() and int(columns.int().max()) >= inputs):
        raise ModelError(
            f"the weights of a sparse layer do not fit {inputs} inputs or each other; "
            "the file is damaged, or the input has another width than the layer"
        )
    columns._tersor_checked = noted  # type: ignore[attr-defined]  # a note of ours
    return at


def _csr(values: Tensor, columns: Tensor, ends: Tensor, inputs: int) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch calls its own class a beta
        made: Tensor = torch.sparse_csr_tensor(
            ends, columns.int(), values, (ends.numel() - 1, inputs), check_invariants=False
        )
    return made


def _note_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, values, columns, ends, bias = inputs
    ctx.save_for_backward(x, values, columns, ends)
    ctx.has_bias = bias is not None


def _linear_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Train with dense products: only the weights that are left get a gradient."""
    x, values, columns, ends = ctx.saved_tensors
    weight_OI = _csr(values, columns, ends, x.shape[-1]).to_dense()
    made, rows = gradient.flatten(0, -2).float(), x.flatten(0, -2).float()
    own = _left(made.T @ rows, columns, ends)
    back = (made @ weight_OI).view(x.shape).to(x.dtype)
    return back, own, None, None, made.sum(0) if ctx.has_bias else None


def _note_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _note_linear(ctx, inputs[:5], output)
    ctx.settings = tuple(list(setting) for setting in inputs[5:])


def _conv2d_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, ends = ctx.saved_tensors
    kernel, stride, padding, dilation = ctx.settings
    inputs = x.shape[1] * math.prod(kernel)
    weight = _csr(values, columns, ends, inputs).to_dense().view(-1, x.shape[1], *kernel)
    made, images = gradient.float(), x.float()
    gradients: Any = torch.nn.grad
    given = gradients.conv2d_input(images.shape, weight, made, stride, padding, dilation)
    whole = gradients.conv2d_weight(images, weight.shape, made, stride, padding, dilation)
    own = _left(whole.flatten(1), columns, ends)
    bias = made.sum((0, 2, 3)) if ctx.has_bias else None
    return given.to(x.dtype), own, None, None, bias, None, None, None, None


def _left(whole_OI: Tensor, columns: Tensor, ends: Tensor) -> Tensor:
    """Pick the entries where weights are left."""
    rows = torch.arange(ends.numel() - 1).repeat_interleave(ends.diff())
    return whole_OI[rows.to(whole_OI.device), columns.long()]


torch.library.impl("tersor::sparse_linear", "default", sparse_linear)
torch.library.impl("tersor::sparse_conv2d", "default", sparse_conv2d)
torch.library.register_fake("tersor::sparse_linear", _fake_linear)
torch.library.register_fake("tersor::sparse_conv2d", _fake_conv2d)
torch.library.register_autograd(
    "tersor::sparse_linear", _linear_gradients, setup_context=_note_linear
)
torch.library.register_autograd(
    "tersor::sparse_conv2d", _conv2d_gradients, setup_context=_note_conv2d
)


@register_flop_formula(torch.ops.tersor.sparse_linear)
def _(x: torch.Size, values: torch.Size, *rest: Any, **more: Any) -> int:
    del rest, more
    return 2 * math.prod(x[:-1]) * values[0]


@register_flop_formula(torch.ops.tersor.sparse_conv2d)
def _(x: torch.Size, values: torch.Size, *rest: Any, out_shape: torch.Size, **more: Any) -> int:
    del rest, more
    return 2 * x[0] * math.prod(out_shape[2:]) * values[0]


class _Sparse(nn.Module, ABC):
    """A layer with compressed rows of weights."""

    values: nn.Parameter
    columns: Tensor
    ends: Tensor
    bias: nn.Parameter | None
    count: int
    """Weights that are left."""

    def _make(self, outputs: int, bias: bool, count: int) -> None:
        self.count = count
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("columns", torch.zeros(count, dtype=torch.uint16))
        self.register_buffer("ends", torch.zeros(outputs + 1, dtype=torch.int32))
        made = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_parameter("bias", made)

    def dense(self) -> Tensor:
        """Return the weights with their zeros, (O, I)."""
        return _csr(self.values, self.columns, self.ends, self.inputs).to_dense()

    @property
    @abstractmethod
    def inputs(self) -> int:
        """Inputs of a row."""

    def extra_repr(self) -> str:
        """Describe the layer."""
        settings = {**self.arguments(), "count": self.count}
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""


class SparseLinear(_Sparse):
    """Linear that computes with the weights that are not zero."""

    in_features: int
    out_features: int

    def __init__(self, in_features: int, out_features: int, count: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._make(out_features, bias, count)

    @property
    def inputs(self) -> int:
        """Inputs of a row."""
        return self.in_features

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "count": self.count,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weights that are left."""
        made: Tensor = torch.ops.tersor.sparse_linear.default(
            x, self.values, self.columns, self.ends, self.bias
        )
        return made


class SparseConv2d(_Sparse):
    """Conv2d without groups that computes with the weights that are not zero."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        count: int,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation = tuple(padding), tuple(dilation)
        self._make(out_channels, bias, count)

    @property
    def inputs(self) -> int:
        """Inputs of a row: channels times the positions of the kernel."""
        return self.in_channels * math.prod(self.kernel_size)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "count": self.count,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the weights that are left."""
        made: Tensor = torch.ops.tersor.sparse_conv2d.default(
            x,
            self.values,
            self.columns,
            self.ends,
            self.bias,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        return made


SPARSE = (SparseLinear, SparseConv2d)


def why_dense(layer: nn.Module) -> str | None:
    """Say why a layer cannot be executed sparse, or None."""
    if isinstance(layer, SPARSE):
        return "sparse before"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"{type(layer).__name__} has no sparse form here"
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    if layer.weight.dtype is not torch.float32:
        return f"its weights are {str(layer.weight.dtype).removeprefix('torch.')}"
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            return f"a convolution with {layer.groups} groups"
        if layer.padding_mode != "zeros":
            return f"padding mode {layer.padding_mode!r}"
        if layer.padding == "same" and any(s != 1 for s in layer.stride):
            return "padding 'same' with a stride"
        if layer.padding == "same" and any(
            d * (k - 1) % 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ):
            return "padding 'same' of an even kernel, which is not the same on both sides"
    if layer.weight[0].numel() > MOST_INPUTS:
        return f"{layer.weight[0].numel()} inputs, more than {MOST_INPUTS}"
    return None


def sparse(layer: nn.Module) -> SparseLinear | SparseConv2d:
    """Return a layer like `layer` that computes with its weights that are not zero.

    Args:
        layer: One for which `why_dense` is None. Not changed; nothing is shared with it.
    """
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    weight_OI = layer.weight.detach().flatten(1)
    left_OI = weight_OI != 0  # NaN is not 0
    count = int(left_OI.sum())
    made: SparseLinear | SparseConv2d
    if isinstance(layer, nn.Linear):
        made = SparseLinear(layer.in_features, layer.out_features, count, layer.bias is not None)
    else:
        made = SparseConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            count,
            layer.stride,
            padding_of(layer),
            layer.dilation,
            layer.bias is not None,
        )
    made.values = nn.Parameter(weight_OI[left_OI].clone())
    made.columns = left_OI.nonzero()[:, 1].to(torch.uint16)
    ends = torch.zeros(weight_OI.shape[0] + 1, dtype=torch.int32)
    ends[1:] = left_OI.sum(1).cumsum(0)
    made.ends = ends
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone())
    return made.eval()


def padding_of(layer: nn.Conv2d) -> tuple[int, ...]:
    """Return the zeros on each side of the rows and of the columns."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        return tuple(
            d * (k - 1) // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        )
    assert isinstance(layer.padding, tuple)
    return layer.padding
