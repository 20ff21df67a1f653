"""Roundings of quantized networks as arithmetic, for runtimes without operators for them.

What `ops/modules.py` and `ops/placement.py` put into a network as `quantized_decomposed` operators
becomes multiplication, rounding to even and clamping: the same numbers, computed in float. Integer
weights stay integers, and are made floats where they are used.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.export import ExportedProgram

_OPS = torch.ops.quantized_decomposed


def without_quantized(program: ExportedProgram, *, groups_only: bool = False) -> ExportedProgram:
    """Return the program with arithmetic in place of `quantized_decomposed` operators.

    Args:
        program: Not modified.
        groups_only: Replace those on weights in groups only, for runtimes that know the others.
    """
    table: dict[Any, Callable[..., Tensor]] = {
        _OPS.quantize_per_tensor.default: _quantize,
        _OPS.dequantize_per_tensor.default: _dequantize,
        _OPS.dequantize_per_channel.default: _dequantize_channels,
        _OPS.dequantize_per_channel_group.default: _dequantize_groups,
    }
    if groups_only:
        table = {_OPS.dequantize_per_channel_group.default: _dequantize_groups}
    if not {node.target for node in program.graph.nodes} & set(table):
        return program
    with warnings.catch_warnings():
        # of the exporter, about itself
        warnings.simplefilter("ignore")
        made: ExportedProgram = program.run_decompositions(table)
    return made


def _quantize(x: Tensor, scale: float, zero: int, low: int, high: int, dtype: Any) -> Tensor:
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero, low, high).to(dtype)


def _dequantize(
    codes: Tensor,
    scale: float,
    zero: int,
    low: int,
    high: int,
    dtype: Any,
    *,
    out_dtype: Any = None,
) -> Tensor:
    del low, high, dtype
    return (codes.to(out_dtype or torch.float32) - zero) * scale


def _dequantize_channels(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    axis: int,
    low: int,
    high: int,
    dtype: Any,
    *,
    out_dtype: Any = None,
) -> Tensor:
    del low, high, dtype
    shape = [-1 if i == axis else 1 for i in range(codes.dim())]
    made = codes.to(out_dtype or torch.float32)
    if zero is not None:
        made = made - zero.view(shape).to(made.dtype)
    return made * scale.view(shape)


def _dequantize_groups(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    dtype: Any,
    group_size: int,
    output_dtype: Any = torch.float32,
) -> Tensor:
    del low, high, dtype
    made = codes.to(output_dtype).reshape(-1, group_size)
    if zero is not None:
        made = made - zero.reshape(-1, 1).to(output_dtype)
    return (made * scale.reshape(-1, 1)).reshape(codes.shape)
