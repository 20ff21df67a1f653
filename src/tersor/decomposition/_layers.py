"""The layers of a network that can be decomposed, their sizes, and moments of their inputs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError
from tersor.core.layers import Layers
from tersor.ops.calibrate import sweep
from tersor.ops.hessian import accumulate_hessian
from tersor.ops.matrices import input_rows
from tersor.ops.modules import check_patterns
from tersor.ops.parts import Part, macs_of, part_of

_MOMENT_BYTES = 2**30
"""Of second moments that are gathered in one pass over the calibration data."""
PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A layer and where it is called."""

    name: str
    layer: nn.Linear | _ConvNd
    size: tuple[int, ...]
    """Of its input for one sample, without channels: an image's, or (positions,)."""
    calls: int = 1

    @property
    def part(self) -> Part:
        """The layer as a part."""
        return part_of(self.layer)

    def macs(self, parts: Sequence[Part]) -> int:
        """Count the multiply-accumulates of a chain in its place, for one sample."""
        return self.calls * macs_of(parts, self.size)


@dataclass(kw_only=True)
class Sites:
    """All layers, those that may be decomposed, and why others may not."""

    captured: fx.GraphModule
    all: list[Site] = field(default_factory=list)
    open: list[Site] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    """Layer -> reason."""
    parameters: int = 0
    """Of the whole network."""
    transposed_macs: int = 0
    """Multiply-accumulates of transposed convolutions, which have no part."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all linear layers and convolutions, for one sample."""
        return self.transposed_macs + sum(site.macs([site.part]) for site in self.all)


def sites(captured: fx.GraphModule, layers: Layers, kinds: tuple[type[nn.Module], ...]) -> Sites:
    """Find the layers that a technique can decompose.

    Args:
        captured: The network, captured, with the shapes of an example in its notes.
        layers: The user's choice.
        kinds: Classes that the technique knows.

    Raises:
        RecipeError: a pattern matches no layer.
    """
    found = Sites(captured=captured, parameters=sum(p.numel() for p in captured.parameters()))
    modules = dict(captured.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in captured.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], (nn.Linear, _ConvNd)):
            calls.setdefault(str(node.target), []).append(node)
    check_patterns(layers, list(calls))
    read = {str(n.target).rpartition(".")[0] for n in captured.graph.nodes if n.op == "get_attr"}
    users: dict[int, int] = {}
    for owner in modules.values():
        for parameter in owner.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    first = next(n for n in captured.graph.nodes if n.op == "placeholder")
    samples = max(int(first.meta["shape"][0]), 1)
    for name, nodes in calls.items():
        layer = modules[name]
        assert isinstance(layer, (nn.Linear, _ConvNd))
        site = Site(name=name, layer=layer, size=_size(layer, nodes[0], samples), calls=len(nodes))
        why = None
        if type(layer) not in PLAIN:
            why = f"{type(layer).__name__} has no low-rank form here"
        elif type(layer) not in kinds:
            why = f"{type(layer).__name__} is not what this step decomposes"
        elif not layers.holds(name):
            why = "excluded by layers"
        elif layer.weight.dtype is not torch.float32:
            why = f"its weights are {str(layer.weight.dtype).removeprefix('torch.')}"
        elif name in read or users[id(layer.weight)] > 1:
            why = "its weight is used elsewhere, too"
        elif not bool(layer.weight.isfinite().all()):
            why = "it has weights that are NaN or infinite"
        if isinstance(layer, _ConvTransposeNd):
            found.transposed_macs += site.calls * layer.weight.numel() * math.prod(site.size)
        elif isinstance(layer, PLAIN):
            found.all.append(site)
        if why is None:
            found.open.append(site)
        else:
            found.closed[name] = why
    return found


def _size(layer: nn.Module, call: fx.Node, samples: int) -> tuple[int, ...]:
    source = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(source, fx.Node)
    given = tuple(source.meta["shape"])
    if isinstance(layer, nn.Linear):
        # called on (samples, positions), (positions, samples) or all positions at once
        return (max(1, torch.Size(given[:-1]).numel() // samples),)
    assert isinstance(layer, _ConvNd)
    return given[-len(layer.kernel_size) :]


def by_group(site: Site) -> Tensor:
    """Return a convolution's weight in float64, (groups, outputs, inputs, *kernel)."""
    weight = site.layer.weight.detach().double()
    return weight.view(site.part.groups, -1, *weight.shape[1:])


def first_samples(batches: object, samples: int) -> Iterator[Batch]:
    """Yield batches with the first samples of a split, the last one cut."""
    left = samples
    for batch in batches:  # type: ignore[attr-defined]  # re-iterable, as the context's data are
        size = len(next(iter(batch.values())))
        yield batch if size <= left else {k: v[:left] for k, v in batch.items()}
        left -= size
        if left <= 0:
            return


def moments(
    found: Sites, wanted: Sequence[Site], context: Context, samples: int
) -> dict[str, Tensor]:
    """Return the second moments of layers' inputs, (G, C, C), columns as in `ops.matrices`.

    Passes over the data are repeated where all moments together would fill the memory.

    Raises:
        DataError: no calibration data, or a batch that does not fit.
    """
    if context.data.calibration is None:
        raise DataError("calibration data is needed: a few hundred samples, without labels")
    made: dict[str, Tensor] = {}
    group: list[Site] = []
    size = 0
    for site in [*wanted, None]:
        own = 0 if site is None else _columns(site.layer) ** 2 * 4 * site.part.groups
        if group and (site is None or size + own > _MOMENT_BYTES):
            made |= _gathered(found, group, context, samples)
            group, size = [], 0
        if site is not None:
            group.append(site)
            size += own
    return made


def _columns(layer: nn.Linear | _ConvNd) -> int:
    return layer.weight[0].numel()


def _gathered(
    found: Sites, group: Sequence[Site], context: Context, samples: int
) -> dict[str, Tensor]:
    layers = {site.name: site.layer for site in group}
    sums = {
        site.name: torch.zeros(site.part.groups, _columns(site.layer), _columns(site.layer))
        for site in group
    }
    sinks: dict[fx.Node, list[str]] = {}
    for node in found.captured.graph.nodes:
        if node.op == "call_module" and str(node.target) in layers:
            source = node.args[0] if node.args else node.kwargs["input"]
            sinks.setdefault(source, []).append(str(node.target))

    def look(node: fx.Node, value: Tensor) -> None:
        for name in sinks[node]:
            for rows in input_rows(layers[name], value):
                sums[name] = accumulate_hessian(sums[name], rows)

    batches = first_samples(context.data.calibration, samples)
    sweep(found.captured, sinks, look, batches, context.inputs)
    return sums
