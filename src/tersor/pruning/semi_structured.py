"""Semi-structured: zeros in N of every M input channels, or in whole blocks of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import masks, weight_scores
from tersor.ops.capture import capture
from tersor.ops.groups import find_groups
from tersor.ops.matrices import input_channels, matrices, unmatrices
from tersor.ops.patterns import Pattern, fitting, keep_n_of_m, parse_pattern, weaker_amount
from tersor.ops.reorder import reorder
from tersor.ops.sequential import check_finite, hold_open, open_layers

# G groups of a layer, R rows: outputs, C columns: inputs (ops/matrices.py)

_DEFAULT_PATTERN = "2:4"
_DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class SemiStructured:
    """Settings of semi-structured pruning: `pattern` or `block`; `pattern: "2:4"` when neither."""

    pattern: str | None = None
    """"N:M": N of every M neighboring input channels stay."""
    block: tuple[int, int] | None = None
    """Rows (outputs) and columns (input channels) of blocks that stay or go as a whole."""
    sparsity: float | None = None
    """Share of each layer's blocks to set to zero, in [0, 1); 0.5 when not given."""
    importance: Literal["l1", "l2", "taylor"] = "l1"
    """What goes: small weights, blocks of a small L1 or L2 norm, or (taylor, needs calibration data
    with labels) weights with a small effect on the loss."""
    permute: bool = True
    """Look for an order of input channels in which the pattern keeps more."""
    escapes: int = 10
    """How often that search starts again from elsewhere."""
    layers: Layers = Layers()
    """Linear layers and convolutions to prune."""

    def __post_init__(self) -> None:
        if self.pattern is not None and self.block is not None:
            raise ValueError("give pattern or block, not both")
        if self.pattern is not None:
            parse_pattern(self.pattern)
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ValueError(
                f"block must be [rows, columns], each at least 1, got {list(self.block)}"
            )
        if self.sparsity is not None and self.block is None:
            raise ValueError(
                "sparsity is the share of blocks, give block with it; what a pattern leaves is "
                "in its numbers"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.escapes < 0:
            raise ValueError(f"escapes must be at least 0, got {self.escapes}")

    def weaker(self) -> "SemiStructured | None":
        """Return settings with fewer zeros; None when hardly any would be left."""
        if self.block is not None:
            sparsity = _DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
            less: Any = weaker_amount(sparsity, None)
        else:
            less = weaker_amount(0.0, self.pattern or _DEFAULT_PATTERN)
        return None if less is None else replace(self, **less)


@technique(paper="arXiv:2104.08378")
def semi_structured(net: nn.Module, config: SemiStructured, context: Context) -> nn.Module:
    """Set weights to zero in a pattern that hardware and kernels can skip.

    With `pattern`, N of every M neighboring input channels stay, for each output and, in a
    convolution, each kernel position. Before that, channels are put into an order in which more is
    kept: the layers that make them are permuted, too, so the network computes the same, which is
    checked on the example. Channels that cannot be moved keep their order, and the report says
    why. With `block`, whole blocks of each layer's matrix go. Zeros are kept zero by the training
    of the same stage.

    Raises:
        DataError: taylor without calibration data or labels.
        ModelError: the network cannot be captured.
        RecipeError, StepError: `layers` fits nothing; a weight or gradient is not finite.
        UnfitError: the pattern or the blocks do not divide a layer. The network is unchanged in
            all cases.

    Source:
        Mishra et al., arXiv:2104.08378, section 3; permutations: Pool and Yu, NeurIPS 2021. The
        search takes any N:M, and scores other than magnitude.
    """
    graph = open_layers(net.eval(), context.inputs)
    chosen, left = masks.prunable(graph, config.layers)
    check_finite(chosen)
    facts: dict[str, Any] = {}
    if config.block is None:
        pattern = parse_pattern(config.pattern or _DEFAULT_PATTERN)
        chosen, unfit = fitting(chosen, pattern, "semi_structured")
        left |= unfit
        scores = _scores(graph, chosen, config, context)
        if config.permute:
            facts = _permute(net, scores, pattern, config, context)
            scores = _scores(graph, chosen, config, context)
        keep = {
            name: unmatrices(layer, keep_n_of_m(matrices(layer, scores[name]), pattern))
            for name, layer in chosen.items()
        }
    else:
        _check_blocks(chosen, config.block)
        scores = _scores(graph, chosen, config, context)
        keep = {
            name: unmatrices(layer, _keep_blocks(matrices(layer, scores[name]), config))
            for name, layer in chosen.items()
        }
    hold_open(net, graph, keep)
    context.record(**masks.facts(graph, chosen), left=left, **facts)
    return net


def _scores(
    graph: fx.GraphModule,
    chosen: Mapping[str, nn.Module],
    config: SemiStructured,
    context: Context,
) -> dict[str, Tensor]:
    if config.importance != "taylor":
        return weight_scores.magnitude(chosen)
    if context.data.calibration is None:
        raise DataError("semi_structured: importance taylor needs calibration data with labels")
    batches = context.track(context.data.calibration, "scoring weights")
    return weight_scores.taylor(graph, chosen, context.loss, batches)


def _permute(
    net: nn.Module,
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    config: SemiStructured,
    context: Context,
) -> dict[str, Any]:
    """Put channels into a better order; return what the report says of it."""
    own = {name for name, _ in net.named_modules()}
    groups = find_groups(capture(net, context.inputs), net)
    done = reorder(
        net,
        context.track(groups, "ordering channels", len(groups)),
        {name: score for name, score in scores.items() if name in own},
        pattern,
        context.inputs,
        escapes=config.escapes,
        seed=context.seed,
    )
    return {
        "kept_before_and_after_permuting": {n: list(shares) for n, shares in done.kept.items()},
        "not_permuted": {
            **done.left,
            **{n: "a projection of attention" for n in scores if n not in own},
        },
    }


def _check_blocks(chosen: Mapping[str, nn.Module], block: tuple[int, int]) -> None:
    sizes = {
        name: (matrices(layer).shape[1], input_channels(layer)) for name, layer in chosen.items()
    }
    wrong = [name for name, size in sizes.items() if size[0] % block[0] or size[1] % block[1]]
    if wrong:
        told = ", ".join(f"{name!r} is {sizes[name][0]} x {sizes[name][1]}" for name in wrong)
        excluded = ", ".join(f'"!{name}"' for name in wrong)
        rows, columns = (_nearest([s[i] for s in sizes.values()], block[i]) for i in range(2))
        raise UnfitError(
            f"semi_structured: blocks of {block[0]} x {block[1]} do not divide every layer "
            f"(outputs x input channels): {told}; use block: [{rows}, {columns}], or leave out "
            f"what does not fit: layers: [{excluded}]"
        )


def _nearest(sizes: list[int], wanted: int) -> int:
    """Return the number nearest to `wanted` that divides all sizes."""
    fit = [d for d in range(1, min(sizes) + 1) if all(size % d == 0 for size in sizes)]
    return min(fit, key=lambda d: (abs(d - wanted), d))


def _keep_blocks(score_GRC: Tensor, config: SemiStructured) -> Tensor:
    """Drop the blocks of the lowest norm, over all of a layer's groups and kernel positions."""
    assert config.block is not None
    height, width = config.block
    groups, rows, columns = score_GRC.shape
    blocks = score_GRC.view(groups, rows // height, height, columns // width, width)
    norm = blocks.square() if config.importance == "l2" else blocks
    flat = norm.sum((2, 4)).flatten()
    sparsity = _DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
    gone = flat.argsort(stable=True)[: masks.num_dropped(sparsity, len(flat))]
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[gone] = False
    wide = keep.view(groups, rows // height, 1, columns // width, 1)
    return wide.expand(blocks.shape).reshape(score_GRC.shape)
