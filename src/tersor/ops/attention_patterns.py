"""Find attention in a captured graph, and write it as one call.

Two steps: softmax(Q K^T) V written out becomes torch's scaled dot product attention; and that, with
the splitting of heads before it and their joining after it, becomes `ops.multi_head.MultiHead`.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.ops.calls import (
    axes_of,
    foldable,
    given,
    kind_of,
    number,
    only_user,
    readers,
    swaps_last_two,
    unwrapped,
    with_number,
)
from tersor.ops.multi_head import MultiHead, ProjectedHeads

# B samples, L queries, S keys, N heads, H channels of a head


@dataclass(frozen=True, kw_only=True)
class Written:
    """Attention written out: output = softmax(scale * query key^T + mask) value."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: tuple[str, fx.Node, Any] | None
    """("add", node, None); ("fill", node that is true where the value goes, value); ("keep", node
    that is false there, value)."""
    output: fx.Node


def find_written(captured: fx.GraphModule) -> tuple[list[Written], list[str]]:
    """List attention that is written out.

    A value inside that is read elsewhere, such as the probabilities that a network also returns,
    rules a place out.

    Args:
        captured: What `ops.capture.capture` returned.

    Returns:
        What can be written as one call, in the order of the graph; and, for every other softmax,
        its name and why not.
    """
    modules = dict(captured.named_modules())
    found, why = [], []
    for node in captured.graph.nodes:
        if kind_of(node, modules) == "softmax":
            made = _written(node, modules)
            if isinstance(made, Written):
                found.append(made)
            else:
                why.append(f"{node.name}: {made}")
    return found, why


def _written(softmax: fx.Node, modules: Mapping[str, nn.Module]) -> Written | str:
    """Read the calls around a softmax; a sentence says why they are no attention."""
    if not _over_last(softmax, modules) or not isinstance(softmax.args[0], fx.Node):
        return "a softmax over another dimension than the last"
    inside = [softmax]
    output = only_user(softmax)
    while output is not None and kind_of(output, modules) in ("dropout", "same"):
        inside.append(output)
        output = only_user(output)
    if output is None:
        return "its probabilities are read more than once"
    if kind_of(output, modules) != "matmul" or output.args[0] is not inside[-1]:
        return "no product with values follows it"
    scale, mask, scores = 1.0, None, softmax.args[0]
    while True:
        kind = kind_of(scores, modules)
        if kind == "matmul":
            break
        if kind in ("add", "masked_fill", "where") and mask is None:
            # a factor on the sum would be one on the mask, too
            mask, inner = _mask(scores, kind) if scale == 1 else (None, None)
        else:
            factor, inner = _factor(scores, modules)
            scale *= 1.0 if factor is None else factor
        if inner is None:
            return "what comes before it is not a product of queries and keys"
        inside.append(scores)
        scores = inner
    inside.append(scores)
    query, swapped = scores.args[:2]
    key = swaps_last_two(swapped, modules)
    if key is None:
        factor, inner = _factor(swapped, modules) if isinstance(swapped, fx.Node) else (None, None)
        key = swaps_last_two(inner, modules)
        if key is None or factor is None:
            return "its second factor is not a transposed tensor of keys"
        scale *= factor
    if isinstance(query, fx.Node):
        factor, inner = _factor(query, modules)
        if factor is not None and inner is not None:
            scale, query = scale * factor, inner
    value = output.args[1]
    if not (isinstance(query, fx.Node) and isinstance(value, fx.Node)):
        return "its factors are not tensors of the graph"
    if any(len(n.users) != 1 for n in inside):
        return "a value between its products is read elsewhere"
    ranks = {len(n.meta.get("shape") or ()) for n in (query, key, value)}
    if ranks not in ({3}, {4}):
        return "queries, keys and values do not have three or four dimensions"
    if len({_shape(n)[:-2] for n in (query, key, value)}) != 1:
        return "queries, keys and values do not have the same heads"
    if mask is not None and mask[0] == "add" and mask[1].meta["dtype"] != query.meta["dtype"]:
        return "its mask has another number format than its queries"
    return Written(query=query, key=key, value=value, scale=scale, mask=mask, output=output)


def _over_last(softmax: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if softmax.op == "call_module":
        dim: Any = modules[str(softmax.target)].dim
    else:
        dim = given(softmax, "input", "dim")[1]
    rank = len(softmax.meta.get("shape") or ())
    return isinstance(dim, int) and rank > 0 and dim % rank == rank - 1


def _factor(node: Any, modules: Mapping[str, nn.Module]) -> tuple[float | None, fx.Node | None]:
    """Read a multiplication or division by a number: (factor, what is scaled)."""
    kind = kind_of(node, modules)
    if kind not in ("mul", "div"):
        return None, None
    inner, value = with_number(node)
    if value is None and len(node.args) == 2 and isinstance(node.args[0], fx.Node):
        # computed from the shape: only a root of the head's width does not change with the batch
        inner, value = node.args[0], number(node.args[1])
        roots = [math.sqrt(width) for width in _widths(inner, modules)]
        if value is None or not any(math.isclose(value, r**p) for r in roots for p in (1, -1)):
            return None, None
    if value is None or (kind == "div" and (value == 0 or inner is not node.args[0])):
        return None, None
    return (value if kind == "mul" else 1 / value), inner


def _widths(scaled: fx.Node, modules: Mapping[str, nn.Module]) -> list[int]:
    """List what may be the width of a head in queries, in keys (turned or not) or in scores."""
    if kind_of(scaled, modules) == "matmul":
        return list(_shape(scaled.args[0])[-1:])
    turned = swaps_last_two(scaled, modules) is not None
    return list(_shape(scaled)[-2:-1] if turned else _shape(scaled)[-1:])


def _mask(node: Any, kind: str) -> tuple[tuple[str, fx.Node, Any] | None, fx.Node | None]:
    """Read a mask on the scores: (mask, scores before it)."""
    args = node.args
    if kind == "add" and len(args) == 2 and not node.kwargs:
        left, right = args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None, None
        shapes = [n.meta.get("shape") for n in (left, right)]
        if shapes[0] is None or shapes[1] is None:
            return None, None
        scores, mask = (left, right) if shapes[0] == node.meta.get("shape") else (right, left)
        if shapes[0] == shapes[1] and right.target in (torch.matmul, operator.matmul, torch.bmm):
            scores, mask = right, left
        return ("add", mask, None), scores
    if len(args) == 3 and _very_low(args[2]) and all(isinstance(a, fx.Node) for a in args[:2]):
        if kind == "masked_fill":
            return ("fill", args[1], args[2]), args[0]
        if kind == "where":
            return ("keep", args[0], args[2]), args[1]
    return None, None


def _very_low(value: Any) -> bool:
    """Tell whether a number swallows scores added to it: then filling in and adding are the same.

    Numbers of float32 near 1e9 are 64 apart.
    """
    return isinstance(value, (int, float)) and value <= -1e9


def write_as_sdpa(captured: fx.GraphModule, written: Written) -> fx.Node:
    """Replace written-out attention by one call; the caller refreshes the notes."""
    graph, output = captured.graph, written.output
    with graph.inserting_before(output):
        mask = None
        if written.mask is not None:
            kind, node, value = written.mask
            if kind == "add":
                mask = node
            else:
                pair = (value, 0.0) if kind == "fill" else (0.0, value)
                mask = graph.call_function(torch.where, (_truth(graph, node), *pair))
        made = graph.call_function(
            F.scaled_dot_product_attention,
            (written.query, written.key, written.value),
            {"attn_mask": mask, "scale": written.scale},
        )
    output.replace_all_uses_with(made)
    graph.erase_node(output)
    return made


def _truth(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return node if node.meta.get("dtype") is torch.bool else graph.call_method("bool", (node,))


# --- heads --------------------------------------------------------------------------------------


def write_as_heads(
    captured: fx.GraphModule, node: fx.Node, name: str, *, project: bool
) -> str | None:
    """Replace a scaled dot product attention by one operator, splitting and joining included.

    Args:
        captured: The graph; changed. The caller takes out what is dead and refreshes its notes.
        node: A call of scaled_dot_product_attention.
        name: What the new module is called.
        project: Take the projections of queries, keys and values in, too, where they are linear
            layers of one input that nothing else reads.

    Returns:
        Why it stays, or None.
    """
    modules = dict(captured.named_modules())
    places = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    query, key, value, mask, dropout, causal, scale, grouped = given(node, *places)
    shapes = [_shape(n) for n in (query, key, value)]
    if any(len(s) != 4 for s in shapes):
        return "its queries, keys and values do not have four dimensions"
    if grouped or shapes[0][1] != shapes[1][1] or shapes[1] != shapes[2]:
        return "its queries, keys and values have different heads or widths"
    if number(dropout or 0) or not isinstance(causal or False, bool):
        return "it has settings that the operator lacks"
    if causal and shapes[0][2] != shapes[1][2]:
        return "it is causal over keys of another length"
    if mask is not None and mask.meta.get("dtype") not in (torch.float32, torch.bool):
        return "its mask is neither float32 nor of truth values"
    if scale is not None and number(scale) is None:
        return "its scale is computed"
    heads, width = shapes[0][1], shapes[0][3]
    factor = width**-0.5 if scale is None else float(number(scale) or 0.0)
    graph = captured.graph
    taken = _projection((query, key, value), modules, captured) if project else None
    if taken is None:
        flat = [_before_split(n, modules, heads) for n in (query, key, value)]
        with graph.inserting_before(node):
            if flat[0] is None:
                turned = graph.call_method("transpose", (query, 1, 2))
                flat[0] = graph.call_method("flatten", (turned, 2))
        if flat[1] is None or flat[2] is None:
            flat[1:] = [key, value]
        captured.add_submodule(name, MultiHead(heads, factor, bool(causal)))
        operands = tuple(flat)
    else:
        source, weight_IO, bias_O = taken
        layer = ProjectedHeads(weight_IO.shape[0], heads * width, heads, factor, bool(causal))
        layer.weight, layer.bias = nn.Parameter(weight_IO), nn.Parameter(bias_O)
        captured.add_submodule(name, layer.eval())
        operands = (source,)
    with graph.inserting_before(node):
        made = graph.call_module(name, operands if mask is None else (*operands, mask))
    joined = _joined(node, modules)
    if joined is None:
        with graph.inserting_before(node):
            apart = graph.call_method("unflatten", (made, -1, (heads, width)))
            made = graph.call_method("transpose", (apart, 1, 2))
        joined = node
    joined.replace_all_uses_with(made)
    return None


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta.get("shape") or ()) if isinstance(node, fx.Node) else ()


def _before_split(node: Any, modules: Mapping[str, nn.Module], heads: int) -> fx.Node | None:
    """Return (B, L, N * H) that a tensor (B, N, L, H) was split from, where it was nothing more."""
    node = unwrapped(node, modules)
    if axes_of(node, modules) != (0, 2, 1, 3):
        return None
    apart = unwrapped(node.args[0], modules)
    if kind_of(apart, modules) != "reshape" or not isinstance(apart.args[0], fx.Node):
        return None
    before, after = apart.args[0].meta.get("shape"), apart.meta.get("shape")
    if before is None or after is None or len(before) != 3 or before[:2] != after[:2]:
        return None
    return apart.args[0] if after[2] == heads else None


def _projection(
    three: tuple[Any, Any, Any], modules: Mapping[str, nn.Module], captured: fx.GraphModule
) -> tuple[fx.Node, Tensor, Tensor] | None:
    """Find the one input of queries, keys and values (B, N, L, H), and the map from it.

    Returns:
        (the input (B, L, I), weight (I, 3 * N * H), bias (3 * N * H)); None: there is none, or a
        projection is read elsewhere.
    """
    heads, _, width = three[0].meta["shape"][1:]
    counted = readers(captured)
    blocks, sources, biases = [], [], []
    for node in three:
        found = _block(node, modules, heads)
        if found is None:
            return None
        call, part, parts = found
        layer = modules[str(call.target)]
        if not foldable(call, modules, counted):
            return None
        assert isinstance(layer, nn.Linear)
        rows = layer.out_features // parts
        if rows != heads * width or layer.weight.dtype != torch.float32:
            return None
        place = slice(part * rows, (part + 1) * rows)
        bias = layer.bias if layer.bias is not None else torch.zeros(layer.out_features)
        blocks.append(layer.weight.detach()[place])
        biases.append(bias.detach()[place])
        sources.append(call.args[0])
    if any(source is not sources[0] for source in sources):
        return None
    if len(sources[0].meta.get("shape") or ()) != 3:
        return None
    return sources[0], torch.cat(blocks).T.contiguous(), torch.cat(biases).clone()


def _block(node: Any, modules: Mapping[str, nn.Module], heads: int) -> tuple[Any, int, int] | None:
    """Tell which rows of which linear layer make a tensor (B, N, L, H): (call, part, parts).

    Every value on the way is read by this way alone.
    """
    flat = _before_split(node, modules, heads)
    if flat is not None:
        if not _alone(node, flat):
            return None
        if flat.op == "call_module":
            return (flat, 0, 1) if len(flat.users) == 1 else None
        part, cut = _item(flat)
        if cut is None or part is None or not _in_three(cut) or len(flat.users) != 1:
            return None
        return cut.args[0], part, 3
    part, cut = _item(unwrapped(node, modules))
    if part is None or cut is None or len(node.users) != 1:
        return None
    # one reshape to (B, L, 3, N, H), permuted to (3, B, N, L, H), taken apart
    turned = cut.args[0] if cut.target in (torch.unbind, "unbind") else cut
    if axes_of(turned, modules) != (2, 0, 3, 1, 4) or not _alone(turned, None):
        return None
    apart = turned.args[0]
    if kind_of(apart, modules) != "reshape" or (apart.meta.get("shape") or ())[2:4] != (3, heads):
        return None
    call = apart.args[0]
    single = len(apart.users) == 1 and isinstance(call, fx.Node) and len(call.users) == 1
    return (call, part, 3) if single and call.op == "call_module" else None


def _item(node: Any) -> tuple[int | None, Any]:
    """Read `x[i]`: (i, x)."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        source, at = node.args
        if isinstance(at, int) and at >= 0 and isinstance(source, fx.Node):
            return at, source
    return None, None


def _in_three(node: Any) -> bool:
    """Tell whether a node takes a linear layer's output apart into three equal parts."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
        return False
    width = (source.meta.get("shape") or (0,))[-1]
    rank = len(source.meta.get("shape") or ())
    if node.target in ("chunk", torch.chunk):
        _, parts, dim = given(node, "input", "chunks", "dim")
        good = parts == 3
    elif node.target in ("split", torch.split):
        _, parts, dim = given(node, "input", "split_size", "dim")
        good = parts == width // 3 or (isinstance(parts, (list, tuple)) and len(set(parts)) == 1)
        good = good and width % 3 == 0
    else:
        return False
    return good and isinstance(dim, int) and dim % rank == rank - 1 and width % 3 == 0


def _alone(node: Any, stop: fx.Node | None) -> bool:
    """Tell whether each value from `node` back to what `stop` gave is read once."""
    if stop is None:
        return all(user.target is operator.getitem for user in node.users) or len(node.users) == 1
    while node is not stop:
        if len(node.users) != 1:
            return False
        node = node.args[0]
    return True


def _joined(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """Return the call that puts the heads side by side, where nothing else reads them."""
    user = only_user(node)
    if user is None or axes_of(user, modules) != (0, 2, 1, 3):
        return None
    user = only_user(user)
    while user is not None and kind_of(user, modules) == "same":
        user = only_user(user)
    if user is None or kind_of(user, modules) != "reshape":
        return None
    batch, heads, rows, width = node.meta["shape"]
    return user if user.meta.get("shape") == (batch, rows, heads * width) else None
