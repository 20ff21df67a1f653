"""A layer norm from which channels were cut, that still computes what it computed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PartialLayerNorm(nn.Module):
    """Layer norm over the last dimension as if channels that are gone were there, and zero.

    Mean and variance are those of all channels, so that a cut changes nothing beside it. Zeros are
    appended and taken off again: runtimes keep their fused layer norm.

    Args:
        channels: How many are left.
        gone: How many are not.
        eps: Added to the variance.
        affine: Whether there are weight and bias.
    """

    channels: int
    gone: int
    eps: float
    affine: bool
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, gone: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.channels, self.gone, self.eps, self.affine = channels, gone, eps, affine
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {name: getattr(self, name) for name in ("channels", "gone", "eps", "affine")}

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., channels)."""
        ends = (0, self.gone)
        weight, bias = (None if t is None else F.pad(t, ends) for t in (self.weight, self.bias))
        width = self.channels + self.gone
        return F.layer_norm(F.pad(x, ends), (width,), weight, bias, self.eps)[..., : self.channels]


def without(layer: nn.LayerNorm | PartialLayerNorm, places: set[int]) -> PartialLayerNorm:
    """Return a layer norm without some of its channels; the given one stays as it is."""
    if isinstance(layer, PartialLayerNorm):
        width, gone = layer.channels, layer.gone
    else:
        width, gone = layer.normalized_shape[-1], 0
    affine = layer.weight is not None
    made = PartialLayerNorm(width - len(places), gone + len(places), layer.eps, affine)
    kept = torch.tensor([i for i in range(width) if i not in places])
    if layer.weight is not None:
        made.weight = nn.Parameter(layer.weight.detach()[kept].clone())
        # a layer norm may have a weight and no bias
        bias = torch.zeros(width) if layer.bias is None else layer.bias.detach()
        made.bias = nn.Parameter(bias.to(made.weight.dtype)[kept].clone())
    return made.train(layer.training)
