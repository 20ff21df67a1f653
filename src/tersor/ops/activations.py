"""Find activations that are spelled out in elementwise operators, by what these compute."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.ops.calls import kind_of

_ELEMENTWISE = (
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "square",
    "sqrt",
    "erf",
    "tanh",
    "sigmoid",
    "hardsigmoid",
    "relu",
    "relu6",
    "clamp",
    "same",
)
_MOST = 14
"""Operators that an activation may be spelled out in."""
_NEAR = 1e-6
"""Largest difference to the named function in float64; constants are written with 7 digits."""
NAMED: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, Any]]] = {
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
    "hardswish": (F.hardswish, {}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "relu6": (F.relu6, {}),
}
"""Activations that runtimes know by name: torch's function, and its settings."""


@dataclass(frozen=True, kw_only=True)
class Spelled:
    """An activation spelled out in several calls."""

    name: str
    """A key of NAMED."""
    source: fx.Node
    """What it is applied to."""
    nodes: tuple[fx.Node, ...]
    """The calls, the last one first; nothing else reads those before the last."""


def find_spelled(captured: fx.GraphModule) -> list[Spelled]:
    """List activations that are spelled out in two calls or more, in the order of the graph.

    The calls behind a tensor are gathered one by one; where they depend on one tensor alone, they
    are run on numbers from -12 to 12 and compared with the functions that have a name.

    Args:
        captured: What `ops.capture.capture` returned.
    """
    modules = dict(captured.named_modules())
    place = {node: i for i, node in enumerate(captured.graph.nodes)}
    found: list[Spelled] = []
    taken: set[fx.Node] = set()
    for last in reversed(list(captured.graph.nodes)):
        if last not in taken and kind_of(last, modules) in _ELEMENTWISE:
            made = _longest(last, modules, place)
            if made is not None:
                found.append(made)
                taken.update(made.nodes)
    return found[::-1]


def _longest(
    last: fx.Node, modules: Mapping[str, nn.Module], place: Mapping[fx.Node, int]
) -> Spelled | None:
    """Gather calls behind `last`, the latest first; return the longest that is an activation."""
    inside, best = [last], None
    while len(inside) <= _MOST:
        leaves = {n for node in inside for n in node.all_input_nodes} - set(inside)
        if len(inside) > 1 and len(leaves) == 1:
            (source,) = leaves
            name = _named(inside, source, modules)
            if name is not None:
                best = Spelled(name=name, source=source, nodes=tuple(inside))
        able = [
            leaf
            for leaf in leaves
            if kind_of(leaf, modules) in _ELEMENTWISE and all(user in inside for user in leaf.users)
        ]
        if not able:
            return best
        inside.append(max(able, key=lambda node: place[node]))
    return best


def _named(nodes: list[fx.Node], source: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Run the calls on numbers, and tell which function gives the same."""
    shape = source.meta.get("shape")
    if shape is None or any(node.meta.get("shape") != shape for node in nodes):
        return None
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.linspace(-1, 1, 500)]).double()
    values: dict[fx.Node, Any] = {source: x}
    try:
        for node in reversed(nodes):
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
            if node.op == "call_module":
                values[node] = modules[str(node.target)](*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # a function
    except (RuntimeError, TypeError, KeyError):
        return None  # calls on something else than numbers
    made = values[nodes[0]]
    if not isinstance(made, Tensor) or made.shape != x.shape:
        return None
    for name, (function, settings) in NAMED.items():
        if float((made - function(x, **settings)).abs().max()) <= _NEAR:
            return name
    return None
