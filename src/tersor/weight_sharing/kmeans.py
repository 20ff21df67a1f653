"""K-means: let the weights of a layer take few values, each at the mean of those it stands for."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.core.context import Context
from tersor.core.errors import DataError, ModelError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.capture import capture
from tersor.ops.codebooks import Init, nearest
from tersor.ops.codebooks import kmeans as choose
from tersor.ops.knapsack import Budget, solve, solver
from tersor.ops.modules import check_patterns
from tersor.ops.notes import note
from tersor.ops.sharing import FEWEST
from tersor.ops.twin import gather
from tersor.ops.variants import losses_of

_LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
_FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Kmeans:
    """Settings of weight sharing."""

    clusters: int = 16
    """Values of a table, 2 to 256. Weights that were pruned stay zero, which comes in addition."""
    size: float | None = None
    """Share of float32 that the codes may take together, from 1/32 to 0.25: 2 to 256 values for
    each layer, fewer where the outputs lose least by it. In place of `clusters`; needs calibration
    data."""
    scope: Literal["layer", "channel", "network"] = "layer"
    """Who shares a table: each layer has its own; the same, times a scale for each output channel;
    or one for the whole network, which training afterwards splits by layers. channel is for int8
    afterwards: then a layer's codes are few, too."""
    init: Init = "linear"
    """How k-means begins: linear keeps the large weights best, density the many small ones."""
    samples: int = 256
    """Calibration samples that sensitivities are measured on."""
    layers: Layers = Layers()
    """Linear, convolutional, embedding and recurrent layers whose weights are shared; attention
    for the projections of query, key and value."""

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= 256:
            near = min(max(self.clusters, 2), 256)
            raise ValueError(f"clusters must be 2 to 256, got {self.clusters}; use {near}")
        if self.size is not None and not 1 / _FLOAT_BITS <= self.size <= 0.25:
            raise ValueError(
                f"size must be from 1/32 (one bit for each weight) to 0.25, got {self.size}"
            )
        if self.size is not None and self.scope == "network":
            raise ValueError("size chooses a table for each layer; scope network has only one")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def weaker(self) -> "Kmeans | None":
        """Return settings with twice the values, or 30 % more room; None where that is all."""
        if self.size is not None:
            return replace(self, size=min(1.3 * self.size, 0.25)) if self.size < 0.25 else None
        return replace(self, clusters=min(2 * self.clusters, 256)) if self.clusters < 256 else None


@technique(paper="arXiv:1510.00149")
def kmeans(net: nn.Module, config: Kmeans, context: Context) -> nn.Module:
    """Move each weight to the nearest value of its layer's table, found by k-means.

    Tensors keep their shapes and types; what is shared are the values. Training afterwards, in this
    stage or a later one, moves the values of a table and nothing else: each by the mean gradient of
    its weights. A file gets smaller by `pack`; a runtime computes as before.

    Raises:
        DataError: `size` without calibration data.
        DependencyError: `size` without scipy.
        RecipeError: a pattern matches no layer.
        StepError: all layers are excluded.
        UnfitError: no layer has enough float weights.

    Source:
        Han et al., arXiv:1510.00149, section 3. scope channel: tables of weights that are divided
        by the largest of their output channel, whose ends stay at -1 and 1; transposed
        convolutions, whose rows are input channels, get a table without scales.
    """
    net.eval()
    chosen, left = _chosen(net, config)
    clusters = dict.fromkeys(chosen, config.clusters)
    if config.size is not None:
        bits, losses = _by_sensitivity(net, chosen, config, context)
        clusters = {name: 2**b for name, b in bits.items()}
        context.record(
            sensitivities={n: {str(b): v for b, v in own.items()} for n, own in losses.items()}
        )
    book = _one_book(chosen, config, context.seed) if config.scope == "network" else None
    errors, counts = {}, {}
    for name, layer in chosen.items():
        before = _flat(layer)
        values = _share(layer, clusters[name], config, context.seed, book)
        after = _flat(layer)
        errors[name] = float(((after - before) ** 2).sum() / max(float((before**2).sum()), 1e-30))
        counts[name] = values
    note(net, shared=True)
    context.record(
        layers=len(chosen), clusters=clusters, values=counts, relative_errors=errors, left=left
    )
    return net


def _chosen(net: nn.Module, config: Kmeans) -> tuple[dict[str, nn.Module], dict[str, str]]:
    known = {n: m for n, m in net.named_modules() if isinstance(m, _LAYERS)}
    check_patterns(config.layers, list(known))
    chosen: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    seen: set[int] = set()
    for name, layer in known.items():
        named = _weights(layer)
        own = list(named.values())
        reason = None
        if not config.layers.holds(name):
            reason = "excluded by layers"
        elif not own or (hasattr(layer, "weight") and "weight" not in named):
            reason = "it has no float weights of its own"
        elif all(id(p) in seen for p in own):
            reason = "its weight is another layer's, which is shared already"
        elif all(p.numel() < 2 * FEWEST for p in own):
            reason = f"only {own[0].numel()} weights"
        if reason is None:
            chosen[name] = layer
            seen |= {id(p) for p in own}
        else:
            left[name] = reason
        for parameter in own:
            if not bool(torch.isfinite(parameter).all()):
                raise ModelError(f"layer {name!r} has weights that are NaN or infinite")
    if not chosen and any(reason != "excluded by layers" for reason in left.values()):
        told = "; ".join(f"{name!r}: {reason}" for name, reason in list(left.items())[:3])
        raise UnfitError(f"no layer of {type(net).__name__} can share its weights ({told})")
    if not chosen:
        if left:
            raise StepError(f"layers excludes everything that could be shared: {', '.join(left)}")
        raise UnfitError(f"{type(net).__name__} has no layer whose weights could be shared")
    return chosen, left


def _weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return a layer's own matrices and kernels."""
    own = dict(layer.named_parameters(recurse=False))
    if isinstance(layer, nn.MultiheadAttention):  # a key and a value that it adds are no matrices
        own = {name: p for name, p in own.items() if name not in ("bias_k", "bias_v")}
    return {name: p for name, p in own.items() if p.dim() > 1 and p.is_floating_point()}


def _flat(layer: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in _weights(layer).values()])


def _share(
    layer: nn.Module, clusters: int, config: Kmeans, seed: int, book: np.ndarray | None = None
) -> int:
    """Give a layer's weights few values; return how many at most, zeros aside."""
    most = 0
    for parameter in _weights(layer).values():
        scaled = config.scope == "channel" and not isinstance(layer, _ConvTransposeNd)
        values, scale = _scaled(parameter, scaled)
        kept = values != 0
        ends = (-1.0, 1.0) if scaled else None
        table = book
        if table is None:
            few = max(min(clusters, parameter.numel() // FEWEST), 2)
            table = choose(values[kept], few, init=config.init, ends=ends, seed=seed)
        if not len(table):
            continue  # nothing but zeros
        values[kept] = table[nearest(values[kept], table)]
        made = torch.from_numpy(values) * scale
        with torch.no_grad():
            parameter.copy_(made.view(parameter.shape))
        most = max(most, len(np.unique(values[kept])))
    return most


def _scaled(parameter: Tensor, scaled: bool) -> tuple[np.ndarray, Tensor]:
    """Return the weights as an array (O, I), and what each row was divided by."""
    rows = parameter.detach().double().flatten(1)
    scale = torch.ones(len(rows), 1, dtype=torch.float64)
    if scaled:
        largest = rows.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest, scale)
    return (rows / scale).numpy(), scale


def _one_book(chosen: Mapping[str, nn.Module], config: Kmeans, seed: int) -> np.ndarray:
    values = torch.cat([_flat(layer) for layer in chosen.values()]).numpy()
    return choose(values[values != 0], config.clusters, init=config.init, seed=seed)


def _by_sensitivity(
    net: nn.Module, chosen: Mapping[str, nn.Module], config: Kmeans, context: Context
) -> tuple[dict[str, int], Mapping[str, Mapping[int, float]]]:
    """Choose bits of a code for each layer: least loss under the size."""
    assert config.size is not None
    if context.data.calibration is None:
        raise DataError("kmeans: size needs calibration data; give it, or set clusters")
    solver()  # before minutes of work
    captured = capture(net, context.inputs)
    assert isinstance(captured, fx.GraphModule)
    batch = gather(captured, context.data.calibration, context.inputs, config.samples)
    counts = {n: sum(p.numel() for p in _weights(m).values()) for n, m in chosen.items()}
    # what a called layer holds, such as the output projection of attention, is measured as it
    called = {str(n.target) for n in captured.graph.nodes if n.op == "call_module"}
    over = {name: _called(name, called) for name in chosen}
    rounds: list[dict[str, str]] = [{n: n for n, own in over.items() if n == own}]
    rounds += [{n: own} for n, own in over.items() if n != own]
    found: dict[str, Mapping[int, float]] = {}
    for names in rounds:
        variants: dict[str, dict[int, nn.Module]] = {}
        for name, own in names.items():
            variants[own] = {}
            for bits in range(1, 9):
                made = variants[own][bits] = copy.deepcopy(net.get_submodule(own))
                inner = made.get_submodule(name[len(own) :].lstrip("."))
                _share(inner, 2**bits, config, context.seed)
        losses = losses_of(captured, variants, batch, track=context.track)
        found |= {name: losses[own] for name, own in names.items()}
    total = _FLOAT_BITS * sum(counts.values())
    costs = {n: {b: counts[n] * b / total for b in range(1, 9)} for n in chosen}
    return solve(found, Budget(costs=costs, most=config.size)), found


def _called(name: str, called: Collection[str]) -> str:
    """Return the called layer that `name` is, or is inside of; itself where there is none."""
    parts = name.split(".")
    prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in called), name)
