"""How much a network would miss each channel of a group.

All scores are of one kind: a number for each channel of each group, larger for what matters more.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from tersor.core.context import Batch, Loss
from tersor.core.errors import StepError
from tersor.ops.atoms import Port
from tersor.ops.cutting import Place, by_channel, places
from tersor.ops.groups import Coupling, Group
from tersor.ops.losses import LABELS

# K channels of a group, C channels at a port, R other numbers

_MAKES = ("out", "hidden", "depthwise")
_HOLDS = (*_MAKES, "in")


def magnitude(net: nn.Module, group: Group, order: Literal[1, 2]) -> Float[Tensor, "K"]:
    """Score channels by the size of the weights that make and read them.

    Each layer's norms are divided by their mean, so that large layers do not drown small ones; the
    score is the mean over layers.

    Args:
        net: The network.
        group: Its channels.
        order: 1: sum of absolute weights; 2: Euclidean norm.

    Source:
        Li et al., arXiv:1608.08710 (filters by their L1 norm); the mean over all coupled layers
        follows Fang et al., arXiv:2301.12900.
    """
    rows = []
    for port, own in group.indices.items():
        if port[1] not in _HOLDS:
            continue
        weight_CR = torch.cat([_weight(net, port, p) for p in _matrices(net, port)], 1)
        norms_C = weight_CR.norm(order, dim=1)
        norms_K = _gather(norms_C.pow(order), own).pow(1 / order)
        rows.append(norms_K / norms_K.mean().clamp_min(1e-12))
    return torch.stack(rows).mean(0) if rows else torch.ones(group.size)


def norm_scale(net: nn.Module, group: Group) -> Float[Tensor, "K"] | None:
    """Score channels by the size of the batch norm weights that scale them; None: there are none.

    Source:
        Liu et al., Network Slimming, arXiv:1708.06519, section 3.
    """
    rows = []
    for (name, side), own in group.indices.items():
        if side == "both":
            layer = net.get_submodule(name)
            if isinstance(layer, (_BatchNorm, _InstanceNorm)) and layer.weight is not None:
                rows.append(_gather(layer.weight.detach().abs(), own) / len(own[0]))
    return torch.stack(rows).mean(0) if rows else None


def median_distance(net: nn.Module, group: Group) -> Float[Tensor, "K"]:
    """Score channels by how far their filters are from all others of the layer, in all.

    A filter near the geometric median can be replaced by the others.

    Source:
        He et al., FPGM, arXiv:1811.00250, equation 6; here over every layer that makes the
        channels, each divided by its mean.
    """
    rows = []
    for port, own in group.indices.items():
        if port[1] not in _MAKES:
            continue
        weight_CR = torch.cat([_weight(net, port, p) for p in _matrices(net, port)], 1)
        weight_KR = torch.stack([weight_CR[list(each)].flatten() for each in own])
        distance_K = torch.cdist(weight_KR, weight_KR).sum(1)
        rows.append(distance_K / distance_K.mean().clamp_min(1e-12))
    return torch.stack(rows).mean(0) if rows else torch.ones(group.size)


def taylor(
    net: nn.Module,
    groups: Sequence[Group],
    loss: Loss,
    batches: Iterable[Batch],
    *,
    fisher: bool = False,
) -> list[Float[Tensor, "K"]]:
    """Score channels by the change of the loss when they are taken out.

    First order: a gate on the channel has the gradient sum(weight * gradient) over the weights that
    read it, in all layers that do (of those that make it, where a product reads it); its square is
    the score. Second order (`fisher`): sum((weight * gradient)^2) over them, Optimal Brain Damage
    with the diagonal of the empirical Fisher matrix in the place of the Hessian's.

    Args:
        net: In eval mode; gradients are left empty.
        groups: Its channels.
        loss: (network, batch) -> scalar.
        batches: With whatever `loss` needs.
        fisher: Second order.

    Returns:
        For each group, the mean over batches.

    Raises:
        StepError: loss or a gradient is not finite.

    Source:
        Molchanov et al., arXiv:1906.10771, equation 8 with a gate on each channel; LeCun et al.,
        Optimal Brain Damage (1990), equation 4, with Theis et al., arXiv:1801.05787, section 2.2.
    """
    totals = [torch.zeros(group.size) for group in groups]
    count = 0
    with _gradients(net):
        for batch in batches:
            net.zero_grad(set_to_none=True)
            value = loss(net, batch)
            if not torch.isfinite(value):
                raise StepError(f"the loss is {value.item()} on calibration batch {count + 1}")
            torch.autograd.backward(value)
            for total, group in zip(totals, groups, strict=True):
                change_K = _change(net, group, count, fisher)
                total += change_K if fisher else change_K.square()
            count += 1
    return [total / max(count, 1) for total in totals]


@contextmanager
def _gradients(net: nn.Module) -> Iterator[None]:
    """Let all parameters have gradients inside, also frozen ones; leave none behind."""
    floats = [p for p in net.parameters() if p.is_floating_point()]
    frozen = [p for p in floats if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        net.zero_grad(set_to_none=True)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _change(net: nn.Module, group: Group, batch: int, fisher: bool) -> Float[Tensor, "K"]:
    change_K = torch.zeros(group.size)
    sides = ("in",) if group.layers("in") else _MAKES
    for port, own in group.indices.items():
        if port[1] not in sides:
            continue
        layer = net.get_submodule(port[0])
        for place in places(layer, port[1]):
            parameter = getattr(layer, place.leaf)
            if not isinstance(parameter, nn.Parameter) or parameter.grad is None:
                continue
            product = parameter.detach() * parameter.grad
            if not torch.isfinite(product).all():
                raise StepError(
                    f"the gradient of layer {port[0]!r} is not finite on calibration batch "
                    f"{batch + 1}; look for NaN in the data, or use importance: l2"
                )
            product_CR = by_channel(layer, product.square() if fisher else product, place)
            change_K += _gather(product_CR.sum(1), own)
    return change_K


def activation(
    coupling: Coupling, groups: Sequence[Group], batches: Iterable[Batch]
) -> list[Float[Tensor, "K"]]:
    """Score channels by their mean absolute value where they are read; no labels.

    Each place's means are divided by their mean over the group.

    Source:
        Hu et al., Network Trimming, arXiv:1607.03250, with the mean in the place of the share of
        zeros, so that it also serves activations that are never zero.
    """
    watch = _Watch(coupling)
    for batch in batches:
        with torch.no_grad():
            watch.add(batch)
    scores = []
    for group in groups:
        wanted = {root: k for k, root in enumerate(group.roots)}
        rows = []
        for index, read in enumerate(coupling.flow.reads):
            roots = coupling.flow.roots(read.atoms).tolist()
            if index not in watch.sums or not any(root in wanted for root in roots):
                continue
            row_K = torch.zeros(group.size)
            for mean, root in zip(watch.sums[index].tolist(), roots, strict=True):
                if root in wanted:
                    row_K[wanted[root]] += mean
            rows.append(row_K / row_K.mean().clamp_min(1e-12))
        scores.append(torch.stack(rows).mean(0) if rows else torch.ones(group.size))
    return scores


class _Watch(fx.Interpreter):
    """Run the graph, adding up what its sums over channels read."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__(coupling.captured)
        self.sums: dict[int, Tensor] = {}
        self.at: dict[str, list[tuple[int, int]]] = {}
        for index, read in enumerate(coupling.flow.reads):
            self.at.setdefault(read.operand, []).append((index, read.dim))

    def add(self, batch: Batch) -> None:
        order = [n for n in self.graph.nodes if n.op == "placeholder"]
        given = {key: value for key, value in batch.items() if key != LABELS}
        self.run(*(given[str(n.target)] for n in order if str(n.target) in given))

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        for index, dim in self.at.get(n.name, ()):
            assert isinstance(value, Tensor)
            mean_C = value.abs().float().movedim(dim, 0).flatten(1).mean(1)
            self.sums[index] = self.sums.get(index, torch.zeros(len(mean_C))) + mean_C
        return value


def _matrices(net: nn.Module, port: Port) -> list[Place]:
    """List where a port's weights are, without biases."""
    return [p for p in places(net.get_submodule(port[0]), port[1]) if "bias" not in p.leaf]


def _weight(net: nn.Module, port: Port, place: Place) -> Float[Tensor, "C R"]:
    layer = net.get_submodule(port[0])
    return by_channel(layer, getattr(layer, place.leaf).detach().float(), place)


def _gather(scores_C: Tensor, own: Sequence[Sequence[int]]) -> Float[Tensor, "K"]:
    """Add up the scores of the places of each channel."""
    flat = torch.tensor([i for each in own for i in each])
    which = torch.tensor([k for k, each in enumerate(own) for _ in each])
    return torch.zeros(len(own)).index_add_(0, which, scores_C[flat].float())
