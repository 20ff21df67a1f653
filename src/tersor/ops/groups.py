"""Groups of coupled channels: what must be cut together, and the cut.

Source: Fang et al., DepGraph, arXiv:2301.12900. There layers are coupled as wholes; here single
channels are, so that concatenation, flattening and padding need no special case.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from tersor.ops.atoms import Flow, Port
from tersor.ops.channel_flow import follow
from tersor.ops.cutting import cut, masked, rewrite


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that lie in the same layers; each can be cut, and is cut from all of them."""

    indices: Mapping[Port, tuple[tuple[int, ...], ...]]
    """(layer, side) -> for each channel of the group, its places there."""
    roots: tuple[int, ...] = ()
    """The atom that stands for each channel."""
    protected: str | None = None
    """Why these channels must stay; None: they can be cut."""
    number: int = 1
    """Which of the groups that one layer makes, where it makes several."""

    @property
    def name(self) -> str:
        """The layer that makes these channels, the first of them."""
        first = (self.makers or tuple(p for p, _ in self.indices))[0]
        return first if self.number == 1 else f"{first}#{self.number}"

    @property
    def makers(self) -> tuple[str, ...]:
        """The layers, or bare parameters, that make these channels."""
        return (*self.layers("out"), *self.layers("hidden")) or self.layers("dim")

    @property
    def passed(self) -> tuple[str, ...]:
        """The layers, or bare parameters, that these channels pass through, each by itself."""
        bare = (p for p in self.layers("dim") if p not in self.makers)
        through = (p for side in ("both", "norm", "depthwise") for p in self.layers(side))
        return tuple(dict.fromkeys([*through, *bare]))

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers that sum over these channels."""
        return self.layers("in")

    @property
    def stays(self) -> str | None:
        """Why none of these channels can be cut; None: some can."""
        return self.protected or ("it is the only channel" if self.size == 1 else None)

    @property
    def size(self) -> int:
        """How many channels."""
        return len(next(iter(self.indices.values())))

    @property
    def width(self) -> int:
        """Most places that one channel has in a layer that makes it: 4 in a layer of 4 groups."""
        made = [p for (_, side), p in self.indices.items() if side in ("out", "hidden")]
        return max((len(own) for places in made for own in places), default=1)

    def layers(self, side: str) -> tuple[str, ...]:
        """List the layers that hold these channels on a side, such as "out" or "in"."""
        return tuple(layer for layer, own in self.indices if own.startswith(side))

    def __str__(self) -> str:
        parts = [f"out of {', '.join(self.makers)}"]
        if self.passed:
            parts.append(f"through {', '.join(self.passed)}")
        if self.readers:
            parts.append(f"into {', '.join(self.readers)}")
        tail = f"; protected: {self.protected}" if self.protected else ""
        return f"{self.size} channels {' '.join(parts)}{tail}"


Removal = Sequence[tuple[Group, Sequence[int]]]
"""Groups and, of each, the numbers of the channels to remove."""


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """A network's channels: which belong together, what they cost, and how they are cut."""

    captured: fx.GraphModule
    """The network as a graph."""
    flow: Flow
    """Where each channel is found."""
    groups: tuple[Group, ...]
    """In the order of the graph; protected ones, too."""

    @property
    def counts(self) -> tuple[int, int]:
        """How many channels lie in groups that can be cut, and how many there are."""
        return sum(g.size for g in self.groups if not g.stays), sum(g.size for g in self.groups)

    def _repr_html_(self) -> str:
        from tersor.ops.group_picture import draw  # draws what this file defines

        return draw(self)

    def macs(self, removal: Removal = ()) -> int:
        """Count the multiply-accumulates of one sample: layers, and products of tensors."""
        lost = self.flow.lost(removed_roots(removal))
        total = 0.0
        for work in self.flow.work:
            cost = work.constant
            for atoms in work.factors:
                cost *= int((~lost[atoms]).sum())
            total += cost
        return round(total)

    def masked(self, removal: Removal) -> fx.GraphModule:
        """Return the uncut network in which nothing reads the channels: what a cut must compute."""
        return masked(self.captured, self.flow, removed_roots(removal))

    def cut(self, removal: Removal) -> fx.GraphModule:
        """Return the graph of the smaller network; the captured one stays as it is."""
        made = copy.deepcopy(self.captured)
        cut(made, removed_places(removal))
        rewrite(made, self.flow, removed_roots(removal))
        return made


def couple(captured: fx.GraphModule, net: nn.Module, *, heads: bool = False) -> Coupling:
    """Find the groups of coupled channels.

    Args:
        captured: What `ops.capture.capture` returned for `net`.
        net: The network.
        heads: Where channels are split into heads and their depth, let heads go and not depth.
    """
    flow = follow(captured, net, heads=heads)
    return Coupling(captured=captured, flow=flow, groups=tuple(_groups(flow)))


def find_groups(captured: fx.GraphModule, net: nn.Module) -> list[Group]:
    """List the groups of coupled channels in the order of the graph, protected ones, too."""
    return list(couple(captured, net).groups)


def _groups(flow: Flow) -> list[Group]:
    blocked = flow.blocked()
    read = {root for r in flow.reads for root in flow.roots(r.atoms).tolist()}
    places: dict[int, dict[Port, list[int]]] = {}
    for port, atoms in flow.ports.items():
        for index, root in enumerate(flow.roots(atoms).tolist()):
            places.setdefault(root, {}).setdefault(port, []).append(index)
    gathered: dict[tuple[tuple[Port, ...], str | None], list[int]] = {}
    for root, found in places.items():
        if not any(side in ("out", "hidden") or side.startswith("dim") for _, side in found):
            continue
        reason = blocked.get(root)
        if reason is not None and all(side.startswith("dim") for _, side in found):
            continue  # a table, a scale: nobody would call these channels
        if reason is None and root not in read:
            reason = "no layer reads these channels"
        gathered.setdefault((tuple(found), reason), []).append(root)
    made: list[Group] = []
    for (ports, reason), roots in gathered.items():
        indices = {port: tuple(tuple(places[root][port]) for root in roots) for port in ports}
        group = Group(indices=indices, roots=tuple(roots), protected=reason)
        same = sum(other.name.partition("#")[0] == group.name for other in made)
        made.append(replace(group, number=same + 1))
    return made


def removed_places(removal: Removal) -> dict[Port, set[int]]:
    """Map ports to the places that go."""
    gone: dict[Port, set[int]] = {}
    for group, channels in removal:
        for port, places in group.indices.items():
            gone.setdefault(port, set()).update(i for k in channels for i in places[k])
    return gone


def removed_roots(removal: Removal) -> set[int]:
    """Return the atoms that stand for the channels that go."""
    return {group.roots[k] for group, channels in removal for k in channels}
