"""Attention heads: cut whole heads out of queries, keys, values and the projection after them."""

from dataclasses import dataclass, replace

from torch import nn

from tersor.core.context import Context
from tersor.core.errors import StepError, UnfitError, suggest
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.groups import Coupling, Group
from tersor.ops.selection import (
    Importance,
    Ranking,
    at_ratio,
    coupled,
    score,
    smaller,
    told,
)


@dataclass(frozen=True, kw_only=True)
class AttentionHeads:
    """Settings of head pruning."""

    ratio: float = 0.5
    """Share of the heads to remove, in [0, 1); each layer keeps one at least."""
    importance: Importance = "l2"
    """Which heads go: small weights (l1, l2), a small effect on the loss (taylor, fisher: need
    labels), small activations (activation), or any (random)."""
    ranking: Ranking = "global_normalized"
    """local: the same share of each layer; global: the least important of all layers together;
    global_normalized: the same with each layer's scores divided by their mean."""
    layers: Layers = Layers()
    """Layers that make queries, keys or values whose heads may go."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")
        if self.importance in ("bn_scale", "fpgm"):
            raise ValueError(f"importance {self.importance} is for filters, not for heads")
        if self.ranking in ("sensitivity", "per_cost"):
            raise ValueError(f"ranking {self.ranking} is for channels; choose local or global")

    def weaker(self) -> "AttentionHeads | None":
        """Remove about 30 % fewer; None when hardly any would go."""
        ratio = round(0.7 * self.ratio, 3)
        return replace(self, ratio=ratio) if ratio > 0.05 else None


@technique(paper="arXiv:1905.10650")
def attention_heads(net: nn.Module, config: AttentionHeads, context: Context) -> nn.Module:
    """Cut the heads that are missed least; the layers around attention become smaller.

    Heads are found in the graph, wherever channels are split in heads and their depth: fused or
    separate projections, `nn.MultiheadAttention`, plain products. With grouped queries a head of
    keys and values goes with the queries that it serves. The result is compared with the uncut
    network in which nothing reads those heads; it is the captured graph where forward has the
    number of heads written in it.

    Raises:
        DataError: calibration data, or labels, that the importance needs are missing.
        UnfitError: no heads that can be cut; says why.
        StepError: `layers` names none. In all cases the network is unchanged.

    Source:
        Michel et al., arXiv:1905.10650: the gate's gradient as importance, equation 2.
    """
    coupling = coupled(net, context, heads=True)
    groups = _heads(coupling, net, config.layers)
    scores = score(coupling, groups, config.importance, context)
    chosen = at_ratio(groups, scores, config.ratio, ranking=config.ranking, multiple=1)
    if config.ratio and not any(gone for _, gone in chosen):
        most = max(g.size for g in groups)
        raise UnfitError(
            f"nothing would be removed: layers have at most {most} heads, and ratio {config.ratio} "
            "of them is less than one; use a higher ratio"
        )
    net, removal, left = smaller(net, coupling, chosen, context)
    gone = {group.name: len(heads) for group, heads in removal}
    context.record(
        **told(coupling, removal, left, net),
        heads={g.name: f"{g.size} -> {g.size - gone.get(g.name, 0)}" for g in groups},
    )
    return net


def _heads(coupling: Coupling, net: nn.Module, layers: Layers) -> list[Group]:
    """Return the groups whose channels are heads."""
    wanted = {r for atoms in coupling.flow.heads for r in coupling.flow.roots(atoms).tolist()}
    found = [g for g in coupling.groups if wanted.intersection(g.roots)]
    names = [name for g in found for name in g.makers]
    unused = layers.unused(names) if names else ()
    if unused:
        raise StepError(
            f"layers: {unused[0]!r} matches no layer that makes heads."
            f"{suggest(unused[0].lstrip('!'), names)}"
        )
    free = [g for g in found if not g.protected and g.size > 1]
    chosen = [g for g in free if all(layers.holds(n) for n in g.makers)]
    if not chosen:
        reasons = "; ".join(f"{g.name}: {g.protected or 'a single head'}" for g in found)
        raise UnfitError(
            f"{type(net).__name__} has no attention heads that can be cut "
            f"({reasons or 'no layer is split in heads'})"
            f"{'; layers excludes the rest' if free else ''}"
        )
    return chosen
