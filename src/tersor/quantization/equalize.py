"""Equalize: give the channels between two layers similar ranges; outputs stay the same."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.technique import technique
from tersor.ops.capture import capture
from tersor.ops.fold import fold_batch_norms
from tersor.ops.rectifiers import rectifier

# C channels between the two layers of a pair.

_ENOUGH = 1e-3
"""Sweeps end when no channel's factor is further from 1 than this."""
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_LEAKY = (nn.LeakyReLU, nn.PReLU)


@dataclass(frozen=True, kw_only=True)
class Equalize:
    """Settings of cross-layer equalization."""

    sweeps: int = 20
    """Passes over all pairs, at most."""
    replace_relu6: bool = False
    """Make every ReLU6 between two layers a ReLU, as the paper does; outputs may change then."""

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"sweeps must be at least 1, got {self.sweeps}")


@technique(paper="arXiv:1906.04721")
def equalize(net: nn.Module, config: Equalize, context: Context) -> nn.Module:
    """Move scale from one layer's channels into the next layer's, so that one step fits them all.

    Where a convolution or linear layer is followed, over nothing but a ReLU, by another, channel c
    of the first is divided by s_c = sqrt(r1_c / r2_c) and the second's is multiplied by it; r are
    the largest magnitudes of a channel's weights. Batch norms are folded first. Chains are swept
    until they settle. Helps most with one scale for a whole layer, and before depthwise
    convolutions.

    Raises:
        UnfitError: no two layers follow each other so.

    Source:
        Nagel et al., arXiv:1906.04721, section 4.1.
    """
    captured = capture(net.eval(), context.inputs)
    folded = fold_batch_norms(captured, context.inputs)
    replaced = _replace_relu6(captured) if config.replace_relu6 else 0
    pairs, stopped = _pairs(captured)
    if not pairs:
        six = " but over ReLU6, which replace_relu6 would make a ReLU" if stopped else ""
        raise UnfitError(
            f"in {type(net).__name__} no two convolutions or linear layers follow each other with "
            f"nothing but a ReLU between them{six}"
        )
    sweeps = 0
    while sweeps < config.sweeps:
        sweeps += 1
        furthest = max(_balance(first, second) for first, second in pairs.values())
        if furthest < _ENOUGH:
            break
    context.record(
        pairs=len(pairs),
        sweeps=sweeps,
        batch_norms_folded=folded,
        relu6_replaced=replaced,
        left_over_relu6=stopped,
    )
    return captured


def _replace_relu6(captured: fx.GraphModule) -> int:
    modules = dict(captured.named_modules())
    found = [n for n in captured.graph.nodes if rectifier(n, modules) == "relu6"]
    for node in found:
        if node.op == "call_module":
            captured.set_submodule(str(node.target), nn.ReLU())
        else:
            node.target = nn.functional.relu
    captured.recompile()
    return len(found)


def _passes_scale(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether f(s x) = s f(x) for each channel and s > 0."""
    if node.op == "call_module" and isinstance(modules[str(node.target)], _LEAKY):
        return True
    return rectifier(node, modules) == "relu" or node.target is nn.functional.leaky_relu


def _pairs(
    captured: fx.GraphModule,
) -> tuple[dict[str, tuple[nn.Module, nn.Module]], list[str]]:
    """Return the pairs by name, and the first layers that only a ReLU6 parts from a second."""
    modules = dict(captured.named_modules())
    calls = Counter(str(n.target) for n in captured.graph.nodes if n.op == "call_module")
    owners = Counter(id(p) for name in calls for p in modules[name].parameters())

    def layer_of(node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or calls[str(node.target)] > 1:
            return None
        found = modules[str(node.target)]
        alone = all(owners[id(p)] == 1 for p in found.parameters())
        return found if type(found) in _LAYERS and alone else None

    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    stopped: list[str] = []
    for node in captured.graph.nodes:
        first = layer_of(node)
        if first is None:
            continue
        at, six = node, False
        while len(at.users) == 1:
            at = next(iter(at.users))
            if rectifier(at, modules) == "relu6":
                six = True
            elif not _passes_scale(at, modules):
                break
        second = layer_of(at) if at is not node else None
        if second is None or not _fit(first, second):
            continue
        if six:
            stopped.append(str(node.target))
        else:
            pairs[str(node.target)] = (first, second)
    return pairs, stopped


def _fit(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether the channels that the first writes are those that the second reads."""
    if isinstance(first, nn.Linear) or isinstance(second, nn.Linear):
        return isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return isinstance(first, _ConvNd) and isinstance(second, _ConvNd)


def _balance(first: nn.Module, second: nn.Module) -> float:
    """Equalize one pair; return how far its factors were from 1."""
    one, two = first.weight, second.weight
    assert isinstance(one, Tensor)
    assert isinstance(two, Tensor)
    with torch.no_grad():
        rows_CI = one.flatten(1)
        columns_CO = _columns(second)
        r1_C, r2_C = rows_CI.abs().amax(1), columns_CO.abs().amax(1)
        alive_C = (r1_C > 0) & (r2_C > 0)
        s_C = torch.where(alive_C, (r1_C / r2_C).sqrt(), 1.0)
        one.div_(s_C.view(-1, *[1] * (one.dim() - 1)))
        if isinstance(first.bias, Tensor):
            first.bias.div_(s_C)
        _scale_columns(second, s_C)
    return float((s_C - 1).abs().max())


def _columns(layer: nn.Module) -> Tensor:
    """Return the weights that read each input channel, one row for each."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    per_group = weight.view(groups, -1, *weight.shape[1:])
    return per_group.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def _scale_columns(layer: nn.Module, s_C: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    per_group = weight.view(groups, -1, *weight.shape[1:])
    per_group.mul_(s_C.view(groups, 1, -1, *[1] * (weight.dim() - 2)))
