"""A program in the form that LiteRT's converter turns into integer operators."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx
from torch.export import ExportedProgram

import tersor.ops.dynamic  # noqa: F401  # registers torch.ops.tersor.dynamic_linear
from tersor.core.errors import TargetError

_OPS = torch.ops.quantized_decomposed
_ATEN = torch.ops.aten
_TO_SIGNED = 128
"""uint8 codes 0..255 are int8 codes -128..127 with another zero: the same values."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Weights as they are to be kept in the file, where the converter made floats of them."""

    values: np.ndarray
    """float32, as the converter saw them."""
    codes: np.ndarray
    """int8 or float16, of the same shape."""
    scale: np.ndarray | None
    """Of each output channel; None: float16."""
    axis: int = 0
    """Output channels among the dimensions."""
    in_integers: bool
    """Whether the layer's input may be rounded while it runs, to multiply in integers."""


def prepared(program: ExportedProgram) -> tuple[fx.GraphModule, list[Kept]]:
    """Return the program as a module for the converter, and weights to put back afterwards.

    The converter knows codes only as roundings: weights become floats that are rounded and taken
    back, and uint8 activations become int8, the only codes that TFLite's integer kernels have.

    Raises:
        TargetError: an operator of tersor's that LiteRT has no form of.
    """
    module: Any = program.module(check_guards=False)
    kept: list[Kept] = []
    rewrites: dict[Any, Callable[[fx.GraphModule, fx.Node], Kept | None]] = {
        _OPS.dequantize_per_channel.default: _rounded_weights,
        _OPS.quantize_per_tensor.default: _signed,
        _OPS.dequantize_per_tensor.default: _signed_for_each,
        torch.ops.tersor.dynamic_linear.default: _dynamic,
        _ATEN.to.dtype: _half_weights,
        _ATEN._to_copy.default: _half_weights,
    }
    for node in list(module.graph.nodes):
        if node.target in rewrites:
            made = rewrites[node.target](module, node)
            if made is not None:
                kept.append(made)
        elif node.op == "call_function" and _is_foreign(str(node.target)):
            raise TargetError(
                f"LiteRT has no form of the operator {str(node.target)!r}; leave out the step that "
                "makes it, or choose another target"
            )
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, kept


def _is_foreign(target: str) -> bool:
    return target.startswith(("tersor.", "quantized_decomposed.dequantize_per_channel_group"))


def _signed(module: fx.GraphModule, node: fx.Node) -> None:
    """Move codes 0..255 to -128..127."""
    del module
    x, scale, zero, low, high, dtype = node.args
    if dtype is torch.uint8:
        assert isinstance(zero, int)
        assert isinstance(low, int)
        assert isinstance(high, int)
        shifted = (zero - _TO_SIGNED, low - _TO_SIGNED, high - _TO_SIGNED)
        node.args = (x, scale, *shifted, torch.int8)


def _signed_for_each(module: fx.GraphModule, node: fx.Node) -> None:
    """Take codes back once for each reader, as PyTorch's own quantizer does.

    The converter's pass that moves channels to the end fails where several read the same values.
    """
    _signed(module, node)
    for reader in list(node.users)[1:]:
        with module.graph.inserting_before(node):
            reader.replace_input_with(node, module.graph.node_copy(node))


def _rounded_weights(module: fx.GraphModule, node: fx.Node) -> Kept:
    """Let int8 weights be the rounding of their float values."""
    codes, scale, zero = (_tensor(module, arg) for arg in node.args[:3])
    values: Tensor = _OPS.dequantize_per_channel.default(codes, scale, zero, *node.args[3:])
    rounded = module.graph.call_function
    with module.graph.inserting_before(node):
        floats = _attribute(module, f"floats_{node.name}", values)
        grid = node.args[1:]
        node.update_arg(0, rounded(_OPS.quantize_per_channel.default, (floats, *grid)))
    axis = node.args[3]
    assert isinstance(axis, int)
    users = list(node.users)
    return Kept(
        values=values.numpy(),
        codes=codes.numpy(),
        scale=scale.numpy(),
        axis=axis,
        in_integers=bool(users) and all(map(_reads_codes, users)),
    )


def _reads_codes(user: fx.Node) -> bool:
    """Tell whether a linear layer's input is rounded already."""
    source = user.args[0]
    return (
        user.target is _ATEN.linear.default
        and isinstance(source, fx.Node)
        and source.target is _OPS.dequantize_per_tensor.default
    )


def _dynamic(module: fx.GraphModule, node: fx.Node) -> Kept:
    """Make an ordinary linear layer; its weights become integers again in the file."""
    x, codes_node, scale_node, bias = node.args
    codes, scale = _tensor(module, codes_node), _tensor(module, scale_node)
    values = codes.to(torch.float32) * scale[:, None]
    with module.graph.inserting_before(node):
        weight = _attribute(module, f"floats_{node.name}", values)
    node.target = _ATEN.linear.default
    node.args = (x, weight, bias)
    return Kept(values=values.numpy(), codes=codes.numpy(), scale=scale.numpy(), in_integers=True)


def _half_weights(module: fx.GraphModule, node: fx.Node) -> Kept | None:
    """Note weights that are stored as float16 and computed with in float32."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    codes = _tensor(module, source)
    if codes.dtype is not torch.float16:
        return None
    values = codes.to(torch.float32)
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(_attribute(module, f"floats_{node.name}", values))
    return Kept(values=values.numpy(), codes=codes.numpy(), scale=None, in_integers=False)


def _tensor(module: fx.GraphModule, node: Any) -> Tensor:
    found = attrgetter(node.target)(module)
    assert isinstance(found, Tensor)
    return found.detach()


def _attribute(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    module.register_buffer(name, value)
    return module.graph.get_attr(name)
