"""Write nn.MultiheadAttention as the linear layers and the attention that it consists of.

As one module it hides its projections, most of its weights, from everything that works on linear
layers.
"""

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from tersor.core.model import Inputs
from tersor.ops.capture import annotate


def split_attention(captured: fx.GraphModule, inputs: Inputs) -> int:
    """Replace calls of nn.MultiheadAttention whose weights are not used by their parts.

    The projections become `NAME.in_projection` (of query, key and value in one where they are the
    same tensor, else `in_projection_q`, `_k`, `_v`) and `NAME.out_proj`; parameters are shared.
    What has another form stays: a layer that is called twice, that adds keys or values of its own,
    has other widths for keys, or takes a mask for each head or one of truth values.

    Args:
        captured: What `ops.capture.capture` returned, in eval mode; changed.
        inputs: How to call it.

    Returns:
        The number of calls replaced.
    """
    modules = dict(captured.named_modules())
    calls = [n for n in captured.graph.nodes if n.op == "call_module"]
    done = 0
    for node in calls:
        name = str(node.target)
        layer = modules[name]
        alone = sum(other.target == node.target for other in calls) == 1
        if isinstance(layer, nn.MultiheadAttention) and alone and _simple(layer, node):
            _split(captured, node, name, layer)
            done += 1
    if done:
        captured.graph.eliminate_dead_code()
        captured.recompile()
        annotate(captured, inputs)
    return done


_PLACES = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")


def _given(node: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_PLACES, node.args, strict=False)), **node.kwargs}


def _simple(layer: nn.MultiheadAttention, node: fx.Node) -> bool:
    given = _given(node)
    masks = [m for k in ("key_padding_mask", "attn_mask") if (m := given.get(k)) is not None]
    return (
        layer.in_proj_weight is not None
        and layer.bias_k is None
        and not layer.add_zero_attn
        and not layer.training
        and all(isinstance(given.get(k), fx.Node) for k in ("query", "key", "value"))
        and all("shape" in m.meta and m.meta["dtype"].is_floating_point for m in masks)
        and len(given["query"].meta["shape"]) == 3
        and all(len(m.meta["shape"]) == 2 for m in masks)
        and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    )


def _split(
    captured: fx.GraphModule, node: fx.Node, name: str, layer: nn.MultiheadAttention
) -> None:
    given, graph = _given(node), captured.graph
    query, key, value = (given[k] for k in ("query", "key", "value"))
    width, heads = layer.embed_dim, layer.num_heads
    holder = nn.Module()
    captured.set_submodule(name, holder)
    holder.out_proj = _linear(layer.out_proj.weight, layer.out_proj.bias)
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    with graph.inserting_before(node):
        if query is key is value:
            holder.in_projection = _linear(weight, bias)
            whole = graph.call_module(f"{name}.in_projection", (query,))
            three = graph.call_method("chunk", (whole, 3, -1))
            parts = [graph.call_function(operator.getitem, (three, i)) for i in range(3)]
        else:
            parts = []
            for i, (word, source) in enumerate((("q", query), ("k", key), ("v", value))):
                rows = slice(i * width, (i + 1) * width)
                own = _linear(weight[rows], None if bias is None else bias[rows])
                holder.add_module(f"in_projection_{word}", own)
                parts.append(graph.call_module(f"{name}.in_projection_{word}", (source,)))
        split = []
        for part in parts:
            each = graph.call_method("unflatten", (part, -1, (heads, width // heads)))
            if not layer.batch_first:
                each = graph.call_method("transpose", (each, 0, 1))
            split.append(graph.call_method("transpose", (each, 1, 2)))
        mask = _mask(graph, given.get("key_padding_mask"), given.get("attn_mask"))
        made = graph.call_function(
            F.scaled_dot_product_attention, tuple(split), {"attn_mask": mask}
        )
        made = graph.call_method("flatten", (graph.call_method("transpose", (made, 1, 2)), -2))
        if not layer.batch_first:
            made = graph.call_method("transpose", (made, 0, 1))
        made = graph.call_module(f"{name}.out_proj", (made,))
    for user in list(node.users):
        user.replace_all_uses_with(made)
        graph.erase_node(user)
    graph.erase_node(node)


def _mask(graph: fx.Graph, padding: fx.Node | None, attention: fx.Node | None) -> fx.Node | None:
    """Return what is added to the products (B, 1, L, S), from (B, S) and (L, S)."""
    if padding is None:
        return attention
    wide = graph.call_method("unsqueeze", (padding, 1))
    wide = graph.call_method("unsqueeze", (wide, 1))
    return wide if attention is None else graph.call_function(operator.add, (wide, attention))


def _linear(weight: Any, bias: Any) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach())
    if bias is not None:
        made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
    return made.eval()
