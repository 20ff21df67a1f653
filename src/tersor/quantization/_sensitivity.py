"""Sensitivities: what the outputs lose when one layer alone is rounded."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from tersor.core.context import Context
from tersor.ops.modules import Quantize, quantized
from tersor.ops.placement import Point
from tersor.ops.variants import losses_of
from tersor.quantization._integer import Rounded, weight_scales

FLOAT = 32
"""Bits of a layer that is left as it is."""


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
    found = losses_of(
        captured,
        variants,
        batch,
        rest=lambda name: _Rounding(captured, roundings.get(name, ())),
        track=context.track,
    )
    return {name: {b: found[name].get(b, 0.0) for b in bits} for name in chosen}


def _rounded(captured: fx.GraphModule, name: str, bits: int, rounded: Rounded) -> nn.Module:
    scale_O = weight_scales(captured, name, rounded, bits=bits, clip=True)
    return quantized(captured.get_submodule(name), scale_O, bits)


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
