"""Chains of plain layers that stand in for one layer: what they cost, and how they are put in.

What a decomposition leaves behind is an `nn.Sequential` of plain `nn.Linear` or `nn.Conv` layers
under the name of the layer that it replaces. Every later step sees these, and nothing new.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

_CONVOLUTIONS: tuple[type[nn.Linear] | type[_ConvNd], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
)
"""By the number of a kernel's dimensions; none: a linear layer."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One layer of a chain."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    """Size in each dimension; () is a linear layer."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def parameters(self) -> int:
        """Numbers of the weight; the bias is that of the layer before, in every chain."""
        return self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)

    def size_after(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the size of its output for an input of this size; of a linear layer the same."""
        if not self.kernel or self.padding == "same":
            return tuple(size)
        padding = (0,) * len(self.kernel) if isinstance(self.padding, str) else self.padding
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // stride + 1
            for s, k, stride, p, d in zip(
                size, self.kernel, self.stride, padding, self.dilation, strict=True
            )
        )

    def build(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return the layer with these weights, in float32."""
        kind = _CONVOLUTIONS[len(self.kernel)]
        with torch.device("meta"):
            made: nn.Module
            if kind is nn.Linear:
                made = nn.Linear(self.inputs, self.outputs, bias is not None)
            else:
                assert issubclass(kind, _ConvNd)
                made = kind(  # type: ignore[call-arg]  # the base class has other arguments
                    self.inputs,
                    self.outputs,
                    self.kernel,  # type: ignore[arg-type]  # of the dimensions that kind has
                    stride=self.stride,
                    padding=self.padding,
                    dilation=self.dilation,
                    groups=self.groups,
                    bias=bias is not None,
                    padding_mode=self.padding_mode,  # type: ignore[arg-type]  # one that a layer had
                )
        made.weight = nn.Parameter(weight.float().contiguous())
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone())
        return made


def part_of(layer: nn.Module) -> Part:
    """Describe a linear layer or convolution."""
    if isinstance(layer, nn.Linear):
        return Part(inputs=layer.in_features, outputs=layer.out_features)
    assert isinstance(layer, _ConvNd)
    padding = layer.padding
    return Part(
        inputs=layer.in_channels,
        outputs=layer.out_channels,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )


def pointwise(inputs: int, outputs: int, dimensions: int, groups: int = 1) -> Part:
    """Describe a 1x1 convolution, or a linear layer where there are no dimensions."""
    return Part(
        inputs=inputs,
        outputs=outputs,
        kernel=(1,) * dimensions,
        stride=(1,) * dimensions,
        padding=(0,) * dimensions,
        dilation=(1,) * dimensions,
        groups=groups,
    )


def parameters_of(parts: Sequence[Part]) -> int:
    """Count the numbers of a chain's weights."""
    return sum(part.parameters for part in parts)


def macs_of(parts: Sequence[Part], size: Sequence[int]) -> int:
    """Count the multiply-accumulates of a chain for one sample.

    Args:
        parts: In order.
        size: Of the input without batch and channels; of a linear layer the positions.
    """
    total = 0
    for part in parts:
        size = part.size_after(size)
        total += part.parameters * math.prod(size)
    return total


def build(parts: Sequence[Part], weights: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
    """Return the chain; the bias goes to its last layer.

    Args:
        parts: In order.
        weights: Of each part, in the shape of its layer's weight.
        bias: Of the layer that is replaced.
    """
    last = len(parts) - 1
    layers = [
        part.build(weight, bias if i == last else None)
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True))
    ]
    return nn.Sequential(*layers).eval()


def replace(
    net: nn.Module, captured: fx.GraphModule, chains: dict[str, nn.Sequential]
) -> nn.Module:
    """Put chains in the places of layers.

    Args:
        net: Changed in place.
        captured: Its graph; the same object where the network is one.
        chains: By the dotted name of the layer that each replaces.

    Returns:
        The network; or its graph, where an owner from torch reads the weights of its layers.
    """
    if net is captured or any(_owner_reads(net, name) for name in chains):
        _rewrite(captured, chains)
        return captured
    for name, chain in chains.items():
        net.set_submodule(name, chain)
    return net


def _owner_reads(net: nn.Module, name: str) -> bool:
    owner = net.get_submodule(name.rpartition(".")[0])
    return type(owner).__module__.startswith("torch.nn") and not isinstance(owner, _CONTAINERS)


def _rewrite(captured: fx.GraphModule, chains: dict[str, nn.Sequential]) -> None:
    """Call the layers of each chain where the graph calls the layer that it replaces."""
    for node in list(captured.graph.nodes):
        chain = chains.get(str(node.target)) if node.op == "call_module" else None
        if chain is None:
            continue
        value = node.args[0] if node.args else node.kwargs["input"]
        with captured.graph.inserting_before(node):
            for i in range(len(chain)):
                value = captured.graph.create_node("call_module", f"{node.target}.{i}", (value,))
        node.replace_all_uses_with(value)
        captured.graph.erase_node(node)
    for name, chain in chains.items():
        captured.set_submodule(name, chain)
    captured.recompile()
