"""Lottery ticket: prune in rounds, and after each begin again with the weights that are left."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import masks, projections, weight_scores
from tersor.ops.fake_quantize import late


@dataclass(frozen=True, kw_only=True)
class LotteryTicket:
    """Settings of iterative pruning with rewinding."""

    sparsity: float = 0.9
    """Share of the weights that are zero after the last round, in [0, 1)."""
    rounds: int = 3
    """Each sets the same share of the weights that are left to zero, and trains."""
    rewind: Literal["learning_rate", "given", "initial"] = "learning_rate"
    """Where a round begins. learning_rate: at the trained weights, with the schedule anew; given:
    at the weights of the network as it came; initial: at new random weights (their own layers'
    initialization), trained for `early` epochs."""
    early: float = 0.0
    """With `rewind: initial`, passes over the training data before the weights that rounds go back
    to; 0 are the random weights themselves."""
    scope: masks.Scope = "layer"
    """layer: the same share of each; global: one threshold for all of them together."""
    epochs: float = 1.0
    """Passes over the training data in each round, and with `rewind: initial` before the first."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""
    layers: Layers = Layers()
    """Linear layers and convolutions that are pruned."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.early < 0:
            raise ValueError(f"early must not be negative, got {self.early}")
        if self.early and self.rewind != "initial":
            raise ValueError(f"early is for rewind: initial, got rewind: {self.rewind}")
        if self.epochs <= 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def weaker(self) -> "LotteryTicket | None":
        """Return settings that leave twice the weights; None when hardly anything would go."""
        sparsity = masks.weaker(self.sparsity)
        return None if sparsity is None else replace(self, sparsity=sparsity)

    def after(self, number: int) -> float:
        """Return the sparsity after a round, 1 to `rounds`: the same share goes in each."""
        if number == self.rounds:
            return self.sparsity
        share: float = (1 - self.sparsity) ** (number / self.rounds)
        return 1 - share


@technique(needs=("train", "labels"), paper="arXiv:1803.03635")
def lottery_ticket(net: nn.Module, config: LotteryTicket, context: Context) -> nn.Module:
    """Train, prune the smallest weights, rewind the others, and so on; the last round's is kept.

    What is rewound are all parameters and statistics; masks stay. With `rewind: initial` the
    knowledge of the network that came in is not used, only its architecture.

    Raises:
        DataError: no training data.
        RecipeError: a pattern matches no layer.
        StepError: all layers are excluded; loss or gradient is not finite.
        UnfitError: no layer has float weights, or one would lose them all; a layer cannot be
            initialized anew.

    Source:
        Frankle and Carbin, arXiv:1803.03635; rewinding to an early point: Frankle et al.,
        arXiv:1912.05671, of the learning rate: Renda et al., arXiv:2003.02389. Every round trains
        `epochs` with the whole schedule, where the papers go on from the early point's.
    """
    if context.data.train is None:
        raise DataError("lottery_ticket needs training data; give `train` batches with labels")
    chosen, left = masks.prunable(net, config.layers)
    sizes = {name: torch.rand(_weight(layer).shape) for name, layer in chosen.items()}
    masks.choose(sizes, config.sparsity, "layer")
    if config.rewind == "initial":
        before = {name: _weight(layer).detach() != 0 for name, layer in chosen.items()}
        _initialize(net, context.seed)
        masks.hold(net, before)
        if config.early:
            net = _train(net, config.early, "early", config, context)
    point = copy.deepcopy(_state(net)) if config.rewind != "learning_rate" else None
    if config.rewind == "initial":
        net = _train(net, config.epochs, "dense", config, context)
    for number in range(1, config.rounds + 1):
        layers = {name: projections.layer(net, name) for name in chosen}
        scores = weight_scores.magnitude(layers)
        keep = masks.choose(scores, config.after(number), config.scope)
        if point is not None:
            _rewind(net, point)
        masks.hold(net, keep)
        net = _train(net, config.epochs, f"{number}", config, context)
    layers = {name: projections.layer(net, name) for name in chosen}
    context.record(
        sparsities=[round(config.after(n), 5) for n in range(1, config.rounds + 1)],
        epochs=config.epochs * (config.rounds + (config.rewind == "initial")) + config.early,
        **masks.facts(net, layers),
        left=left,
    )
    return net


def _train(
    net: nn.Module, epochs: float, name: str, config: LotteryTicket, context: Context
) -> nn.Module:
    assert context.data.train is not None
    return context.fit(
        net,
        context.loss,
        batches=context.data.train,
        epochs=epochs,
        lr=config.lr,
        seed=context.seed,
        checkpoint=context.work_dir / f"lottery_ticket-{name}.safetensors",
        on_step=late(net),
    )


def _initialize(net: nn.Module, seed: int) -> None:
    """Draw all weights anew, as the layers' own classes do."""
    modules = dict(net.named_modules())
    fixed = [
        name
        for name, layer in modules.items()
        if any(True for _ in layer.parameters(recurse=False))
        and not isinstance(layer, nn.MultiheadAttention)
        and not hasattr(layer, "reset_parameters")
    ]
    if fixed:
        kind = type(modules[fixed[0]]).__name__
        raise UnfitError(
            f"{kind} {fixed[0] or 'the network itself'!r} has parameters of its own but no "
            "reset_parameters(), so it cannot be initialized anew; use rewind: learning_rate or "
            "given, or write that method"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attentions = [m for m in modules.values() if isinstance(m, nn.MultiheadAttention)]
        for layer in modules.values():
            if hasattr(layer, "reset_parameters"):
                reset: Any = layer.reset_parameters
                reset()
        for attention in attentions:  # after its linear layer, whose bias it sets to zero
            attention._reset_parameters()


def _state(net: nn.Module) -> dict[str, Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


def _rewind(net: nn.Module, point: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _state(net).items():
            tensor.copy_(point[name])


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight
