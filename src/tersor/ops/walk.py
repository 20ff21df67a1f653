"""Run a captured network node by node, and stop at layers while they can still be changed."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx


def walk(
    graph: fx.GraphModule, batch: Mapping[str, Tensor], watched: set[str]
) -> Iterator[tuple[fx.Node, Tensor | None, Tensor | None]]:
    """Run node by node; yield a watched layer with its input, then with its output.

    Values are dropped after their last use, so that memory does not grow with depth.

    Args:
        graph: The network.
        batch: Inputs by name.
        watched: Names of layers.

    Yields:
        (node, input, None) before the layer runs, as it then is, and (node, None, output) after.
    """
    order = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    interpreter = fx.Interpreter(graph)
    interpreter.args_iter = iter([batch.get(name) for name in order])
    for node in graph.graph.nodes:
        if node.op == "output":
            return
        seen = node.op == "call_module" and str(node.target) in watched
        if seen:
            source = node.args[0] if node.args else node.kwargs["input"]
            yield node, interpreter.env[source], None
        with torch.no_grad():
            value = interpreter.run_node(node)
        interpreter.env[node] = value
        if seen:
            yield node, None, value
        for last in interpreter.user_to_last_uses.get(node, []):
            del interpreter.env[last]


def carried_bytes(graph: fx.GraphModule, watched: Sequence[str], rows: int) -> float:
    """Return the most bytes that one sample holds alive while a walk stops at a watched layer.

    Args:
        graph: The network, with the shapes of an example in its notes.
        watched: Names of layers.
        rows: Samples of that example.
    """
    nodes = list(graph.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    sizes = [
        torch.Size(node.meta["shape"]).numel() * node.meta["dtype"].itemsize
        if node.meta.get("shape") is not None and "dtype" in node.meta
        else 0
        for node in nodes
    ]
    # what is born before place i and read at i or later is alive at i
    change = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        if node.op != "get_attr" and node.users:
            change[i + 1] += sizes[i]
            change[max(place[user] for user in node.users) + 1] -= sizes[i]
    most = alive = 0
    for i, node in enumerate(nodes):
        alive += change[i]
        if node.op == "call_module" and str(node.target) in watched:
            most = max(most, alive)
    return most / max(rows, 1)
