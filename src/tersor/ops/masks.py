"""Masks: choose which weights go, and keep them zero through whatever training follows.

The zeros are the mask. `hold` sets them, and remembers them on the layer until the stage ends.
Every training goes through `holding`: a weight that is exactly zero when it begins is zero when it
ends, in this stage and in later ones, also in a network that came in sparse. A weight whose
gradient is always zero stays where it is with SGD, its momentum, AdamW and weight decay alike.
`settle` compares, at the end of the stage, what was asked for with what is there.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.context import Fit
from tersor.core.errors import StepError, UnfitError, suggest
from tersor.core.layers import Layers
from tersor.ops.modules import QUANTIZED, check_patterns
from tersor.ops.projections import ATTRIBUTES, owner, projections

# scores and masks have the shape of their layer's weight; in a mask True is a weight that stays

Scope = Literal["layer", "global"]
_NOTE = "tersor_keep"
"""Attribute of a layer: the mask that its weight was pruned with, until the stage ends; with the
name of the weight, where a layer has several."""
_TRAIN = (
    "train the very network that fit is given, with value.backward() and an optimizer over its "
    "parameters, and return it"
)


def prunable(net: nn.Module, layers: Layers) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the linear layers and convolutions whose weights may go; a shared weight once.

    The projections of attention that are rows of one weight are linear layers, too
    (`ops.projections`), which share that weight but are not part of the network.

    Args:
        net: The network.
        layers: Which of them.

    Returns:
        (name -> layer, name -> why it is left as it is; so are layers of other kinds that have
        matrices).

    Raises:
        RecipeError: a pattern matches no layer.
        StepError: everything is excluded; or layers that share a weight are not chosen together.
        UnfitError: there is nothing to prune.
    """
    known = {
        name: layer
        for name, layer in net.named_modules(remove_duplicate=False)
        if isinstance(layer, (nn.Linear, _ConvNd, *QUANTIZED))
    } | projections(net)
    left = {name: reason for name, layer in known.items() if (reason := _why_not(layer))}
    free = {name: layer for name, layer in known.items() if name not in left}
    if not free:
        told = "; ".join(f"{name!r}: {reason}" for name, reason in list(left.items())[:3])
        raise UnfitError(
            f"no layer of {type(net).__name__} can be pruned ({told or 'it has none'})"
        )
    check_patterns(layers, list(known))
    left |= _others(net, {id(layer.weight) for layer in known.values()})
    owners: dict[int, str] = {}
    chosen: dict[str, nn.Module] = {}
    for name, layer in free.items():
        first = owners.setdefault(id(layer.weight), name)
        if layers.holds(name) != layers.holds(first):
            raise StepError(
                f"layers {first!r} and {name!r} share one weight, but only one of them is chosen; "
                "choose both, or exclude both"
            )
        if not layers.holds(name):
            left[name] = "excluded by layers"
        elif first != name:
            left[name] = f"shares the weight of {first!r}, which is pruned"
        else:
            chosen[name] = layer
    if not chosen:
        raise StepError(f"layers excludes everything that could be pruned: {', '.join(free)}")
    return chosen, left


def _why_not(layer: nn.Module) -> str | None:
    """Say why a layer's weights cannot be pruned, or None."""
    assert isinstance(layer.weight, Tensor)
    if not layer.weight.is_floating_point():
        kind = str(layer.weight.dtype).removeprefix("torch.")
        return f"its weights are {kind}; prune before they are rounded"
    if "weight" not in layer._parameters:
        return "its weight is computed from others (parametrized); make it plain first"
    return None


def _others(net: nn.Module, known: Collection[int]) -> dict[str, str]:
    """Say that layers of other kinds with matrices of their own, such as an LSTM, stay.

    Those of `known` are told by the layer that shares them.
    """
    return {
        name: f"{type(layer).__name__}: only linear layers and convolutions are pruned"
        for name, layer in net.named_modules()
        if not isinstance(layer, (nn.Linear, _ConvNd, *QUANTIZED, nn.MultiheadAttention))
        and any(p.dim() > 1 and id(p) not in known for p in layer.parameters(recurse=False))
    }


def num_dropped(sparsity: float, count: int) -> int:
    """Return how many of `count` weights a sparsity sets to zero, rounded down."""
    return math.floor(sparsity * count + 1e-6)


def weaker(sparsity: float) -> float | None:
    """Return a milder sparsity: with twice the weights, or 30 % fewer zeros; None below 5 %."""
    milder = round(max(2 * sparsity - 1, 0.7 * sparsity), 4)
    return milder if milder >= 0.05 else None


def facts(net: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what a report says of pruned layers.

    Returns:
        sparsity: of their weights together; sparsity_by_layer; sparsity_of_parameters: of all
        parameters of the network, with those that were not pruned.
    """
    sizes = {name: _size(layer.weight) for name, layer in layers.items()}
    everything = [_size(parameter) for parameter in net.parameters()]
    return {
        "sparsity": _share(list(sizes.values())),
        "sparsity_by_layer": {name: _share([size]) for name, size in sizes.items()},
        "sparsity_of_parameters": _share(everything),
    }


def _size(weight: Tensor | nn.Module) -> tuple[int, int]:
    """Return zeros and elements."""
    assert isinstance(weight, Tensor)
    return weight.numel() - int(weight.detach().count_nonzero()), weight.numel()


def _share(sizes: Sequence[tuple[int, int]]) -> float:
    return round(sum(z for z, _ in sizes) / max(sum(n for _, n in sizes), 1), 5)


def choose(
    scores: Mapping[str, Float[Tensor, "..."]], sparsity: float, scope: Scope = "layer"
) -> dict[str, Bool[Tensor, "..."]]:
    """Drop the weights of the lowest scores; of equal scores the first.

    Args:
        scores: Layer name -> a score for each weight, comparable between layers where scope is
            global.
        sparsity: Share of the weights to drop, in [0, 1); rounded down to whole weights.
        scope: layer: the same share of each; global: one threshold for all of them together.

    Returns:
        Layer name -> mask, True where a weight stays.

    Raises:
        StepError: a score is not finite.
        UnfitError: a layer would be left without a weight (`too_strong`).
    """
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise StepError(
                f"layer {name!r}: {int((~torch.isfinite(score)).sum())} of {score.numel()} scores "
                "are not finite; look for NaN in its weights and in the data"
            )
    if scope == "global":
        flat = torch.cat([score.flatten() for score in scores.values()])
        parts = torch.split(_lowest(flat, sparsity), [s.numel() for s in scores.values()])
    else:
        parts = tuple(_lowest(score.flatten(), sparsity) for score in scores.values())
    keep = {
        name: ~dropped.view(score.shape)
        for (name, score), dropped in zip(scores.items(), parts, strict=True)
    }
    emptied = [name for name, mask in keep.items() if not mask.any()]
    if emptied:
        others = "; ".join(repr(name) for name in emptied)
        way = "use scope: layer, " if scope == "global" else ""
        raise UnfitError(
            f"a sparsity of {sparsity} would leave no weight in layer {others}; {way}a lower "
            f'sparsity, or leave it out: layers: ["!{emptied[0]}"]',
            too_strong=True,
        )
    return keep


def _lowest(score: Tensor, sparsity: float) -> Tensor:
    dropped = torch.zeros(score.numel(), dtype=torch.bool)
    dropped[score.argsort(stable=True)[: num_dropped(sparsity, score.numel())]] = True
    return dropped


def hold(net: nn.Module, keep: Mapping[str, Bool[Tensor, "..."]]) -> None:
    """Set weights to zero, and have them stay zero.

    Args:
        net: Its layers are changed in place; they keep their types.
        keep: Layer name -> mask of its weight's shape, True where a weight stays.

    Raises:
        StepError: no such layer, or the mask does not fit its weight. The network is unchanged.
    """
    places: list[tuple[Any, str, Tensor]] = []
    for name, mask in keep.items():
        found = owner(net, name)
        weight = getattr(*found, None) if found else None
        if found is None or not isinstance(weight, Tensor):
            names = [*dict(net.named_modules()), *projections(net)]
            raise StepError(f"no layer {name!r} with a weight.{suggest(name, names)}")
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise StepError(
                f"the mask of layer {name!r} is {mask.dtype} {tuple(mask.shape)}, but its weight "
                f"has shape {tuple(weight.shape)}; a mask is bool and has the weight's shape"
            )
        places.append((*found, mask))
    for layer, attribute, mask in places:
        weight = getattr(layer, attribute)
        with torch.no_grad():
            weight.masked_fill_(~mask.to(weight.device), 0.0)
        before = getattr(layer, _note(attribute), None)
        setattr(layer, _note(attribute), mask if before is None else mask & before)


def _note(attribute: str) -> str:
    return _NOTE if attribute == "weight" else f"{_NOTE}_{attribute}"


def zeros(net: nn.Module) -> dict[str, Bool[Tensor, "..."]]:
    """Find what training must not fill: parameter name -> True where a weight is exactly zero.

    Matrices and kernels only; one that is zero as a whole is new rather than pruned.
    """
    found = {}
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1 and parameter.requires_grad:
            zero = parameter.detach() == 0
            if zero.any() and not zero.all():
                found[name] = zero
    return found


def holding(fit: Fit) -> Fit:
    """Return a trainer that does as `fit` and fills no zeros.

    Raises (the returned trainer, when called):
        StepError: `fit` filled zeros nevertheless, or returned another network.
    """

    def held(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        gone = zeros(net)
        with changed_gradients(net, {name: _masking(zero) for name, zero in gone.items()}):
            trained = fit(net, *args, **settings)
        weights = dict(trained.named_parameters())
        for name, zero in gone.items():
            if name not in weights or weights[name].shape != zero.shape:
                raise StepError(f"the trainer returned a network without {name!r}; {_TRAIN}")
            filled = _filled(weights[name], zero)
            if filled:
                raise StepError(
                    f"the trainer ignored the mask of {name!r}: {filled} of its {int(zero.sum())} "
                    f"pruned weights are not zero any more; {_TRAIN}"
                )
        return trained

    return held


@contextmanager
def changed_gradients(
    net: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Change the gradients of parameters, by name, inside."""
    hooks = []
    for name, parameter in net.named_parameters():
        if name in changes:
            hooks.append(parameter.register_hook(changes[name]))  # type: ignore[no-untyped-call]  # torch
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masking(zero: Tensor) -> Callable[[Tensor], Tensor]:
    # a trainer may have moved the network to another device
    return lambda gradient: gradient.masked_fill(zero.to(gradient.device), 0.0)


def _filled(weight: Tensor, zero: Tensor) -> int:
    return int((weight.detach()[zero.to(weight.device)] != 0).sum())


def settle(net: Any) -> Any:
    """Check that the sparsity asked for is the sparsity there is, and forget the masks.

    Layers that a later step replaced or made smaller are not looked at.

    Raises:
        StepError: pruned weights are not zero any more.
    """
    if not isinstance(net, nn.Module):
        return net
    for name, layer in net.named_modules():
        for attribute in ATTRIBUTES:
            _settle(name, layer, attribute)
    return net


def _settle(name: str, layer: nn.Module, attribute: str) -> None:
    note = _note(attribute)
    keep, weight = getattr(layer, note, None), getattr(layer, attribute, None)
    if keep is None:
        return
    if isinstance(weight, Tensor) and weight.shape == keep.shape:
        filled = _filled(weight, ~keep)
        if filled:
            raise StepError(
                f"layer {name!r} was pruned to {(~keep).double().mean().item():.2%} zeros, but "
                f"{filled} of these {int((~keep).sum())} weights are not zero at the end of "
                "the stage; a step after the pruning filled them. A step that trains does so "
                "with context.fit, which holds zeros; one that changes weights comes before"
            )
    delattr(layer, note)
