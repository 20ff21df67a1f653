"""Tie layers: let neighboring blocks of a network use the same matrices."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from tersor.core.context import Context
from tersor.core.errors import StepError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.modules import check_patterns

_FEWEST = 2
"""Blocks that can be tied; dimensions of what is."""


@dataclass(frozen=True, kw_only=True)
class TieLayers:
    """Settings of tying."""

    share: int = 2
    """Neighboring blocks that use the same matrices; 0: all blocks of a sequence."""
    start: Literal["mean", "first"] = "mean"
    """The matrices that a group begins with: the mean of its blocks', or the first block's."""
    layers: Layers = Layers()
    """Blocks that may be tied, by name."""

    def __post_init__(self) -> None:
        if self.share != 0 and self.share < _FEWEST:
            raise ValueError(f"share must be 0 or at least {_FEWEST}, got {self.share}")

    def weaker(self) -> "TieLayers | None":
        """Return settings that tie fewer blocks together; None for pairs."""
        if self.share == _FEWEST:
            return None
        return replace(self, share=_FEWEST if self.share == 0 else self.share - 1)


@technique(paper="arXiv:1909.11942")
def tie_layers(net: nn.Module, config: TieLayers, context: Context) -> nn.Module:
    """Give blocks that follow each other in a list one set of matrices and kernels.

    Blocks are modules of one class in a ModuleList or Sequential whose parameters have the same
    names and shapes. Biases and norms stay each block's own. Outputs change much: recover in the
    same stage, by `distill_logits` or `finetune`; tied weights stay tied through training. The file
    holds them once; the time of a run does not change.

    Raises:
        RecipeError: a pattern matches no block.
        StepError: all blocks are excluded.
        UnfitError: no two blocks are alike, or they are tied already.

    Source:
        Lan et al., ALBERT, arXiv:1909.11942, section 3.1; groups of neighbors as in Takase and
        Kiyono, arXiv:2104.06022, "sequence". We tie a trained network, and leave norms untied.
    """
    runs = list(_runs(net))
    names = [name for run in runs for name, _ in run]
    if not names:
        raise UnfitError(
            f"{type(net).__name__} has no two blocks of one class and shape next to each other in "
            "a ModuleList or Sequential"
        )
    check_patterns(config.layers, names)
    groups = [group for run in runs for group in _grouped(run, config)]
    if not groups:
        raise StepError(f"layers excludes everything that could be tied: {', '.join(names)}")
    before = sum(p.numel() for p in net.parameters())
    groups = [group for group in groups if _free([block for _, block in group])]
    if not groups:
        raise UnfitError("the blocks of this network use the same matrices already")
    for group in groups:
        _tie([block for _, block in group], config.start)
    context.record(
        groups=[[name for name, _ in group] for group in groups],
        parameters=sum(p.numel() for p in net.parameters()) / before,
    )
    return net


def _runs(net: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield sequences of neighbors that are alike; blocks inside such blocks are left alone."""
    inside: list[str] = []
    for name, holder in net.named_modules():
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
            continue
        if any(name.startswith(f"{block}.") for block in inside):
            continue
        run: list[tuple[str, nn.Module]] = []
        for key, block in [*holder.named_children(), ("", nn.Identity())]:
            if run and _shape(block) != _shape(run[-1][1]):
                if len(run) >= _FEWEST:
                    inside += [own for own, _ in run]
                    yield run
                run = []
            if any(p.dim() > 1 for p in block.parameters()):
                run.append((f"{name}.{key}" if name else key, block))


def _shape(block: nn.Module) -> tuple[Any, ...]:
    """Return what blocks must have in common: class, parameters, and which of these are one."""
    own = list(block.named_parameters(remove_duplicate=False))
    first: dict[int, int] = {}
    return type(block), [
        (name, tuple(p.shape), p.dtype, first.setdefault(id(p), i))
        for i, (name, p) in enumerate(own)
    ]


def _free(blocks: list[nn.Module]) -> bool:
    """Tell whether blocks have matrices of their own."""
    first, *others = ({id(p) for p in b.parameters() if p.dim() > 1} for b in blocks)
    return any(other != first for other in others)


def _grouped(
    run: list[tuple[str, nn.Module]], config: TieLayers
) -> Iterator[list[tuple[str, nn.Module]]]:
    free = [(name, block) for name, block in run if config.layers.holds(name)]
    step = config.share or max(len(free), 1)
    for start in range(0, len(free), step):
        group = free[start : start + step]
        if len(group) >= _FEWEST:
            yield group


def _tie(blocks: list[nn.Module], start: str) -> None:
    own = [dict(block.named_parameters(remove_duplicate=False)) for block in blocks]
    means = {}
    for name, first in own[0].items():
        if start == "mean" and first.dim() >= _FEWEST:
            means[name] = torch.stack([each[name].detach() for each in own]).mean(0)
    for name, first in own[0].items():
        if first.dim() < _FEWEST:
            continue
        if start == "mean":
            with torch.no_grad():
                first.copy_(means[name])
        owner, _, leaf = name.rpartition(".")
        for block in blocks[1:]:
            block.get_submodule(owner).register_parameter(leaf, first)
