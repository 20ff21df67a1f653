"""Wanda: prune weights by |weight| x norm of their input, without training."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import masks
from tersor.ops.hessian import accumulate_squares
from tersor.ops.matrices import matrices
from tersor.ops.patterns import (
    check_amount,
    fitting,
    keep_highest,
    parse_pattern,
    weaker_amount,
)
from tersor.ops.sequential import (
    Stop,
    drawn,
    layer_by_layer,
    num_samples,
    one_by_one,
    open_layers,
    prune_in_turn,
)

# G groups of a layer, R rows: outputs, C columns: inputs (ops/matrices.py)

_DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Settings of Wanda: `sparsity` or `pattern`; `sparsity: 0.5` when neither is given."""

    sparsity: float | None = None
    """Share of the weights of each output to set to zero, in [0, 1)."""
    pattern: str | None = None
    """"N:M", such as "2:4": N of every M neighboring input channels stay."""
    samples: int = 512
    """Calibration samples; fewer where activations are very large."""
    layers: Layers = Layers()
    """Linear layers and convolutions to prune."""

    def __post_init__(self) -> None:
        check_amount(self.sparsity, self.pattern)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def weaker(self) -> "Wanda | None":
        """Return settings with fewer zeros; None when hardly any would be left."""
        sparsity = _DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        less: Any = weaker_amount(sparsity, self.pattern)
        return None if less is None else replace(self, **less)


@technique(needs=("calibration",), paper="arXiv:2306.11695")
def wanda(net: nn.Module, config: Wanda, context: Context) -> nn.Module:
    """Set the weights of each output to zero that matter least for what comes in.

    A weight's score is its size times the norm of the input that it is multiplied with, over all
    tokens or places of the calibration data. Weights are compared within an output, or within M
    neighboring inputs; those that stay are not changed. A layer's inputs are those of the network
    whose earlier layers are pruned already. Zeros are kept zero by the training of the same stage.

    Raises:
        DataError: no calibration data, or batches that do not fit or give NaN.
        RecipeError, StepError: `layers` fits nothing. The network is unchanged.
        UnfitError: M does not divide a layer's inputs, or nothing can be pruned.

    Source:
        Sun et al., arXiv:2306.11695, equation 1 and algorithm 1. The paper prunes block by block,
        here it is layer by layer; convolutions are taken as matrices over their unfolded inputs.
    """
    graph = open_layers(net.eval(), context.inputs)
    chosen, left = one_by_one(graph, config.layers)
    pattern = None if config.pattern is None else parse_pattern(config.pattern)
    if pattern is not None:
        chosen, unfit = fitting(chosen, pattern, "wanda")
        left |= unfit
    sparsity = _DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
    names = list(chosen)
    batches = drawn(graph, names, context.data.calibration, context.inputs, config.samples)

    def prune(stop: Stop) -> tuple[Tensor, Tensor]:
        weight_GRC = matrices(stop.layer)
        squares_GC = stop.gathered(torch.zeros(weight_GRC[:, 0].shape), accumulate_squares)
        score_GRC = weight_GRC.float().abs() * squares_GC.sqrt().unsqueeze(1)
        return weight_GRC, keep_highest(score_GRC, sparsity, pattern)

    stops = context.track(layer_by_layer(graph, names, batches), "pruning layers", len(names))
    prune_in_turn(net, graph, stops, prune)
    context.record(
        samples=num_samples(batches, context.inputs),
        **masks.facts(graph, chosen),
        left=left,
    )
    return net
