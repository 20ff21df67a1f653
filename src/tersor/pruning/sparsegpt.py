"""SparseGPT: prune weights one column at a time, and let the others make up for each."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import StepError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import masks
from tersor.ops.hessian import (
    accumulate_hessian,
    damped,
    dead_inputs,
    inverse_factor,
    squared_error,
)
from tersor.ops.matrices import matrices
from tersor.ops.patterns import (
    Pattern,
    check_amount,
    fitting,
    keep_n_of_m,
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

# G groups of a layer, R rows: outputs, C columns: inputs (ops/matrices.py), B columns of a block

_DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Sparsegpt:
    """Settings of SparseGPT: `sparsity` or `pattern`; `sparsity: 0.5` when neither is given."""

    sparsity: float | None = None
    """Share of the weights of each block of columns to set to zero, in [0, 1)."""
    pattern: str | None = None
    """"N:M", such as "2:4": N of every M neighboring input channels stay."""
    block_size: int = 128
    """Columns whose mask is chosen together; a multiple of M."""
    damp: float = 0.01
    """Share of the Hessian's mean diagonal that is added to it; more is safer, and less exact."""
    samples: int = 512
    """Calibration samples; fewer where activations are very large."""
    layers: Layers = Layers()
    """Linear layers and convolutions to prune."""

    def __post_init__(self) -> None:
        check_amount(self.sparsity, self.pattern)
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.pattern is not None and self.block_size % parse_pattern(self.pattern)[1]:
            m = parse_pattern(self.pattern)[1]
            raise ValueError(
                f"block_size must be a multiple of the {m} in pattern {self.pattern!r}, got "
                f"{self.block_size}"
            )
        if not self.damp > 0:
            raise ValueError(f"damp must be above 0, got {self.damp}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def weaker(self) -> "Sparsegpt | None":
        """Return settings with fewer zeros; None when hardly any would be left."""
        sparsity = _DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        less: Any = weaker_amount(sparsity, self.pattern)
        return None if less is None else replace(self, **less)


@technique(needs=("calibration",), paper="arXiv:2301.00774")
def sparsegpt(net: nn.Module, config: Sparsegpt, context: Context) -> nn.Module:
    """Prune each layer so that its outputs on the calibration data change least.

    Columns go from left to right. A weight's score is the error that setting it to zero causes
    once the columns to its right have been adjusted for it in the best way (optimal brain
    surgeon); they then are. Inputs are those of the network whose earlier layers are pruned
    already. Zeros are kept zero by the training of the same stage.

    Raises:
        DataError: no calibration data, or batches that do not fit or give NaN.
        RecipeError, StepError: `layers` fits nothing; a Hessian cannot be inverted.
        UnfitError: M does not divide a layer's inputs, or nothing can be pruned.
        The network is unchanged in all cases.

    Source:
        Frantar and Alistarh, arXiv:2301.00774, algorithm 1; N:M: section 3.4. The paper goes block
        by block, here it is layer by layer; convolutions are taken as matrices over their unfolded
        inputs. Each block loses its share exactly, over all of its rows.
    """
    graph = open_layers(net.eval(), context.inputs)
    chosen, left = one_by_one(graph, config.layers)
    pattern = None if config.pattern is None else parse_pattern(config.pattern)
    if pattern is not None:
        chosen, unfit = fitting(chosen, pattern, "sparsegpt")
        left |= unfit
    names = list(chosen)
    batches = drawn(graph, names, context.data.calibration, context.inputs, config.samples)
    errors: dict[str, float] = {}

    def prune(stop: Stop) -> tuple[Tensor, Tensor]:
        weight_GRC = matrices(stop.layer).float()
        groups, _, columns = weight_GRC.shape
        hessian_GCC = stop.gathered(torch.zeros(groups, columns, columns), accumulate_hessian)
        try:
            factor_GCC = inverse_factor(damped(hessian_GCC, config.damp)).float()
        except StepError as error:
            raise StepError(f"layer {stop.name!r}: {error}") from error
        alive_G1C = ~dead_inputs(hessian_GCC).unsqueeze(1)
        made_GRC, keep_GRC = _solve(weight_GRC * alive_G1C, factor_GCC, config, pattern)
        whole = squared_error(hessian_GCC, weight_GRC)
        lost = squared_error(hessian_GCC, made_GRC - weight_GRC)
        errors[stop.name] = lost / whole if whole else 0.0
        return made_GRC, keep_GRC

    stops = context.track(layer_by_layer(graph, names, batches), "pruning layers", len(names))
    prune_in_turn(net, graph, stops, prune)
    context.record(
        samples=num_samples(batches, context.inputs),
        **masks.facts(graph, chosen),
        relative_squared_errors=errors,
        left=left,
    )
    return net


def _solve(
    weight_GRC: Tensor, factor_GCC: Tensor, config: Sparsegpt, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """Return the pruned and adjusted weights, and the mask of those that stay."""
    weight_GRC = weight_GRC.clone()
    keep_GRC = torch.ones_like(weight_GRC, dtype=torch.bool)
    pivots_GC = factor_GCC.diagonal(dim1=-2, dim2=-1)
    columns = weight_GRC.shape[-1]
    for start in range(0, columns, config.block_size):
        stop = min(start + config.block_size, columns)
        block_GRB = weight_GRC[..., start:stop]
        factor_GBB = factor_GCC[:, start:stop, start:stop]
        pivot_G1B = pivots_GC[:, start:stop].unsqueeze(1)
        if pattern is None:
            keep_GRC[..., start:stop] = _keep_block(block_GRB / pivot_G1B, config)
        error_GRB = torch.zeros_like(block_GRB)
        for i in range(stop - start):
            if pattern is not None and i % pattern[1] == 0:
                # chosen here, not before: earlier columns have changed these weights
                near = slice(i, i + pattern[1])
                score = (block_GRB[..., near] / pivot_G1B[..., near]).square()
                keep_GRC[..., start:stop][..., near] = keep_n_of_m(score, pattern)
            gone_GR = ~keep_GRC[..., start + i]
            error_GR = block_GRB[..., i] * gone_GR / pivot_G1B[..., i]
            block_GRB[..., i:] -= error_GR.unsqueeze(-1) * factor_GBB[:, i : i + 1, i:]
            block_GRB[..., i].masked_fill_(gone_GR, 0.0)
            error_GRB[..., i] = error_GR
        # the columns after the block are adjusted once for all of it
        weight_GRC[..., stop:] -= error_GRB @ factor_GCC[:, start:stop, stop:]
    return weight_GRC, keep_GRC


def _keep_block(ratio_GRB: Tensor, config: Sparsegpt) -> Tensor:
    """Choose over all rows of a block at once: rows may lose different shares."""
    sparsity = _DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
    score = ratio_GRB.square().flatten(1)
    gone = score.argsort(dim=-1, stable=True)[:, : masks.num_dropped(sparsity, score.shape[-1])]
    keep = torch.ones_like(score, dtype=torch.bool).scatter_(-1, gone, False)
    return keep.view(ratio_GRB.shape)
