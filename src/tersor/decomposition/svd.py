"""SVD: each linear layer or convolution becomes two of a lower rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.decomposition._choice import Candidate, decompose
from tersor.decomposition._layers import PLAIN, Site
from tersor.decomposition._matrix import matrix_candidates
from tersor.decomposition._settings import check, weaker


@dataclass(frozen=True, kw_only=True)
class Svd:
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

    def weaker(self) -> "Svd | None":
        """Return settings that change less; None where hardly anything would."""
        changes = None if self.rank is not None else weaker(self)
        return None if changes is None else replace(self, **changes)


@technique(renames=True, paper="arXiv:1404.0736")
def svd(net: nn.Module, config: Svd, context: Context) -> nn.Module:
    """Replace W by left @ right with fewer numbers: the nearest weights of that rank.

    A convolution is the matrix of its outputs by its inputs at all kernel positions: a convolution
    of that kernel with few outputs, and a 1x1 convolution to all of them. Groups are factored each
    on its own, with the same rank. Which layers, and how far: `_choice.decompose`.

    Raises:
        UnfitError: no layer gets cheaper on the target; a share cannot be reached; a rank that
            does not fit, with the nearest one that does.

    Source:
        Denton et al., arXiv:1404.0736, section 3.2 (monochromatic and full-rank matrix forms); we
        choose ranks over all layers together and time the result.
    """

    def propose(site: Site, moment: Tensor | None) -> Sequence[Candidate]:
        del moment
        return matrix_candidates(site, None, rank=config.rank, multiple=config.multiple)

    return decompose(net, config, context, propose, kinds=PLAIN, fixed=config.rank is not None)
