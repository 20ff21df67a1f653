"""Student: a shallower or narrower copy of the network, made of its own weights, to be taught."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.blocks import bypass, find_blocks
from tersor.ops.recalibrate import recalibrate
from tersor.ops.selection import (
    Importance,
    at_ratio,
    check_something,
    coupled,
    free,
    score,
    smaller,
    told,
)

_DEFAULT_DEPTH = 0.5


@dataclass(frozen=True, kw_only=True)
class Student:
    """Settings of a student: `depth`, `width` or both; `depth: 0.5` when neither is given."""

    depth: float | None = None
    """Share of the repeated blocks that stay, in (0, 1): 0.5 keeps every second one."""
    width: float | None = None
    """Share of the channels that stay in every group of layers, in (0, 1)."""
    importance: Importance = "l2"
    """Which channels stay; l2, l1, fpgm, bn_scale and random need no data."""
    multiple: int = 8
    """Channels that stay are rounded up to a multiple of this."""

    def __post_init__(self) -> None:
        for name in ("depth", "width"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} must be in (0, 1), got {share}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")

    def weaker(self) -> "Student | None":
        """Return settings that remove about 30 % less; None when hardly anything would go."""
        depth = _DEFAULT_DEPTH if self.depth is self.width is None else self.depth
        milder = replace(self, depth=_milder(depth), width=_milder(self.width))
        return milder if min(milder.depth or 1, milder.width or 1) < 0.9 else None


def _milder(share: float | None) -> float | None:
    return None if share is None else round(1 - 0.7 * (1 - share), 3)


@technique(paper="arXiv:1910.01108")
def student(net: nn.Module, config: Student, context: Context) -> nn.Module:
    """Leave out blocks at even distances, then the least important channels; train it afterwards.

    Of `n` blocks of one class in one container ceil(depth * n) stay, at even distances from the
    first one on, and those without a way around them. Channels go from all layers that share them,
    the same share from each group. What stays has the teacher's weights. Where there is calibration
    data, batch norm statistics are estimated anew. Teaching is the next step of the same stage,
    such as `distill_logits`.

    Raises:
        UnfitError: no repeated blocks, or no channels that can be cut; or all would stay.

    Source:
        Sanh et al., DistilBERT, arXiv:1910.01108, section 3: one layer out of two is taken from the
        teacher. The narrowed student is the starting point of `channels` without a search.
    """
    net.eval()
    depth = _DEFAULT_DEPTH if config.depth is config.width is None else config.depth
    if depth is not None:
        _shorten(net, depth, context)
    if config.width is not None:
        net = _narrow(net, config.width, config, context)
    if context.data.calibration is not None:
        context.record(recalibrated=recalibrate(net, context.data.calibration))
    return net


def _shorten(net: nn.Module, depth: float, context: Context) -> None:
    blocks, refused = find_blocks(net, context.inputs)
    able = {block.name: block for block in blocks}
    runs = {
        (parent, type(net.get_submodule(name))): None
        for name in able
        for parent in [name.rpartition(".")[0]]
    }
    left_out = []
    for parent, kind in runs:
        children = net.get_submodule(parent).named_children()
        names = [f"{parent}.{leaf}".lstrip(".") for leaf, m in children if type(m) is kind]
        left_out += [able[name] for name in thinned(names, depth) if name in able]
    if not left_out:
        found = ", ".join(able) or "none"
        why = "".join(f"; {name} cannot be left out: {reason}" for name, reason in refused.items())
        raise UnfitError(
            f"depth {depth} leaves out no block of {type(net).__name__}: it takes several residual "
            f"blocks of one class in one container; found {found}{why}"
        )
    bypass(net, left_out)
    context.record(left_out=[block.name for block in left_out])


def thinned(names: Sequence[str], depth: float) -> list[str]:
    """Return those of a row that do not stay: ceil(depth * n) do, at even distances."""
    count = len(names)
    stay = math.ceil(depth * count - 1e-9)
    kept = {number * count // stay for number in range(stay)}
    return [name for number, name in enumerate(names) if number not in kept]


def _narrow(net: nn.Module, width: float, config: Student, context: Context) -> nn.Module:
    coupling = coupled(net, context)
    groups = free(coupling, net, Layers())
    scores = score(coupling, groups, config.importance, context)
    removal = at_ratio(groups, scores, 1 - width, ranking="local", multiple=config.multiple)
    check_something(removal, config.multiple)
    made, cut, left = smaller(net, coupling, removal, context)
    facts = told(coupling, cut, left, made)
    gone = {group.name: len(channels) for group, channels in cut}
    context.record(
        channels={g.name: f"{g.size} -> {g.size - gone.get(g.name, 0)}" for g in groups},
        macs_before=facts["macs_before"],
        macs_after=facts["macs_after"],
        form=facts["form"],
    )
    return made
