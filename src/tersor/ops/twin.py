"""The float network beside the quantized one that was made from it, layer by layer.

Repair without labels compares the two. A technique that rounds calls `remember` first; the twin
lives until the end of the stage.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.core.context import Batch
from tersor.core.errors import DataError, UnfitError
from tersor.core.model import Inputs
from tersor.ops.calibrate import checked
from tersor.ops.modules import QUANTIZED, GroupedLinear, QuantLinear
from tersor.ops.rectifiers import Rectifier, rectifier
from tersor.ops.walk import walk

_KEY = "tersor.twin"
_LIVE_BYTES = 2**30
"""About as much memory as the activations of `gather` may take."""
_LIVE = 6
"""Tensors of the largest size that are alive at once, twin included."""


def remember(captured: fx.GraphModule) -> None:
    """Keep the float network of this moment with the graph; its layers are shared, not copied.

    A twin remembered before stays: it is the float network still.
    """
    if _KEY not in captured.meta:
        captured.meta[_KEY] = fx.GraphModule(captured, copy.deepcopy(captured.graph))


def twin_of(captured: nn.Module, technique: str) -> fx.GraphModule:
    """Return the float network that `captured` was rounded from.

    Raises:
        UnfitError: nothing was rounded in this stage.
    """
    found = getattr(captured, "meta", {}).get(_KEY)
    if found is None:
        raise UnfitError(
            f"{technique} repairs what a step before it in the same stage has rounded, and nothing "
            f"was; write them as one stage: [static, {technique}]"
        )
    assert isinstance(found, fx.GraphModule)
    return found


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One rounded layer, about to run, beside its float twin."""

    name: str
    layer: nn.Module
    """May be changed: it runs after the visit, as it then is."""
    twin: nn.Module
    x: Tensor
    """Input in the quantized network, with everything before it rounded and repaired."""
    wanted: Tensor
    """Output of the twin in the float network."""
    activation: Rectifier | None
    """What follows, where nothing else reads the output."""

    @property
    def channels_last(self) -> bool:
        """Whether channels are the last dimension of inputs and outputs, else the second."""
        return isinstance(self.layer, (QuantLinear, GroupedLinear))


def lockstep(
    captured: fx.GraphModule, twin: fx.GraphModule, batch: Mapping[str, Tensor]
) -> Iterator[Visit]:
    """Run both networks on one batch, side by side; stop before each rounded layer.

    Layers that are called more than once are passed over.

    Args:
        captured: The quantized network, in eval mode.
        twin: Its float twin.
        batch: Inputs by name.
    """
    modules = dict(captured.named_modules())
    calls = [str(n.target) for n in captured.graph.nodes if n.op == "call_module"]
    rounded = {n for n in calls if isinstance(modules[n], QUANTIZED) and calls.count(n) == 1}
    floats = walk(twin, batch, rounded)
    float_modules = dict(twin.named_modules())
    for node, x, _ in walk(captured, batch, rounded):
        if x is None:
            continue
        name = str(node.target)
        beside, wanted = next(
            (n, out) for n, _, out in floats if out is not None and str(n.target) == name
        )
        users = list(beside.users)
        yield Visit(
            name=name,
            layer=modules[name],
            twin=float_modules[name],
            x=x,
            wanted=wanted,
            activation=rectifier(users[0], float_modules) if len(users) == 1 else None,
        )


def gather(
    captured: fx.GraphModule, batches: Iterable[Batch] | None, inputs: Inputs, samples: int
) -> dict[str, Tensor]:
    """Put the first samples of the calibration data into one batch, without labels.

    Fewer than `samples` are taken where activations are so large that they would fill the memory.

    Raises:
        DataError: no batch, or one that does not fit; names it.
    """
    if batches is None:
        raise DataError("calibration data is needed: a few hundred samples, without labels")
    rows = next(iter(inputs.example.values())).shape[0]
    sizes = [
        4 * torch.Size(n.meta["shape"]).numel() / max(rows, 1)
        for n in captured.graph.nodes
        if n.meta.get("shape")
    ]
    room = int(_LIVE_BYTES / (_LIVE * max(sizes, default=1.0)))
    samples = max(min(samples, room), 1)
    parts: dict[str, list[Tensor]] = {name: [] for name in inputs.example}
    count = 0
    for batch, _ in checked(batches, inputs):
        shapes = {n: batch[n].shape[1:] for n in parts}
        if count and any(parts[n][0].shape[1:] != shape for n, shape in shapes.items()):
            continue
        for name, own in parts.items():
            own.append(batch[name][: samples - count])
        count += len(next(iter(parts.values()))[-1])
        if count >= samples:
            break
    return {name: torch.cat(own) for name, own in parts.items()}
