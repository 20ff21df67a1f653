"""Tucker: a convolution becomes 1x1 to few channels, the kernel among few, and 1x1 to all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.decomposition._choice import Candidate, decompose
from tersor.decomposition._layers import Site, by_group
from tersor.decomposition._settings import check, weaker
from tersor.ops import low_rank
from tersor.ops.low_rank import tucker_losses, vbmf_rank
from tersor.ops.parts import Part, pointwise

# G groups, O outputs and I inputs of a group, K places of the kernel
# P rank of the outputs, Q rank of the inputs

_STEPS = 32
"""Ranks of each mode that are looked at, at most."""


@dataclass(frozen=True, kw_only=True)
class Tucker:
    """Settings: a share, `vbmf` or `ranks`; `macs: 0.7` if none is given."""

    energy: float | None = None
    """Keep at least this share of each layer's squared weights, in (0, 1]."""
    macs: float | None = None
    """Leave this share of the network's multiply-accumulates, in (0, 1), where it costs least."""
    parameters: float | None = None
    """Leave this share of the network's parameters, in (0, 1), where it costs least."""
    latency: float | None = None
    """Leave this share of the latency, measured on the target, in (0, 1)."""
    vbmf: bool = False
    """Both ranks of each layer where its singular values sink into noise, by variational Bayes."""
    ranks: tuple[int, int] | None = None
    """Ranks of inputs and outputs of every layer."""
    multiple: int = 4
    """Ranks are multiples of it, as vector units like them; one that you give is taken as it is."""
    convert: Literal["faster", "all"] = "faster"
    """faster: layers that get faster, timed on the target; all: every one, for another machine."""
    layers: Layers = Layers()
    """Which convolutions."""

    def __post_init__(self) -> None:
        check(self, vbmf=self.vbmf, ranks=self.ranks)
        if self.ranks is not None and min(self.ranks) < 1:
            raise ValueError(f"ranks must be at least 1, got {list(self.ranks)}")

    def weaker(self) -> "Tucker | None":
        """Return settings that change less; None where hardly anything would."""
        changes = None if self.vbmf or self.ranks is not None else weaker(self)
        return None if changes is None else replace(self, **changes)


@technique(renames=True, paper="arXiv:1511.06530")
def tucker(net: nn.Module, config: Tucker, context: Context) -> nn.Module:
    """Replace kernels by the Tucker-2 form: a core between two changes of channels.

    Ranks are looked at in pairs, with their losses by the truncated HOSVD; factors of the chosen
    ones are improved by orthogonal iteration. Where one of the ranks is full, its 1x1 convolution
    is left out. Groups are factored each on its own, with the same ranks.

    Raises:
        UnfitError: no convolution gets cheaper on the target; a share cannot be reached; ranks
            do not fit: names the nearest that do.

    Source:
        Kim et al., arXiv:1511.06530, section 3; ranks by VBMF as there, or over all layers.
    """

    def propose(site: Site, moment: Tensor | None) -> Sequence[Candidate] | str:
        del moment
        return _candidates(site, config)

    return decompose(
        net,
        config,
        context,
        propose,
        kinds=(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        fixed=config.ranks is not None or config.vbmf,
    )


def _candidates(site: Site, config: Tucker) -> Sequence[Candidate] | str:
    part = site.part
    if set(part.kernel) == {1}:
        return "a 1x1 kernel has no core; svd factors it"
    weight_GOIK = by_group(site).flatten(3)
    outputs, inputs = weight_GOIK.shape[1:3]
    energy_G = weight_GOIK.square().sum((1, 2, 3))
    share_G = energy_G / energy_G.sum().clamp(min=1e-300)
    lost_OI = sum(s * tucker_losses(w) for s, w in zip(share_G, weight_GOIK, strict=True))
    assert isinstance(lost_OI, Tensor)
    made = []
    for p, q in _pairs(site, config, weight_GOIK):
        parts = _parts(part, p, q, outputs, inputs)

        def weights(p: int = p, q: int = q) -> Sequence[Tensor]:
            return _weights(weight_GOIK, part.kernel, p, q)

        loss = float(lost_OI[p, q].clamp(min=0))
        made.append(Candidate(rank=(q, p), loss=loss, parts=parts, weights=weights))
    return made if config.ranks is not None or config.vbmf else _best(site, made)


def _pairs(site: Site, config: Tucker, weight_GOIK: Tensor) -> list[tuple[int, int]]:
    """Return the ranks (outputs, inputs) to look at."""
    outputs, inputs = weight_GOIK.shape[1:3]
    if config.ranks is not None:
        q, p = config.ranks
        if q > inputs or p > outputs:
            raise UnfitError(
                f"ranks {q}, {p} do not fit layer {site.name!r}, which has {inputs} inputs and "
                f"{outputs} outputs; use at most {min(q, inputs)}, {min(p, outputs)}, or leave the "
                "layer out"
            )
        return [(p, q)]

    def up(rank: int, full: int) -> int:
        return min(-(-rank // config.multiple) * config.multiple, full)

    if config.vbmf:
        p = max(vbmf_rank(w.flatten(1)) for w in weight_GOIK)
        q = max(vbmf_rank(w.transpose(0, 1).flatten(1)) for w in weight_GOIK)
        return [(up(p, outputs), up(q, inputs))]

    def steps(full: int) -> list[int]:
        step = up(-(-full // _STEPS), full)
        return [*range(step, full, step), full]

    return [(p, q) for p in steps(outputs) for q in steps(inputs)]


def _best(site: Site, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Leave out what another one beats in multiplications and loss, and what saves none."""
    whole, kept, lowest = site.macs([site.part]), list[Candidate](), float("inf")
    for macs, _, candidate in sorted(
        ((site.macs(c.parts), c.loss, c) for c in candidates), key=lambda each: each[:2]
    ):
        if macs < whole and candidate.loss < lowest:
            kept.append(candidate)
            lowest = candidate.loss
    return kept


def _parts(part: Part, p: int, q: int, outputs: int, inputs: int) -> tuple[Part, ...]:
    groups, dimensions = part.groups, len(part.kernel)
    core = replace(part, inputs=groups * q, outputs=groups * p)
    made = [core]
    if q < inputs:
        made.insert(0, pointwise(part.inputs, groups * q, dimensions, groups))
    if p < outputs:
        made.append(pointwise(groups * p, part.outputs, dimensions, groups))
    return tuple(made)


def _weights(weight_GOIK: Tensor, kernel: tuple[int, ...], p: int, q: int) -> Sequence[Tensor]:
    outputs, inputs = weight_GOIK.shape[1:3]
    forms = [low_rank.tucker(w, p, q) for w in weight_GOIK]
    ones = [1] * len(kernel)
    if q == inputs:  # a change to as many channels is part of the core
        cores = [torch.einsum("pqk,iq->pik", core, into) for _, core, into in forms]
    else:
        cores = [core for _, core, _ in forms]
    if p == outputs:
        cores = [
            torch.einsum("pqk,op->oqk", core, out)
            for core, (out, _, _) in zip(cores, forms, strict=True)
        ]
    made = [torch.cat(cores).view(-1, cores[0].shape[1], *kernel)]
    if q < inputs:
        first = torch.cat([into.mT for _, _, into in forms])
        made.insert(0, first.view(*first.shape, *ones))
    if p < outputs:
        last = torch.cat([out for out, _, _ in forms])
        made.append(last.view(*last.shape, *ones))
    return made
