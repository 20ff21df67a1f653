"""Groups of coupled channels: what must be cut together, and the cut.

Source: Fang et al., DepGraph, arXiv:2301.12900. There layers are coupled as wholes; here single
channels are, so that concatenation, flattening and padding need no special case.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.ops.atoms import Port
from tersor.ops.channel_flow import follow

# O output channels, I input channels of a layer (I: of one of its groups)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that lie in the same layers; each can be cut, and is cut from all of them."""

    indices: Mapping[Port, tuple[tuple[int, ...], ...]]
    """(layer, side) -> for each channel of the group, its places there."""
    protected: str | None = None
    """Why these channels must stay; None: they can be cut."""

    @property
    def name(self) -> str:
        """The layer that makes these channels, the first of them."""
        return (self.layers("out") or self.layers("dim") or tuple(p for p, _ in self.indices))[0]

    @property
    def size(self) -> int:
        """How many channels."""
        return len(next(iter(self.indices.values())))

    def layers(self, side: str) -> tuple[str, ...]:
        """List the layers that hold these channels on a side, such as "out" or "in"."""
        return tuple(layer for layer, own in self.indices if own.startswith(side))

    def __str__(self) -> str:
        parts = [f"out of {', '.join(self.layers('out') or self.layers('dim'))}"]
        passed = (*self.layers("both"), *self.layers("depthwise"))
        if passed:
            parts.append(f"through {', '.join(passed)}")
        if self.layers("in"):
            parts.append(f"into {', '.join(self.layers('in'))}")
        tail = f"; protected: {self.protected}" if self.protected else ""
        return f"{self.size} channels {' '.join(parts)}{tail}"


def find_groups(captured: fx.GraphModule, net: nn.Module) -> list[Group]:
    """List the groups of coupled channels in the order of the graph, protected ones, too.

    Args:
        captured: What `ops.capture.capture` returned for `net`.
        net: The network.
    """
    flow = follow(captured, net)
    blocked = flow.blocked()
    places: dict[int, dict[Port, list[int]]] = {}
    for port, atoms in flow.ports.items():
        for index, atom in enumerate(atoms.tolist()):
            places.setdefault(flow.root(atom), {}).setdefault(port, []).append(index)
    gathered: dict[tuple[tuple[Port, ...], str | None], list[int]] = {}
    for root, found in places.items():
        sides = {side for _, side in found}
        if not any(side == "out" or side.startswith("dim") for side in sides):
            continue
        reason = blocked.get(root)
        if reason is None and "in" not in sides:
            reason = "no layer reads these channels"
        gathered.setdefault((tuple(found), reason), []).append(root)
    return [
        Group(
            indices={port: tuple(tuple(places[root][port]) for root in roots) for port in ports},
            protected=reason,
        )
        for (ports, reason), roots in gathered.items()
    ]


Removal = Sequence[tuple[Group, Sequence[int]]]
"""Groups and, of each, the numbers of the channels to remove."""


def removed_places(removal: Removal) -> dict[Port, set[int]]:
    """Map ports to the places that go."""
    gone: dict[Port, set[int]] = {}
    for group, channels in removal:
        for port, places in group.indices.items():
            gone.setdefault(port, set()).update(i for k in channels for i in places[k])
    return gone


def cut(net: nn.Module, removal: Removal) -> None:
    """Remove channels: tensors that hold one become smaller, and the layers' numbers with them."""
    with torch.no_grad():
        for (name, side), gone in removed_places(removal).items():
            if gone:
                _cut_port(net, name, side, gone)


def mask(net: nn.Module, removal: Removal) -> None:
    """Make channels count for nothing where they are read: the same function as after `cut`."""
    with torch.no_grad():
        for (name, side), gone in removed_places(removal).items():
            if side == "in":
                layer = net.get_submodule(name)
                assert isinstance(layer.weight, Tensor)
                for place in gone:
                    in_slice(layer, layer.weight, place).zero_()


def in_slice(layer: nn.Module, tensor: Tensor, place: int) -> Tensor:
    """Return the entries of a weight (or its gradient) that read input channel `place`; a view."""
    if isinstance(layer, _ConvTransposeNd):
        return tensor[place]
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        group, within = divmod(place, tensor.shape[1])
        rows = tensor.shape[0] // layer.groups
        return tensor[group * rows : (group + 1) * rows, within]
    return tensor[:, place]


def out_slice(layer: nn.Module, tensor: Tensor, place: int) -> Tensor:
    """Return the entries of a weight (or its gradient) that make output channel `place`; a view."""
    if isinstance(layer, _ConvTransposeNd):
        group, within = divmod(place, tensor.shape[1])
        rows = tensor.shape[0] // layer.groups
        return tensor[group * rows : (group + 1) * rows, within]
    return tensor[place]


def _cut_port(net: nn.Module, name: str, side: str, gone: set[int]) -> None:
    if side.startswith("dim"):
        owner, _, leaf = name.rpartition(".")
        _keep(net.get_submodule(owner), leaf, int(side[3:]), gone)
        return
    layer = net.get_submodule(name)
    if isinstance(layer, _BatchNorm):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            _keep(layer, leaf, 0, gone)
        layer.num_features -= len(gone)
    elif isinstance(layer, nn.Linear):
        _keep(layer, "weight", 0 if side == "out" else 1, gone)
        if side == "out":
            _keep(layer, "bias", 0, gone)
            layer.out_features -= len(gone)
        else:
            layer.in_features -= len(gone)
    else:
        assert isinstance(layer, _ConvNd)
        _cut_convolution(layer, side, gone)


def _cut_convolution(layer: _ConvNd, side: str, gone: set[int]) -> None:
    transposed = isinstance(layer, _ConvTransposeNd)
    if side == "depthwise":
        each = layer.out_channels // layer.groups
        _keep(layer, "weight", 0, gone)
        _keep(layer, "bias", 0, gone)
        layer.out_channels -= len(gone)
        layer.in_channels = layer.groups = layer.out_channels // each
        return
    channels = layer.out_channels if side == "out" else layer.in_channels
    # the weight holds one group's worth of channels in dimension 1, all of them in dimension 0
    first = (side == "out") != transposed
    per_group = channels // layer.groups
    _keep(layer, "weight", 0 if first else 1, gone if first else {i % per_group for i in gone})
    if side == "out":
        _keep(layer, "bias", 0, gone)
        layer.out_channels -= len(gone)
    else:
        layer.in_channels -= len(gone)


def _keep(owner: nn.Module, leaf: str, dim: int, gone: set[int]) -> None:
    """Drop indices of one tensor of a module."""
    tensor = getattr(owner, leaf)
    if tensor is None:
        return
    kept = torch.tensor([i for i in range(tensor.shape[dim]) if i not in gone])
    smaller = tensor.detach().index_select(dim, kept).contiguous()
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    setattr(owner, leaf, smaller)


def count_macs(captured: fx.GraphModule) -> Callable[[Mapping[Port, set[int]]], int]:
    """Return what counts the multiply-accumulates of one sample, in convolutions and linear layers.

    The returned function takes the places that are removed at each port.
    """
    calls: list[tuple[str, int, int, int, int]] = []
    for node in captured.graph.nodes:
        shape = node.meta.get("shape")
        if node.op != "call_module" or shape is None:
            continue
        name, layer = str(node.target), captured.get_submodule(str(node.target))
        if isinstance(layer, nn.Linear):
            calls.append((name, layer.out_features, layer.in_features, 1, _product(shape[1:-1])))
        elif isinstance(layer, _ConvNd):
            source = node.all_input_nodes[0].meta["shape"]
            grid = source if isinstance(layer, _ConvTransposeNd) else shape
            places = _product(grid[2:]) * _product(layer.kernel_size)
            calls.append((name, layer.out_channels, layer.in_channels, layer.groups, places))

    def count(gone: Mapping[Port, set[int]]) -> int:
        total = 0
        for name, outputs, inputs, groups, places in calls:
            lost = {side: len(gone.get((name, side), ())) for side in ("out", "in", "depthwise")}
            kept = outputs - lost["out"] - lost["depthwise"]
            total += places * kept * ((inputs - lost["in"]) // groups)
        return total

    return count


def _product(numbers: Sequence[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
