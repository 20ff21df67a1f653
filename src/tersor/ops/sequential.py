"""Change a network layer by layer, each with the inputs that it gets from the layers before.

Those are changed already, so later layers can make up for what earlier ones lost. All batches stand
still at the same layer; what they hold are the values alive there, not those of other layers.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tersor.core.context import Batch
from tersor.core.errors import DataError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.ops.attention import split_attention
from tersor.ops.calibrate import checked
from tersor.ops.capture import capture
from tersor.ops.masks import hold, prunable
from tersor.ops.matrices import input_rows, unmatrices
from tersor.ops.walk import carried_bytes, walk

_CARRIED_BYTES = 2**30
"""About as much memory as the values between two layers may take, for all samples together."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A layer that is about to run, on every batch."""

    name: str
    layer: nn.Module
    """May be changed: it runs after the stop, as it then is."""
    inputs: Sequence[Tensor]
    """Of each batch."""

    def gathered(self, total: Tensor, add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum over all inputs of the layer's matrices.

        Args:
            total: To begin with.
            add: (total, inputs (G, N, C)) -> total; raises ValueError where they are not finite.

        Raises:
            DataError: `add` refuses; names batch and layer.
        """
        for index, x in enumerate(self.inputs):
            for rows_GNC in input_rows(self.layer, x):
                try:
                    total = add(total, rows_GNC)
                except ValueError as error:
                    raise DataError(
                        f"calibration batch {index} gives {error} at the input of {self.name!r}; "
                        "leave that sample out, or check the weights before that layer"
                    ) from error
        return total


def open_layers(net: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return a graph over the network's own weights in which attention is made of linear layers.

    Changing a weight of the graph in place changes the network's.
    """
    captured = capture(net, inputs)
    scratch = fx.GraphModule(captured, copy.deepcopy(captured.graph), type(net).__name__)
    split_attention(scratch, inputs)
    return scratch.eval()


def one_by_one(
    graph: fx.GraphModule, layers: Layers
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Choose the layers that can be changed by the inputs they get.

    Returns:
        (name -> layer, in the order they run; name -> why it is left as it is).

    Raises:
        RecipeError, StepError: `layers` fits nothing; a weight is NaN or infinite.
        UnfitError: no layer is fit.
    """
    chosen, left = prunable(graph, layers)
    calls = Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_module")
    owners = Counter(id(tensor) for m in graph.modules() for tensor in m.parameters(recurse=False))
    fit: dict[str, nn.Module] = {}
    for name in calls:
        if name not in chosen:
            continue
        layer = chosen[name]
        if isinstance(layer, _ConvTransposeNd):
            left[name] = "a transposed convolution: its inputs act on overlapping outputs"
        elif calls[name] > 1:
            left[name] = f"called {calls[name]} times, with inputs of several kinds"
        elif owners[id(layer.weight)] > 1:
            left[name] = "shares its weight with another layer"
        else:
            fit[name] = layer
    left |= {name: _not_called(graph, name) for name in chosen if name not in calls}
    if not fit:
        told = "; ".join(f"{name!r}: {reason}" for name, reason in left.items())
        raise UnfitError(f"no layer can be pruned by its inputs: {told}")
    check_finite(fit)
    return fit, left


def _not_called(graph: fx.GraphModule, name: str) -> str:
    parent = dict(graph.named_modules()).get(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "inside attention of a form that is not split into layers, so its inputs are unknown"
    return "not called"


def check_finite(layers: Mapping[str, nn.Module]) -> None:
    """Refuse weights that cannot be compared.

    Raises:
        StepError: NaN or infinity; names the layer.
    """
    for name, layer in layers.items():
        assert isinstance(layer.weight, Tensor)
        bad = int((~torch.isfinite(layer.weight)).sum())
        if bad:
            raise StepError(
                f"layer {name!r}: {bad} of {layer.weight.numel()} weights are NaN or infinite; "
                "repair or retrain the network first"
            )


def drawn(
    graph: fx.GraphModule,
    names: Sequence[str],
    batches: Iterable[Batch] | None,
    inputs: Inputs,
    samples: int,
) -> list[Batch]:
    """Take the first samples of the calibration data, without labels.

    Fewer than `samples` are taken where what they hold between layers would fill the memory.

    Raises:
        DataError: no batch, or one that does not fit; names it.
    """
    if batches is None:
        raise DataError("calibration data is needed: a few hundred samples, without labels")
    rows = next(iter(inputs.example.values())).shape[0]
    each = max(carried_bytes(graph, names, rows), 1.0)
    wanted = max(min(samples, int(_CARRIED_BYTES / each)), 1)
    taken: list[Batch] = []
    count = 0
    for batch, own in checked(batches, inputs):
        taken.append({name: batch[name][: wanted - count] for name in inputs.example})
        count += min(own, wanted - count)
        if count >= wanted:
            break
    return taken


def num_samples(batches: Sequence[Batch], inputs: Inputs) -> int:
    """Count the samples of batches."""
    name = next(iter(inputs.example))
    return sum(len(batch[name]) for batch in batches)


def layer_by_layer(
    graph: fx.GraphModule, names: Iterable[str], batches: Sequence[Batch]
) -> Iterator[Stop]:
    """Run all batches up to one layer after the other.

    Args:
        graph: The network, in eval mode.
        names: Layers to stop at, each called once.
        batches: Inputs by name.

    Raises:
        DataError: the network refuses a batch; names it.
    """
    watched = set(names)
    walks = [_told(walk(graph, batch, watched), i) for i, batch in enumerate(batches)]
    for steps in zip(*walks, strict=True):
        name = str(steps[0][0].target)
        inputs = [x for _, x, _ in steps if x is not None]
        if inputs:
            yield Stop(name=name, layer=graph.get_submodule(name), inputs=inputs)


_Step = tuple[fx.Node, Tensor | None, Tensor | None]


def _told(steps: Iterator[_Step], index: int) -> Iterator[_Step]:
    """Say which batch it was that the network refused."""
    try:
        yield from steps
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        text = str(error).strip().partition("\n")[0]
        raise DataError(f"calibration batch {index} fails in the network: {text}") from error


def prune_in_turn(
    net: nn.Module,
    graph: fx.GraphModule,
    stops: Iterable[Stop],
    prune: Callable[[Stop], tuple[Tensor, Tensor]],
) -> None:
    """Prune layer after layer, and have the zeros stay zero.

    Args:
        net: The network that `graph` was opened from; changed, but not where something fails.
        graph: Its layers.
        stops: What `layer_by_layer` yields.
        prune: Layer -> (its new matrices, mask of them that is True where a weight stays).
    """
    before: list[tuple[Tensor, Tensor]] = []
    keep: dict[str, Tensor] = {}
    try:
        for stop in stops:
            weight = stop.layer.weight
            assert isinstance(weight, Tensor)
            weight_GRC, keep_GRC = prune(stop)
            before.append((weight, weight.detach().clone()))
            keep[stop.name] = unmatrices(stop.layer, keep_GRC)
            with torch.no_grad():
                weight.copy_(unmatrices(stop.layer, weight_GRC * keep_GRC))
        hold_open(net, graph, keep)
    except BaseException:
        with torch.no_grad():
            for weight, old in before:
                weight.copy_(old)
        raise


def hold_open(net: nn.Module, graph: fx.GraphModule, keep: Mapping[str, Tensor]) -> None:
    """Set weights to zero, and have them stay zero.

    Args:
        net: The network that `graph` was opened from.
        graph: Its layers, by the names of the masks.
        keep: Layer name -> mask of its weight's shape, True where a weight stays.
    """
    own = {name for name, module in net.named_modules() if hasattr(module, "weight")}
    hold(net, {name: mask for name, mask in keep.items() if name in own})
    # the projections of attention are rows of a weight that the network has in one
    hold(graph, {name: mask for name, mask in keep.items() if name not in own})
