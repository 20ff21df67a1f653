"""Spatial SVD: a kxk convolution becomes one of kx1 and one of 1xk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.decomposition._choice import Candidate, decompose
from tersor.decomposition._layers import Site, by_group
from tersor.decomposition._matrix import ranks
from tersor.decomposition._settings import check, weaker
from tersor.ops.low_rank import losses, singular_values, svd_factors
from tersor.ops.parts import Part, parameters_of


@dataclass(frozen=True, kw_only=True)
class SpatialSvd:
    """Settings: a share or `rank`; `macs: 0.7` if none is given."""

    energy: float | None = None
    """Keep at least this share of each layer's squared weights, in (0, 1]."""
    macs: float | None = None
    """Leave this share of the network's multiply-accumulates, in (0, 1), where it costs least."""
    parameters: float | None = None
    """Leave this share of the network's parameters, in (0, 1), where it costs least."""
    latency: float | None = None
    """Leave this share of the latency, measured on the target, in (0, 1)."""
    rank: int | None = None
    """The rank of every layer."""
    multiple: int = 4
    """Ranks are multiples of it, as vector units like them; one that you give is taken as it is."""
    convert: Literal["faster", "all"] = "faster"
    """faster: layers that get faster, timed on the target; all: every one, for another machine."""
    layers: Layers = Layers()
    """Which layers."""

    def __post_init__(self) -> None:
        check(self, rank=self.rank)

    def weaker(self) -> "SpatialSvd | None":
        """Return settings that change less; None where hardly anything would."""
        changes = None if self.rank is not None else weaker(self)
        return None if changes is None else replace(self, **changes)


@technique(renames=True, paper="arXiv:1405.3866")
def spatial_svd(net: nn.Module, config: SpatialSvd, context: Context) -> nn.Module:
    """Replace kernels by vertical ones to few channels, and horizontal ones to all outputs.

    The matrix of (output, column) by (input, row) is cut to a rank, which is the number of channels
    between the two. Stride, padding and dilation are split by direction.

    Raises:
        UnfitError: no convolution gets cheaper on the target; a share cannot be reached; a rank
            does not fit: names the nearest that does.

    Source:
        Jaderberg et al., arXiv:1405.3866, section 2.2, scheme 2; by SVD, which is its exact least
        squares solution (Tai et al., arXiv:1511.06067), in place of their iteration.
    """

    def propose(site: Site, moment: Tensor | None) -> Sequence[Candidate] | str:
        del moment
        return _candidates(site, config)

    return decompose(
        net, config, context, propose, kinds=(nn.Conv2d,), fixed=config.rank is not None
    )


def _candidates(site: Site, config: SpatialSvd) -> Sequence[Candidate] | str:
    part = site.part
    if 1 in part.kernel:
        return "its kernel has no two directions"
    high, wide = part.kernel
    # (G, O, I, H, W) -> (G, O * W, I * H)
    grouped = by_group(site)
    matrix_GRC = grouped.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    values = torch.stack([singular_values(m) for m in matrix_GRC])
    lost = losses(values.square().sum(0).sqrt())
    made = []
    for r in ranks(site, min(matrix_GRC.shape[1:]), config.rank, config.multiple):
        parts = _parts(part, r)
        if config.rank is None and parameters_of(parts) >= part.parameters:
            break

        def weights(r: int = r) -> Sequence[Tensor]:
            pairs = [svd_factors(m, r) for m in matrix_GRC]
            first = torch.cat([right.view(r, -1, high, 1) for _, right in pairs])
            last = torch.cat([left.view(-1, wide, r).mT[:, :, None] for left, _ in pairs])
            return first, last

        made.append(Candidate(rank=(r,), loss=float(lost[r]), parts=parts, weights=weights))
    return made


def _parts(part: Part, rank: int) -> tuple[Part, ...]:
    middle = part.groups * rank
    padding = part.padding if isinstance(part.padding, str) else None

    def along(dim: int) -> dict[str, tuple[int, ...]]:
        """Keep a setting in one direction; the other's is that of a kernel of 1."""
        own = {"kernel": part.kernel, "stride": part.stride, "dilation": part.dilation}
        made: dict[str, tuple[int, ...]] = {
            n: (v[0], 1) if dim == 0 else (1, v[1]) for n, v in own.items()
        }
        if not isinstance(part.padding, str):
            made["padding"] = (part.padding[0], 0) if dim == 0 else (0, part.padding[1])
        return made

    first, last = (
        Part(
            inputs=part.inputs if dim == 0 else middle,
            outputs=middle if dim == 0 else part.outputs,
            groups=part.groups,
            padding_mode=part.padding_mode,
            **{"padding": padding, **along(dim)},  # type: ignore[arg-type]  # text or numbers
        )
        for dim in (0, 1)
    )
    return first, last
