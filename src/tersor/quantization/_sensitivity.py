"""Sensitivities: what the outputs lose when one layer alone is rounded."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.context import Context
from tersor.ops.losses import class_dimension, divergence, first_output
from tersor.ops.modules import Quantize, quantized
from tersor.ops.placement import Point
from tersor.quantization._integer import Rounded, weight_scales

FLOAT = 32
"""Bits of a layer that is left as it is."""
_TOGETHER = 32
"""Samples that go through the network at once: their activations stay near the processor."""
Losses = Mapping[str, Mapping[int, float]]
"""Layer -> bits -> loss."""


def sensitivities(
    captured: fx.GraphModule,
    chosen: Collection[str],
    bits: Sequence[int],
    batch: Mapping[str, Tensor],
    context: Context,
    roundings: Mapping[str, Rounded],
) -> dict[str, dict[int, float]]:
    """Measure the loss of each layer with each number of bits, all other layers in float.

    The network runs once, node by node; what follows a layer runs again for each rounding of it.

    Args:
        captured: The float network, batch norms folded.
        chosen: Layers.
        bits: To try.
        batch: Inputs by name, all samples in one.
        context: Shows progress.
        roundings: Of a layer's activations, to be counted with the rounding of its weights.

    Returns:
        The mean divergence from the float network's outputs over the samples (mean squared error
        where outputs are numbers).
    """
    variants = {
        name: {b: _rounded(captured, name, b, roundings.get(name, ())) for b in bits if b != FLOAT}
        for name in chosen
    }
    count = len(next(iter(batch.values())))
    found: dict[str, dict[int, float]] = {name: dict.fromkeys(bits, 0.0) for name in chosen}
    starts = range(0, count, _TOGETHER)
    with torch.no_grad():
        for start in context.track(starts, "measuring sensitivities", len(starts)):
            part = {name: tensor[start : start + _TOGETHER] for name, tensor in batch.items()}
            share = min(_TOGETHER, count - start) / count
            for name, b, loss in _walk(captured, variants, part, roundings):
                found[name][b] += share * loss
    return {name: {b: max(loss, 0.0) for b, loss in own.items()} for name, own in found.items()}


def _rounded(captured: fx.GraphModule, name: str, bits: int, rounded: Rounded) -> nn.Module:
    scale_O = weight_scales(captured, name, rounded, bits=bits, clip=True)
    return quantized(captured.get_submodule(name), scale_O, bits)


def _walk(
    captured: fx.GraphModule,
    variants: Mapping[str, Mapping[int, nn.Module]],
    batch: Mapping[str, Tensor],
    roundings: Mapping[str, Rounded],
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
            for bits, variant in variants[name].items():
                captured.set_submodule(name, variant)
                rest = _Rounding(captured, roundings.get(name, ())).run(
                    initial_env=dict(done), enable_io_processing=False
                )
                found.append((name, bits, float(divergence(first_output(rest), wanted, dimension))))
            captured.set_submodule(name, layer)
        done[node] = walk.run_node(node)
        for used in node.all_input_nodes:
            if last[used] is node:
                done[used] = None  # needed no more, and not to be computed again
    return found


class _Rounding(fx.Interpreter):
    """Runs a graph as if roundings had been inserted."""

    def __init__(self, captured: fx.GraphModule, rounded: Rounded) -> None:
        super().__init__(captured)
        self.rounded: dict[tuple[fx.Node, fx.Node], Quantize] = {
            (node, user): module for point, module in rounded for node, user in _readings(point)
        }

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        def value(used: fx.Node) -> Any:
            found = self.env[used]
            module = self.rounded.get((used, n))
            return found if module is None else module(found)

        return fx.node.map_arg(args, value)


def _readings(point: Point) -> list[tuple[fx.Node, fx.Node]]:
    return [
        (node, user)
        for node, users in point.places.items()
        for user in (node.users if users is None else users)
    ]
