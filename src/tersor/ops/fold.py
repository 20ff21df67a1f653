"""Fold a batch norm into the layer before it.

In eval mode a batch norm is an affine map per channel, y = (x - mean) / sqrt(var + eps) * weight +
bias; the convolution or linear layer that feeds it, and nothing else, can do that map with its own
weights.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.core.model import Inputs
from tersor.ops.capture import annotate

# O output channels; the weight of a transposed convolution has them in dimension 1, a group at a
# time.


def fold_batch_norms(captured: fx.GraphModule, inputs: Inputs) -> int:
    """Fold every batch norm that can be, and take out what does nothing in eval mode.

    Args:
        captured: What `ops.capture.capture` returned; changed.
        inputs: How to call it.

    Returns:
        The number of batch norms folded.
    """
    pairs = find_batch_norms(captured)
    for layer, bn in pairs:
        fold_batch_norm(captured.get_submodule(layer), captured.get_submodule(bn))
        captured.set_submodule(bn, nn.Identity())
    drop_identities(captured)
    captured.delete_all_unused_submodules()
    annotate(captured, inputs)
    return len(pairs)


def drop_identities(captured: fx.GraphModule) -> None:
    """Take out calls that do nothing in eval mode: Identity and dropout."""
    modules = dict(captured.named_modules())
    for node in list(captured.graph.nodes):
        named = node.op == "call_module" and isinstance(
            modules[node.target],
            (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        )
        if (named or node.target in (F.dropout, F.dropout2d)) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            captured.graph.erase_node(node)
    captured.recompile()


def find_batch_norms(captured: fx.GraphModule) -> list[tuple[str, str]]:
    """List the batch norms that can be folded, in the order of the graph.

    A pair is listed when a convolution, transposed convolution or linear layer is used once, its
    output goes to one batch norm and nowhere else, and that batch norm is used once and keeps
    running statistics.

    Args:
        captured: What `ops.capture.capture` returned.

    Returns:
        (name of the layer, name of its batch norm).
    """
    modules = dict(captured.named_modules(remove_duplicate=False))
    uses = Counter(
        id(tensor) for node in captured.graph.nodes for tensor in _tensors(captured, modules, node)
    )
    pairs = []
    for node in captured.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], _BatchNorm):
            continue
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer, bn = modules[str(source.target)], modules[node.target]
        alone = all(
            uses[id(t)] == 1 for t in (*layer.parameters(), *bn.parameters(), *bn.buffers())
        )
        if alone and _fits(layer, bn, source):
            pairs.append((str(source.target), str(node.target)))
    return pairs


def _tensors(
    captured: fx.GraphModule, modules: dict[str, nn.Module], node: fx.Node
) -> list[Tensor]:
    """List the parameters and buffers that a node reads; what two nodes read must not be folded."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return [*module.parameters(), *module.buffers()]
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        found = getattr(captured.get_submodule(owner), name)
        return [found] if isinstance(found, Tensor) else []
    return []


def _fits(layer: nn.Module, bn: nn.Module, source: fx.Node) -> bool:
    if bn.running_mean is None or bn.running_var is None:
        return False
    if type(layer) is nn.Linear:
        # Batch norm works on dimension 1; that is the linear layer's output only for (N, C).
        shape = source.meta.get("shape")
        return shape is not None and len(shape) == 2
    return type(layer) in _CONVOLUTIONS


_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def fold_batch_norm(layer: nn.Module, bn: nn.Module) -> None:
    """Fold `bn` into `layer`, which gets a bias if it has none.

    The arithmetic is done in float64 and rounded once. `bn` is not changed: the caller takes it
    out.

    Args:
        layer: Convolution, transposed convolution or linear layer; changed in place.
        bn: The batch norm that follows it, with running statistics.
    """
    assert isinstance(layer, (_ConvNd, nn.Linear))
    scale_O, shift_O = batch_norm_affine(bn)
    with torch.no_grad():
        weight = layer.weight.double()
        if isinstance(layer, _ConvTransposeNd):
            groups = layer.groups
            per_group = weight.reshape(groups, -1, *weight.shape[1:])
            scale = scale_O.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
            folded = (per_group * scale).reshape(weight.shape)
        else:
            folded = weight * scale_O.reshape(-1, *[1] * (weight.dim() - 1))
        bias_O = shift_O if layer.bias is None else shift_O + layer.bias.double() * scale_O
        layer.weight.copy_(folded)
        if layer.bias is None:
            layer.bias = nn.Parameter(
                bias_O.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad
            )
        else:
            layer.bias.copy_(bias_O)


def batch_norm_affine(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift (float64, one per channel) that a batch norm applies in eval mode."""
    assert isinstance(bn, _BatchNorm)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    with torch.no_grad():
        scale = (bn.running_var.double() + bn.eps).rsqrt()
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        shift = -bn.running_mean.double() * scale
        if bn.bias is not None:
            shift = shift + bn.bias.double()
    return scale, shift
