"""Slimming: train batch norm scales towards zero, then cut the channels that they silence."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.groups import Group
from tersor.ops.importance import norm_scale
from tersor.ops.losses import LABELS
from tersor.ops.recalibrate import recalibrate
from tersor.ops.selection import (
    at_ratio,
    check_something,
    coupled,
    free,
    score,
    smaller,
    told,
)


@dataclass(frozen=True, kw_only=True)
class Slimming:
    """Settings of network slimming."""

    ratio: float = 0.5
    """Share of the channels to remove, of all groups together, in [0, 1)."""
    strength: float = 1e-4
    """Weight of the sum of absolute batch norm scales in the loss."""
    epochs: float = 1.0
    """Passes over the training data with that loss; needs labels."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""
    multiple: int = 8
    """What stays of a group is rounded up to a multiple of this."""
    layers: Layers = Layers()
    """Layers whose output channels may go."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")

    def weaker(self) -> "Slimming | None":
        """Remove about 30 % less; None when hardly anything would go."""
        ratio = round(0.7 * self.ratio, 3)
        return replace(self, ratio=ratio) if ratio > 0.05 else None


@technique(needs=("train", "labels"), paper="arXiv:1708.06519")
def slimming(net: nn.Module, config: Slimming, context: Context) -> nn.Module:
    """Add strength * sum of |batch norm scale| to the loss, train, and cut the smallest scales.

    Channels are ranked over all groups by their scale, as trained; coupled layers are cut together,
    with the mean of their scales. Belongs in one stage with the recovery after it:
    `[slimming, finetune]`. Where there is calibration data, statistics are estimated anew.

    Raises:
        DataError: no training data, or no labels.
        UnfitError: no channels that batch norms scale can be cut.
        StepError: `layers` fits nothing; loss or gradient is not finite.

    Source:
        Liu et al., arXiv:1708.06519, equation 1; the subgradient at zero is autograd's, zero.
    """
    if context.data.train is None:
        raise DataError("slimming needs training data with labels; give `train` batches")
    names = _scaled(net, config, context)
    # the trainer may move or copy the network; scales are found by name
    scales = [f"{name}.weight" for name in names]

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        if LABELS not in batch and context.data.loss is None:
            raise DataError("slimming: batches have no labels; add them, or set epochs: 0")
        parameters = dict(net.named_parameters())
        return (
            context.loss(net, batch)
            + config.strength * torch.stack([parameters[name].abs().sum() for name in scales]).sum()
        )

    before = _spread(net, names)
    if config.epochs:
        net = context.fit(
            net,
            loss,
            batches=context.data.train,
            epochs=config.epochs,
            lr=config.lr,
            seed=context.seed,
            checkpoint=context.work_dir / "slimming.safetensors",
        )
    coupling = coupled(net, context)
    groups = [g for g in free(coupling, net, config.layers) if norm_scale(net, g) is not None]
    scores = score(coupling, groups, "bn_scale", context)
    chosen = at_ratio(groups, scores, config.ratio, ranking="global", multiple=config.multiple)
    if config.ratio:
        check_something(chosen, config.multiple)
    after = _spread(net, names)
    net, removal, left = smaller(net, coupling, chosen, context)
    if removal and context.data.calibration is not None:
        context.record(recalibrated=recalibrate(net, context.data.calibration))
    gone = {group.name: len(channels) for group, channels in removal}
    context.record(
        **told(coupling, removal, left, net),
        groups={g.name: f"{g.size} -> {g.size - gone.get(g.name, 0)}" for g in groups},
        scales_before=before,
        scales_after=after,
    )
    return net


def _scaled(net: nn.Module, config: Slimming, context: Context) -> list[str]:
    """Name the batch norms whose channels may go."""
    coupling = coupled(net, context)
    groups: list[Group] = free(coupling, net, config.layers)
    layers = dict(net.named_modules())
    names = {
        name
        for group in groups
        for name in group.layers("both")
        if isinstance(layers.get(name), _BatchNorm) and layers[name].weight is not None
    }
    if not names:
        raise UnfitError(
            f"no batch norm of {type(net).__name__} scales channels that can be cut; slimming "
            "needs them, use channels instead"
        )
    return sorted(names)


def _spread(net: nn.Module, names: list[str]) -> dict[str, float]:
    """Tell how the scales lie: their tenth, half and nine tenths."""
    layers = dict(net.named_modules())
    scales = [layers[n].weight.detach().abs() for n in names]  # type: ignore[operator,union-attr]  # batch norms
    every = torch.cat(scales).float()
    return {f"{q:g}": float(every.quantile(q)) for q in (0.1, 0.5, 0.9)}
