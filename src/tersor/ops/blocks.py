"""Find the residual blocks of a network: x takes a way around them, so they may be left out."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.model import Inputs
from tersor.ops.capture import capture


class PassThrough(nn.Module):
    """Return the first argument: stands where a block with several arguments was."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument as it is."""
        return args[0] if args else next(iter(kwargs.values()))

    def arguments(self) -> dict[str, Any]:
        """Return what rebuilds this module."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual block, and what may stand in its place."""

    name: str
    """Dotted name in the network."""
    kind: str
    """Its class."""
    parameters: int
    """Numbers it holds."""
    substitute: type[nn.Module]
    """nn.Identity, or PassThrough where the block is called with more than one argument."""


def find_blocks(net: nn.Module, inputs: Inputs) -> tuple[list[Block], dict[str, str]]:
    """List the residual blocks that can be bypassed, in the order of the graph.

    A module is one when it holds parameters, is called once, its one output has shape and dtype of
    its first argument, the input reaches the output through additions, activations, norms and
    dropout alone, and the network still runs on the example without it. Of nested ones the
    innermost count.

    Args:
        net: The network, in eval mode; unchanged on return.
        inputs: How to call it.

    Returns:
        The blocks, and for modules that look like one but cannot be bypassed: name -> reason.
    """
    calls = _record_calls(net, inputs)
    residual = [n for n in _residual_modules(capture(net, inputs)) if n in calls]
    innermost = [n for n in residual if not any(m.startswith(f"{n}.") for m in residual)]
    blocks, refused = [], {}
    for name in innermost:
        module = net.get_submodule(name)
        block = Block(
            name=name,
            kind=type(module).__name__,
            parameters=sum(p.numel() for p in module.parameters()),
            substitute=nn.Identity if calls[name] == 1 else PassThrough,
        )
        reason = _trial(net, block, inputs)
        if reason:
            refused[name] = reason
        elif block.parameters:
            blocks.append(block)
    return blocks, refused


@contextmanager
def bypassed(net: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """Take blocks out of `net` for as long as the context lasts."""
    held = {block.name: net.get_submodule(block.name) for block in blocks}
    bypass(net, blocks)
    try:
        yield net
    finally:
        for name, module in held.items():
            net.set_submodule(name, module)


def bypass(net: nn.Module, blocks: Sequence[Block]) -> None:
    """Put substitutes in the place of blocks; all other dotted names stay as they are."""
    for block in blocks:
        substitute = block.substitute()
        substitute.training = net.get_submodule(block.name).training
        net.set_submodule(block.name, substitute)


def _trial(net: nn.Module, block: Block, inputs: Inputs) -> str:
    """Return why the network does not run without a block, or an empty string."""
    with torch.no_grad(), bypassed(net, [block]):
        try:
            net(**inputs.example)
        except Exception as error:  # any: this is the user's own forward
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def _record_calls(net: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Run the example; map each module that is called once, on a tensor, to its arguments."""
    seen: dict[str, list[int]] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            fits = (
                isinstance(first, Tensor)
                and isinstance(output, Tensor)
                and first.shape == output.shape
                and first.dtype == output.dtype
            )
            # -1 keeps a module with an unfit call out, even when its other calls fit.
            plain = bool(args)
            count = len(args) + len(kwargs) if plain else len(kwargs) + 1
            seen.setdefault(name, []).append(count if fits else -1)

        return note

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in net.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            net(**inputs.example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[0] for name, calls in seen.items() if len(calls) == 1 and calls[0] > 0}


def _residual_modules(captured: fx.GraphModule) -> list[str]:
    """List the modules through which the input finds a way around the layers, in graph order."""
    inside: dict[str, list[fx.Node]] = {}
    for node in captured.graph.nodes:
        for name, _ in node.meta.get("nn_module_stack", {}).values():
            if name and not (node.op == "call_module" and node.target == name):
                inside.setdefault(name, []).append(node)
    return [name for name, nodes in inside.items() if _has_way_around(captured, nodes)]


def _has_way_around(captured: fx.GraphModule, nodes: list[fx.Node]) -> bool:
    own = set(nodes)
    outputs = [n for n in nodes if any(user not in own for user in n.users)]
    outputs = [n for n in outputs if n.meta.get("shape") is not None]
    if len(outputs) != 1:
        return False
    shape = outputs[0].meta["shape"]
    # (node, whether an addition was passed), from the output backwards
    front = [(outputs[0], False)]
    visited = set()
    while front:
        node, added = front.pop()
        if (node, added) in visited:
            continue
        visited.add((node, added))
        if node not in own:
            if added and node.meta.get("shape") == shape:
                return True
            continue
        is_addition = _callee(captured, node) in _ADDITIONS
        if is_addition or _callee(captured, node) in _HARMLESS:
            front += [(n, added or is_addition) for n in node.all_input_nodes]
    return False


def _callee(captured: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "call_module":
        module = captured.get_submodule(str(node.target))
        return _BatchNorm if isinstance(module, _BatchNorm) else type(module)
    return node.target


_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_HARMLESS = frozenset(
    {
        *(F.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.dropout, F.layer_norm, F.hardswish),
        *(torch.relu, torch.relu_, "relu", "relu_", "contiguous"),
        *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.Identity),
        *(nn.Dropout, nn.Dropout2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm),
    }
)
"""What may lie on the way around: it keeps the shape and each channel's meaning."""
