"""Rewrite an exported program the way that readers of PyTorch's own quantization expect it.

The codes of activations become signed, each reader gets a DequantizeLinear of its own, and layers
that these readers have no integer kernel for get their weights as floats. Every rewrite is exact.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx
from torch.export import ExportedProgram

from tersor.core.model import Inputs

_OPS, _ATEN = torch.ops.quantized_decomposed, torch.ops.aten
_QUANTIZE = _OPS.quantize_per_tensor.default
_DEQUANTIZE = _OPS.dequantize_per_tensor.default
_WEIGHTS = (_OPS.dequantize_per_channel.default, _OPS.dequantize_per_channel_group.default)
_LAYERS = (
    _ATEN.linear.default,
    _ATEN.conv1d.default,
    _ATEN.conv1d.padding,
    _ATEN.conv2d.default,
    _ATEN.conv2d.padding,
    _ATEN.conv_transpose2d.input,
)
_FUSED = (_ATEN.relu.default, _ATEN.hardtanh.default, _ATEN.relu6.default)


def rewritten(program: ExportedProgram, inputs: Inputs) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Return an equal program with signed codes.

    Args:
        program: With shapes that are all fixed. Not modified.
        inputs: How to call it.

    Returns:
        The program, and the names of the layers whose weights are floats now.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _sign(module)
    floats = _fold_weights(module, _is_integer)
    _part(module)
    _keep_dimensions(module)
    module.graph.lint()
    module.recompile()
    example = {name: tensor.contiguous() for name, tensor in inputs.example.items()}
    with torch.no_grad():
        return torch.export.export(module, (), kwargs=example), floats


def _calls(module: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "call_function" and n.target in targets]


def _sign(module: fx.GraphModule) -> None:
    """Move unsigned codes and their zero by 128."""
    for node in _calls(module, _QUANTIZE, _DEQUANTIZE):
        x, scale, zero, low, high, dtype = node.args[:6]
        if dtype is torch.uint8:
            assert isinstance(zero, int)
            assert isinstance(low, int)
            assert isinstance(high, int)
            node.args = (x, scale, zero - 128, low - 128, high - 128, torch.int8)


def _part(module: fx.GraphModule) -> None:
    """Give each reader of codes its own dequantization: partitions cut at codes, not at floats."""
    for node in _calls(module, _DEQUANTIZE):
        for reader in list(node.users)[1:]:
            with module.graph.inserting_before(reader):
                own = module.graph.call_function(node.target, node.args, node.kwargs)  # type: ignore[arg-type]  # the node is a call_function
            reader.replace_input_with(node, own)


def fold_single_channels(module: fx.GraphModule) -> None:
    """Store the weights of convolutions of one input channel as floats.

    Inductor takes the layout of a picture from its strides, which do not tell it for one channel;
    its integer convolution then reads the weights in another order.

    Args:
        module: Of an exported program; modified.
    """
    _fold_weights(module, lambda layer, weight: not _reads_one_channel(layer, weight))
    module.recompile()


def _reads_one_channel(layer: fx.Node, weight: fx.Node) -> bool:
    del weight
    convolves = layer.target in _LAYERS and layer.target is not _ATEN.linear.default
    return convolves and layer.args[0].meta["val"].shape[1] == 1  # type: ignore[union-attr]  # a tensor of the graph


def _fold_weights(
    module: fx.GraphModule, keep: Callable[[fx.Node, fx.Node], bool]
) -> tuple[str, ...]:
    """Store the weights of layers as floats but where `keep` is true for layer and weight."""
    names: list[str] = []
    for node in _calls(module, *_WEIGHTS):
        if all(keep(reader, node) for reader in node.users):
            continue
        codes = node.args[0]
        assert isinstance(codes, fx.Node)
        given = [_constant(module, a) if isinstance(a, fx.Node) else a for a in node.args]
        name = f"folded_{len(names)}"
        assert callable(node.target)
        module.register_buffer(name, node.target(*given, **node.kwargs))
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
        module.graph.erase_node(node)
        names.append(str(codes.target).removesuffix(".weight"))
    return tuple(names)


def _is_integer(layer: fx.Node, weight: fx.Node) -> bool:
    """Tell whether a layer reads codes, and what it writes is rounded at once."""
    if layer.target not in _LAYERS or layer.args[1] is not weight:
        return False
    readers = list(layer.users)
    if len(readers) == 1 and readers[0].target in _FUSED:
        readers = list(readers[0].users)
    comes = layer.args[0]
    assert isinstance(comes, fx.Node)
    return (
        comes.target is _DEQUANTIZE
        and weight.target is _OPS.dequantize_per_channel.default
        and len(readers) == 1
        and readers[0].target is _QUANTIZE
    )


def _constant(module: fx.GraphModule, node: fx.Node) -> Any:
    assert node.op == "get_attr"
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach()


def _keep_dimensions(module: fx.GraphModule) -> None:
    """Write a mean over a picture as one that keeps its dimensions, which runtimes pool."""
    for node in _calls(module, _ATEN.mean.dim):
        x, dims, *rest = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(dims, (list, tuple))
        shape = x.meta["val"].shape
        keeps = bool(rest and rest[0]) or node.kwargs.get("keepdim")
        if len(shape) != 4 or keeps or sorted(int(str(d)) % 4 for d in dims) != [2, 3]:
            continue
        readers = list(node.users)
        with module.graph.inserting_after(node):
            flat = module.graph.call_function(_ATEN.reshape.default, (node, list(shape[:2])))
        for reader in readers:
            reader.replace_input_with(node, flat)
        node.args = (x, [2, 3], True)
