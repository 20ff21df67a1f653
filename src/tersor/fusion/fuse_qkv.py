"""Fuse QKV: the projections of one input that one attention reads become one linear layer."""

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.calls import foldable, free_name, kind_of, readers, reads_shape
from tersor.ops.capture import annotate, capture, drop_dead
from tersor.ops.modules import check_patterns
from tersor.ops.outputs import check_same, outputs_of

_TOLD = 3
"""Reasons in an error."""


@dataclass(frozen=True, kw_only=True)
class FuseQkv:
    """Settings of merging projections."""

    layers: Layers = Layers()
    """Linear layers that may be merged."""


@technique(renames=True)
def fuse_qkv(net: nn.Module, config: FuseQkv, context: Context) -> nn.Module:
    """Put the matrices of queries, keys and values on top of one another.

    One product over a wide matrix takes the place of three over narrow ones, and the outputs are
    split. Keys and values of grouped queries may be narrower; where queries come from elsewhere
    (cross-attention), keys and values become one. Outputs stay the same. Layers that are called
    twice or share weights stay.

    Raises:
        UnfitError: no attention reads two projections of one input; says what there is.
    """
    captured = capture(net.eval(), context.inputs)
    wanted = outputs_of(captured, context.inputs)
    split_attention(captured, context.inputs)
    groups, reasons = _groups(captured, config.layers)
    if not groups:
        why = "; ".join(reasons[:_TOLD]) or "the network has no attention with linear projections"
        raise UnfitError(f"fuse_qkv: no projections to merge ({why})")
    made = {}
    for group in groups:
        name = _merge(captured, group)
        made[name] = [str(call.target) for call in group]
    drop_dead(captured)
    captured.recompile()
    captured.delete_all_unused_submodules()
    annotate(captured, context.inputs)
    check_same(wanted, captured, context.inputs)
    context.record(merged=made, left=reasons)
    return captured


def _groups(captured: fx.GraphModule, layers: Layers) -> tuple[list[list[fx.Node]], list[str]]:
    """List calls of linear layers that share input and attention, and why others do not."""
    modules = dict(captured.named_modules())
    counted = readers(captured)
    cores: dict[fx.Node, list[fx.Node]] = {}
    for node in captured.graph.nodes:
        if kind_of(node, modules) == "linear" and node.op == "call_module":
            for core in _attentions(node, modules):
                cores.setdefault(core, []).append(node)
    check_patterns(layers, [str(n.target) for calls in cores.values() for n in calls])
    groups, reasons = [], []
    taken: set[fx.Node] = set()
    for core, calls in cores.items():
        able = [
            n
            for n in calls
            if n not in taken and foldable(n, modules, counted) and layers.holds(str(n.target))
        ]
        shared = Counter(n.args[0] for n in able)
        for source, count in shared.items():
            if count > 1:
                groups.append([n for n in able if n.args[0] is source])
                taken.update(groups[-1])
        if not any(n in taken for n in calls):
            reasons.append(f"{core.name}: {_why(calls, able)}")
    return groups, reasons


def _why(calls: Sequence[fx.Node], able: Sequence[fx.Node]) -> str:
    if len(calls) == 1:
        return f"{calls[0].target} is one layer already"
    if len(able) < len(calls):
        names = ", ".join(str(n.target) for n in calls if n not in able)
        return f"{names} excluded, called twice, or no plain linear layer"
    return "its projections read different inputs"


def _attentions(call: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """List the attention that a projection reaches before another layer with weights."""
    found, seen, todo = [], set(), list(call.users)
    while todo:
        node = todo.pop()
        if node in seen or reads_shape(node):
            continue
        seen.add(node)
        kind = kind_of(node, modules)
        if kind == "sdpa" or (kind == "matmul" and _of_softmax(node, modules)):
            found.append(node)
        elif node.op != "call_module" or not list(modules[str(node.target)].parameters()):
            todo += node.users
    return found


def _of_softmax(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    source = node.args[0]
    while kind_of(source, modules) in ("dropout", "same"):
        source = source.args[0]  # type: ignore[union-attr]  # a call of that kind is a node
    return kind_of(source, modules) == "softmax"


def _merge(captured: fx.GraphModule, group: Sequence[fx.Node]) -> str:
    """Put one layer and a split in the place of several; return the layer's name."""
    layers = [_linear(captured, call) for call in group]
    sizes = [layer.out_features for layer in layers]
    weight_OI = torch.cat([layer.weight.detach() for layer in layers])
    made = nn.Linear(weight_OI.shape[1], sum(sizes), any(x.bias is not None for x in layers))
    made.weight = nn.Parameter(weight_OI)
    if made.bias is not None:
        zeros = [weight_OI.new_zeros(size) for size in sizes]
        biases = [
            z if x.bias is None else x.bias.detach() for x, z in zip(layers, zeros, strict=True)
        ]
        made.bias = nn.Parameter(torch.cat(biases))
    owner = str(group[0].target).rpartition(".")[0]
    word = "qkv" if len(group) == 3 else "kv" if len(group) == 2 else "projections"
    name = free_name(captured, f"{owner}.{word}" if owner else word)
    captured.add_submodule(name, made.eval())
    graph = captured.graph
    with graph.inserting_before(group[0]):
        whole = graph.call_module(name, (group[0].args[0],))
        parts = graph.call_method("split", (whole, sizes, -1))
        for i, call in enumerate(group):
            part = graph.call_function(operator.getitem, (parts, i))
            call.replace_all_uses_with(part)
    return name


def _linear(captured: fx.GraphModule, call: fx.Node) -> nn.Linear:
    """Return the linear layer of a call."""
    layer = captured.get_submodule(str(call.target))
    assert isinstance(layer, nn.Linear)
    return layer
