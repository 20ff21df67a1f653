"""CP: a convolution becomes 1x1, one depthwise kernel for each direction, and 1x1."""

import math
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
from tersor.ops import kruskal
from tersor.ops.parts import Part, parameters_of, pointwise

_TRIED = (0.1, 0.2, 0.4, 0.7)
"""Ranks that are looked at, as shares of the one that has as many weights as the layer."""


@dataclass(frozen=True, kw_only=True)
class Cp:
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
    """Number of terms of every layer."""
    multiple: int = 4
    """Ranks are multiples of it, as vector units like them; one that you give is taken as it is."""
    convert: Literal["faster", "all"] = "faster"
    """faster: layers that get faster, timed on the target; all: every one, for another machine."""
    layers: Layers = Layers()
    """Which convolutions."""

    def __post_init__(self) -> None:
        check(self, rank=self.rank)

    def weaker(self) -> "Cp | None":
        """Return settings that change less; None where hardly anything would."""
        changes = None if self.rank is not None else weaker(self)
        return None if changes is None else replace(self, **changes)


@technique(renames=True, paper="arXiv:1412.6553")
def cp(net: nn.Module, config: Cp, context: Context) -> nn.Module:
    """Replace kernels by sums of products of one vector for each mode.

    The factors are found for a handful of ranks by alternating least squares, kept from diverging
    (`ops.kruskal`). The rank is the number of channels of the depthwise kernels in the middle,
    which runtimes compute at low efficiency: the measured time decides, not multiplications.

    Raises:
        UnfitError: no convolution gets cheaper on the target; a share cannot be reached; a rank
            does not fit: names the nearest that does.

    Source:
        Lebedev et al., arXiv:1412.6553, section 3; alternating least squares with a proximal term
        in place of their nonlinear least squares.
    """

    def propose(site: Site, moment: Tensor | None) -> Sequence[Candidate] | str:
        del moment
        return _candidates(site, config, context.seed)

    return decompose(
        net,
        config,
        context,
        propose,
        kinds=(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        fixed=config.rank is not None,
    )


def _candidates(site: Site, config: Cp, seed: int) -> Sequence[Candidate] | str:
    part = site.part
    if set(part.kernel) == {1}:
        return "a 1x1 kernel has no directions; svd factors it"
    long = [d for d, size in enumerate(part.kernel) if size > 1]
    tensors = by_group(site)
    tensors = tensors.reshape(*tensors.shape[:3], *(part.kernel[d] for d in long))
    sizes = tensors.shape[1:]
    full = math.prod(sizes) // max(sizes)
    made = []
    for r in _ranks(site, full, sizes, config):
        parts = _parts(part, long, r)
        if config.rank is None and parameters_of(parts) >= part.parameters:
            continue
        found = [kruskal.cp(tensor, r, seed) for tensor in tensors]
        energy = [float(tensor.square().sum()) for tensor in tensors]
        lost = sum(e * loss for e, (_, loss) in zip(energy, found, strict=True))
        factors = [own for own, _ in found]

        def weights(factors: list[list[Tensor]] = factors) -> Sequence[Tensor]:
            return _weights(factors, part, long)

        loss = lost / max(sum(energy), 1e-300)
        made.append(Candidate(rank=(r,), loss=loss, parts=parts, weights=weights))
    return made


def _ranks(site: Site, full: int, sizes: Sequence[int], config: Cp) -> Sequence[int]:
    if config.rank is not None:
        return ranks(site, full, config.rank, config.multiple)
    even = math.prod(sizes) / sum(sizes)
    tried = {int(share * even) // config.multiple * config.multiple for share in _TRIED}
    return sorted(r for r in tried if 0 < r <= full)


def _parts(part: Part, long: Sequence[int], rank: int) -> tuple[Part, ...]:
    groups, dimensions = part.groups, len(part.kernel)
    middle = groups * rank
    made = [pointwise(part.inputs, middle, dimensions, groups)]
    for direction in long:
        # directions in which the kernel is 1 keep stride and padding: the first one takes them
        own = {direction, *(set(range(dimensions)) - set(long) if direction == long[0] else ())}

        def only(
            values: tuple[int, ...], own: set[int] = own, *, other: int = 1
        ) -> tuple[int, ...]:
            return tuple(v if d in own else other for d, v in enumerate(values))

        text = isinstance(part.padding, str)
        made.append(
            Part(
                inputs=middle,
                outputs=middle,
                kernel=only(part.kernel),
                stride=only(part.stride),
                padding=part.padding if text else only(tuple(part.padding), other=0),  # type: ignore[arg-type]  # numbers
                dilation=only(part.dilation),
                groups=middle,
                padding_mode=part.padding_mode,
            )
        )
    return (*made, pointwise(middle, part.outputs, dimensions, groups))


def _weights(factors: Sequence[Sequence[Tensor]], part: Part, long: Sequence[int]) -> list[Tensor]:
    """Stack the factors of all groups: (R, I), one kernel of (R, 1) for each direction, (O, R)."""
    ones = [1] * len(part.kernel)
    first = torch.cat([own[1].mT for own in factors])
    made = [first.view(*first.shape, *ones)]
    for i, direction in enumerate(long):
        kernel = torch.cat([own[2 + i].mT for own in factors])
        shape = [kernel.shape[1] if d == direction else 1 for d in range(len(ones))]
        made.append(kernel.reshape(len(kernel), 1, *shape))
    last = torch.cat([own[0] for own in factors])
    return [*made, last.view(*last.shape, *ones)]
