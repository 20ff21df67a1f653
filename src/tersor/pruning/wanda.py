"""Wanda: prune weights by |weight| x norm of their input, without training."""

from dataclasses import dataclass, replace
from typing import Any, Literal

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
    score: Literal["wanda", "ria"] = "wanda"
    """wanda: size of the weight times norm of its input. ria: its share of its row's and column's
    sizes, times the root of that norm; what a channel is large by in all weights counts less."""
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
    tokens or places of the calibration data; or with `score: ria` its relative importance and the
    root of that norm. Weights are compared within an output, or within M
    neighboring inputs; those that stay are not changed. A layer's inputs are those of the network
    whose earlier layers are pruned already. Zeros are kept zero by the training of the same stage.

    Raises:
        DataError: no calibration data, or batches that do not fit or give NaN.
        RecipeError, StepError: `layers` fits nothing. The network is unchanged.
        UnfitError: M does not divide a layer's inputs, or nothing can be pruned.

    Source:
        Sun et al., arXiv:2306.11695, equation 1 and algorithm 1. ria: Zhang et al., "Plug-and-Play:
        an efficient post-training pruning method for large language models", ICLR 2024, equation 4
        with a = 0.5; without its permutation of channels. The paper of Wanda prunes block by block,
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
        score_GRC = _score(config.score, weight_GRC.float().abs(), squares_GC.sqrt().unsqueeze(1))
        return weight_GRC, keep_highest(score_GRC, sparsity, pattern)

    stops = context.track(layer_by_layer(graph, names, batches), "pruning layers", len(names))
    prune_in_turn(net, graph, stops, prune)
    context.record(
        samples=num_samples(batches, context.inputs),
        **masks.facts(graph, chosen),
        left=left,
    )
    return net


def _score(name: Literal["wanda", "ria"], size_GRC: Tensor, norm_G1C: Tensor) -> Tensor:
    if name == "wanda":
        return size_GRC * norm_G1C
    least = torch.finfo(size_GRC.dtype).tiny  # rows and columns may be zero already
    of_row = size_GRC / size_GRC.sum(dim=2, keepdim=True).clamp(min=least)
    of_column = size_GRC / size_GRC.sum(dim=1, keepdim=True).clamp(min=least)
    return (of_row + of_column) * norm_G1C.sqrt()
