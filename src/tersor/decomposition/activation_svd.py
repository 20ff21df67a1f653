"""Activation-aware SVD: the factors of each layer that change its outputs least on your data."""

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
class ActivationSvd:
    """Settings: a share or `rank`; `macs: 0.7` if none is given."""

    energy: float | None = None
    """Keep at least this share of each layer's squared outputs on the samples, in (0, 1]."""
    macs: float | None = None
    """Leave this share of the network's multiply-accumulates, in (0, 1), where it costs least."""
    parameters: float | None = None
    """Leave this share of the network's parameters, in (0, 1), where it costs least."""
    latency: float | None = None
    """Leave this share of the latency, measured on the target, in (0, 1)."""
    rank: int | None = None
    """The rank of every layer."""
    samples: int = 256
    """Calibration samples, without labels."""
    multiple: int = 4
    """Ranks are multiples of it, as vector units like them; one that you give is taken as it is."""
    convert: Literal["faster", "all"] = "faster"
    """faster: layers that get faster, timed on the target; all: every one, for another machine."""
    layers: Layers = Layers()
    """Which layers."""

    def __post_init__(self) -> None:
        check(self, rank=self.rank)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def weaker(self) -> "ActivationSvd | None":
        """Return settings that change less; None where hardly anything would."""
        changes = None if self.rank is not None else weaker(self)
        return None if changes is None else replace(self, **changes)


@technique(needs=("calibration",), renames=True, paper="arXiv:2403.07378")
def activation_svd(net: nn.Module, config: ActivationSvd, context: Context) -> nn.Module:
    """Replace W by left @ right so that W x changes least over the inputs x of calibration data.

    With L L^T the second moment of the inputs, the singular values of W L are exactly the losses of
    outputs, so that ranks are comparable over layers. Layers are as in `svd`.

    Raises:
        DataError: no calibration data, or a batch that does not fit.
        UnfitError: as `svd`.

    Source:
        Wang et al., SVD-LLM, arXiv:2403.07378, section 3.1 (truncation-aware whitening); the inputs
        are those of the network as it came. A hundredth of a percent of the mean of its diagonal is
        added to the moment's, so that inputs that were never seen keep their weights.
    """

    def propose(site: Site, moment: Tensor | None) -> Sequence[Candidate]:
        return matrix_candidates(site, moment, rank=config.rank, multiple=config.multiple)

    return decompose(
        net,
        config,
        context,
        propose,
        kinds=PLAIN,
        fixed=config.rank is not None,
        samples=config.samples,
    )
