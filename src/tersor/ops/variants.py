"""Variants: what the outputs lose when one layer alone is replaced, all others as they are."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.context import Track, silent
from tersor.ops.losses import class_dimension, divergence, first_output

TOGETHER = 32
"""Samples that go through the network at once: their activations stay near the processor."""
Variants = Mapping[str, Mapping[int, nn.Module]]
"""Layer -> setting, such as bits -> what stands in the layer's place."""


def losses_of(
    captured: fx.GraphModule,
    variants: Variants,
    batch: Mapping[str, Tensor],
    *,
    rest: Callable[[str], fx.Interpreter] | None = None,
    track: Track = silent,
) -> dict[str, dict[int, float]]:
    """Measure the loss of each variant of each layer, all other layers as they are.

    The network runs once, node by node; what follows a layer runs again for each of its variants.

    Args:
        captured: The network; as it was at the end.
        variants: Of layers.
        batch: Inputs by name, all samples in one.
        rest: Makes what runs the rest of the network after a layer; by default it does no more.
        track: Shows progress.

    Returns:
        The mean divergence from the network's own outputs over the samples (mean squared error
        where outputs are numbers), never negative.
    """
    count = len(next(iter(batch.values())))
    found = {name: dict.fromkeys(own, 0.0) for name, own in variants.items()}
    starts = range(0, count, TOGETHER)
    run_on = rest or (lambda name: fx.Interpreter(captured))
    with torch.no_grad():
        for start in track(starts, "measuring sensitivities", len(starts)):
            part = {name: tensor[start : start + TOGETHER] for name, tensor in batch.items()}
            share = min(TOGETHER, count - start) / count
            for name, setting, loss in _walk(captured, variants, part, run_on):
                found[name][setting] += share * loss
    return {name: {s: max(loss, 0.0) for s, loss in own.items()} for name, own in found.items()}


def _walk(
    captured: fx.GraphModule,
    variants: Variants,
    batch: Mapping[str, Tensor],
    run_on: Callable[[str], fx.Interpreter],
) -> list[tuple[str, int, float]]:
    found: list[tuple[str, int, float]] = []
    nodes = list(captured.graph.nodes)
    last = {used: node for node in nodes for used in node.all_input_nodes}
    done: dict[fx.Node, Any] = {}
    wanted = first_output(captured(**batch))
    dimension = class_dimension(wanted, None)
    walk = fx.Interpreter(captured)
    walk.args_iter = iter([batch.get(str(n.target)) for n in nodes if n.op == "placeholder"])
    walk.env = done
    seen: set[str] = set()
    for node in nodes:
        name = str(node.target)
        if node.op == "call_module" and name in variants and name not in seen:
            seen.add(name)
            layer = captured.get_submodule(name)
            for setting, variant in variants[name].items():
                captured.set_submodule(name, variant)
                outputs = run_on(name).run(initial_env=dict(done), enable_io_processing=False)
                loss = float(divergence(first_output(outputs), wanted, dimension))
                found.append((name, setting, loss))
            captured.set_submodule(name, layer)
        done[node] = walk.run_node(node)
        for used in node.all_input_nodes:
            if last[used] is node:
                done[used] = None  # needed no more, and not to be computed again
    return found
