"""Layers against the chains that would replace them, timed on the target."""

import math
from collections.abc import Sequence

import torch
from torch import fx, nn

from tersor.core.context import Context
from tersor.decomposition._layers import Site
from tersor.ops.notes import carry_notes
from tersor.ops.parts import Part, build

_GAIN = 0.03
"""Share of a layer's time that a chain must save to be called faster."""
Shape = tuple[Part, tuple[int, ...]]


class Races:
    """Measured milliseconds of layers and chains; each shape is timed once.

    What is timed is a network of that layer alone, of the form that the whole one is called in: its
    inputs are reduced to a number for each sample, which is added to a fixed pattern of the size of
    the layer's input. The same network without the layer is timed, too, and taken off.
    """

    def __init__(self, net: nn.Module, context: Context) -> None:
        self.net, self.context = net, context
        self.known: dict[tuple[Shape, tuple[Part, ...]], float] = {}

    def run(self, asked: Sequence[tuple[Site, tuple[Part, ...]]]) -> None:
        """Time what is asked and not known yet, all chains of one layer's shape interleaved."""
        todo: dict[Shape, dict[tuple[Part, ...], None]] = {}
        for site, parts in asked:
            shape = (site.part, site.size)
            if (shape, parts) not in self.known:
                todo.setdefault(shape, {})[parts] = None
        for shape, own in self.context.track(todo.items(), "timing layers", len(todo)):
            chains = [(shape[0],), *own]
            nets = [self._network(shape, parts) for parts in ((), *chains)]
            bare, *times = self.context.latency(nets)
            for parts, ms in zip(chains, times, strict=True):
                self.known[shape, parts] = max(ms - bare, 0.0)

    def times(self, site: Site, parts: tuple[Part, ...]) -> tuple[float, float]:
        """Return the measured milliseconds of the layer and of the chain."""
        shape = (site.part, site.size)
        return self.known[shape, (site.part,)], self.known[shape, parts]

    def faster(self, site: Site, parts: tuple[Part, ...]) -> bool:
        """Tell whether the chain was measured to be faster."""
        before, after = self.times(site, parts)
        return after < (1 - _GAIN) * before

    def _network(self, shape: Shape, parts: Sequence[Part]) -> fx.GraphModule:
        part, size = shape
        example = self.context.inputs.example
        root = nn.Module()
        linear = not part.kernel
        own = (1, *size, part.inputs) if linear else (1, part.inputs, *size)
        generator = torch.Generator().manual_seed(0)
        root.register_buffer("pattern", torch.randn(own, generator=generator))
        graph = fx.Graph()
        seeds = [_number(graph, graph.placeholder(name), example[name]) for name in example]
        seed = seeds[0]
        for other in seeds[1:]:
            seed = graph.call_function(torch.add, (seed, other))
        seed = graph.call_function(torch.reshape, (seed, (-1, *([1] * (len(own) - 1)))))
        value = graph.call_function(torch.add, (seed, graph.get_attr("pattern")))
        if parts:
            chain = build(parts, [_random(p, generator) for p in parts], torch.zeros(part.outputs))
            for i, layer in enumerate(chain):
                root.add_module(f"layer{i}", layer)
                value = graph.call_module(f"layer{i}", (value,))
        graph.output(value)
        made = fx.GraphModule(root, graph).eval()
        carry_notes(self.net, made)
        return made


def _random(part: Part, generator: torch.Generator) -> torch.Tensor:
    shape = (part.outputs, part.inputs // part.groups, *part.kernel)
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


def _number(graph: fx.Graph, node: fx.Node, example: torch.Tensor) -> fx.Node:
    """Return the first number of each sample, (samples, 1)."""
    if example.dim() > 1:
        node = graph.call_function(torch.flatten, (node, 1))
        node = graph.call_function(torch.narrow, (node, 1, 0, 1))
    return graph.call_method("float", (node,))
