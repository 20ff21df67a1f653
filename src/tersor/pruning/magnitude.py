"""Magnitude: set the least important weights to zero, one by one and at once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import DataError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import masks, weight_scores


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Settings of unstructured pruning in one shot."""

    sparsity: float = 0.5
    """Share of the weights to set to zero, in [0, 1)."""
    importance: Literal["l1", "l2", "taylor", "random"] = "l1"
    """Small weights go (l1 and l2 order single weights alike), or those with a small effect on the
    loss (taylor, needs calibration data with labels), or any (random, to compare with)."""
    scope: masks.Scope = "layer"
    """layer: the same share of each; global: the least important of all layers together."""
    layers: Layers = Layers()
    """Linear layers and convolutions that are pruned."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")

    def weaker(self) -> "Magnitude | None":
        """Return settings that leave twice the weights; None when hardly anything would go."""
        sparsity = masks.weaker(self.sparsity)
        return None if sparsity is None else replace(self, sparsity=sparsity)


@technique(paper="arXiv:1506.02626")
def magnitude(net: nn.Module, config: Magnitude, context: Context) -> nn.Module:
    """Set weights to zero; tensors keep their shapes, and later training leaves the zeros alone.

    Biases and norms stay. Weights that are zero already count, and a weight that several layers
    share is pruned once. Zeros make a file smaller only when it is zipped, a network faster only on
    a runtime that skips them.

    Raises:
        DataError: taylor without calibration data or labels.
        RecipeError: a pattern matches no layer.
        StepError: all layers are excluded; weights, loss or gradients are not finite.
        UnfitError: no layer has float weights, or one would lose them all. The network is unchanged
            in all cases.

    Source:
        Han et al., arXiv:1506.02626, section 3; taylor: Molchanov et al., arXiv:1611.06440.
    """
    net.eval()
    chosen, left = masks.prunable(net, config.layers)
    scores = _scores(net, chosen, config, context)
    keep = masks.choose(scores, config.sparsity, config.scope)
    masks.hold(net, keep)
    context.record(**masks.facts(net, chosen), left=left)
    return net


def _scores(
    net: nn.Module, chosen: Mapping[str, nn.Module], config: Magnitude, context: Context
) -> dict[str, Tensor]:
    if config.importance == "random":
        return weight_scores.random(chosen, context.seed)
    if config.importance != "taylor":
        return weight_scores.magnitude(chosen)
    if context.data.calibration is None:
        raise DataError("magnitude: importance taylor needs calibration data with labels")
    batches = context.track(context.data.calibration, "scoring weights")
    return weight_scores.taylor(net, chosen, context.loss, batches)
