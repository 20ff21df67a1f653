"""Rounding to train with: forward as the integers will compute, backward past the rounding.

`FakeLayer` and `FakeRounding` stand where integer weights and roundings will be; `settle` puts
those in their place when training is over. The gradient of a rounding is 1 inside the range and 0
outside (straight-through estimator, Bengio et al., arXiv:1308.3432). The step is learned, too (LSQ,
Esser et al., arXiv:1902.08153), as a factor on where it started: plain gradient descent then moves
it exactly as in the paper, and optimizers that normalize gradients, as Adam does, stay stable.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.ops.modules import INTEGER, Quantize, channels_of, quantized, rows
from tersor.ops.quantize import activation_grid, channel_scales, exact_scale

Ranges = Literal["learned", "observed"]
_MOMENTUM = 0.01
"""Of the moving averages of ranges; arXiv:1712.05877 asks for many steps' memory."""
_LEAST = 0.01
"""Smallest factor on a step's first value."""
_DEAD = 1e-8


class _Round(torch.autograd.Function):
    """Round `x` to codes of (base * factor) and back; gradients for `x` and `factor`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        base: Tensor,
        zero: int,
        low: int,
        high: int,
        count: int,
    ) -> Tensor:
        scale = base * factor.clamp_min(_LEAST)
        # as `Quantize` computes it, to the bit
        scaled = x * (1.0 / scale.item()) if scale.numel() == 1 else x / scale
        made = scaled.round_().clamp_(low - zero, high - zero).mul_(scale)
        ctx.save_for_backward(x, made, scale, base)
        ctx.ends = (low - zero - 0.5, high - zero + 0.5)
        ctx.share = 1 / math.sqrt(count * high)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, made, scale, base = ctx.saved_tensors
        (grad,), (low, high) = grads, ctx.ends
        if scale.numel() == 1:
            # the backward of a clip, several times faster than a mask
            past = torch.ops.aten.hardtanh_backward(
                grad, x, low * scale.item(), high * scale.item()
            )
            moved = torch.dot(grad.flatten(), made.flatten()) - torch.dot(
                past.flatten(), x.flatten()
            )
        else:
            past = grad * ((x > low * scale) & (x < high * scale))
            moved = (grad * made - past * x).sum([d for d in range(x.dim()) if scale.shape[d] == 1])
        # inside: (codes - x / scale), outside: the code of the end; both are (made - past) / scale
        moved = moved.view(scale.shape) / scale * (ctx.share / base)
        return past, moved, None, None, None, None, None


class FakeRounding(nn.Module):
    """Activations as 8-bit codes and back, while training.

    Args:
        start: Scale and codes to begin with, from calibration.
        ceiling: No code may come to stand for more than it does at the start: a clip at this value
            is fused away only then.
        symmetric: Whether the codes are symmetric around 0.
        ranges: "learned": the scale is trained; "observed": moving averages of the smallest and
            largest values decide it until it is frozen.
    """

    base: Tensor
    zero: Tensor
    ends: Tensor
    frozen: Tensor
    factor: nn.Parameter
    low: int
    high: int
    symmetric: bool
    freeze: float
    ceiling: bool
    ranges: Ranges

    def __init__(
        self, start: Quantize, *, ceiling: bool, symmetric: bool, ranges: Ranges, freeze: float
    ) -> None:
        super().__init__()
        self.low, self.high, self.symmetric, self.freeze = start.low, start.high, symmetric, freeze
        self.ceiling, self.ranges = ceiling, ranges
        self.register_buffer("base", torch.tensor([start.scale]))
        self.register_buffer("zero", torch.tensor(start.zero))
        codes = torch.tensor([start.low - start.zero, start.high - start.zero])
        self.register_buffer("ends", codes * start.scale)
        self.register_buffer("frozen", torch.tensor(False))
        self.factor = nn.Parameter(torch.ones(1), requires_grad=ranges == "learned")

    def forward(self, x: Tensor) -> Tensor:
        """Return what the codes of `x` stand for."""
        if self.training and self.ranges == "observed" and not self.frozen:
            self._observe(x.detach())
        made: Tensor = _Round.apply(  # type: ignore[no-untyped-call]  # not in the stubs
            x.float(),
            self._factor(),
            self.base,
            int(self.zero),
            self.low,
            self.high,
            max(x[:1].numel(), 1),
        )
        return made

    def _factor(self) -> Tensor:
        return self.factor.clamp_max(1.0) if self.ceiling else self.factor

    def _observe(self, x: Tensor) -> None:
        seen = torch.stack(torch.aminmax(x.float())).to(self.ends)
        self.ends.lerp_(seen, _MOMENTUM)
        low, high = self.ends.tolist()
        scale, zero, _, _ = activation_grid(
            low, high, symmetric=self.symmetric, inside=self.ceiling
        )
        self.base.fill_(scale)
        self.zero.fill_(zero)

    def settled(self) -> nn.Module:
        """Return the rounding that the runtimes know."""
        scale, zero = (self.base * self._factor().clamp_min(_LEAST)).item(), int(self.zero)
        most = self.base.item() if self.ceiling else None
        return Quantize(exact_scale(scale, zero, most), zero, self.low, self.high)


class FakeLayer(nn.Module):
    """A layer whose weights are rounded while training, with its batch norm folded in.

    The batch norm is folded with its running statistics before the weights are rounded, as they
    will be; until it is frozen, the output is set back to the statistics of the batch, so that
    training goes as without rounding (Krishnamoorthi, arXiv:1806.08342, section 3.2.2).

    Args:
        layer: A convolution or linear layer with float weights.
        bn: Its batch norm with running statistics, or None.
        scale_O: Scale of each output channel to begin with.
        bits: Of a code.
        ranges: "learned": scales are trained; "observed": they follow the largest weights.
        freeze: Share of the steps after which statistics and observed ranges stay.
    """

    layer: nn.Module
    bn: _BatchNorm | None
    base: Tensor
    frozen: Tensor
    factor: nn.Parameter
    bits: int
    ranges: Ranges
    freeze: float
    axis: int

    def __init__(
        self,
        layer: nn.Module,
        bn: _BatchNorm | None,
        scale_O: Tensor,
        *,
        bits: int,
        ranges: Ranges,
        freeze: float,
    ) -> None:
        super().__init__()
        self.layer, self.bn, self.ranges, self.freeze = layer, bn, ranges, freeze
        self.axis = channels_of(layer)
        self.register_buffer("frozen", torch.tensor(False))
        self.register_buffer("base", scale_O)
        self.factor = nn.Parameter(torch.ones_like(scale_O), requires_grad=ranges == "learned")
        self.bits = bits

    def restart(self, bits: int) -> None:
        """Go on with other codes; scales begin anew, at the smallest squared error."""
        with torch.no_grad():
            folded = self._folded()[0]
            self.base = channel_scales(rows(self.layer, folded), bits=bits, clip=True)
            self.factor.fill_(1.0)
            self.frozen.fill_(False)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer and batch norm."""
        weight, bias, shift_O = self._folded()
        if self.training and self.ranges == "observed" and not self.frozen:
            with torch.no_grad():
                self.base = channel_scales(rows(self.layer, weight), bits=self.bits)
        weight = self._rounded(weight)
        if self.bn is None or not self.training or bool(self.frozen):
            return self._call(x, weight, bias)
        assert shift_O is not None
        outputs = self._call(x, weight, None) / shift_O.view(-1, *[1] * (x.dim() - 2))
        own = self.layer.bias
        if isinstance(own, Tensor):
            outputs = outputs + own.view(-1, *[1] * (x.dim() - 2))
        made: Tensor = self.bn(outputs)
        return made

    def _folded(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return weight and bias with the batch norm folded in, and its factor."""
        weight, bias, bn = self.layer.weight, self.layer.bias, self.bn
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        if bn is None:
            return weight, bias, None
        assert bn.running_mean is not None
        assert bn.running_var is not None
        factor_O = (bn.running_var + bn.eps).rsqrt()
        if bn.weight is not None:
            factor_O = factor_O * bn.weight
        factor_O = torch.where(factor_O.abs() < _DEAD, _DEAD, factor_O)
        shift_O = -bn.running_mean if bias is None else bias - bn.running_mean
        shift_O = shift_O * factor_O
        if bn.bias is not None:
            shift_O = shift_O + bn.bias
        return weight * self._wide(factor_O), shift_O, factor_O

    def _rounded(self, weight: Tensor) -> Tensor:
        most = 2 ** (self.bits - 1) - 1
        made: Tensor = _Round.apply(  # type: ignore[no-untyped-call]  # not in the stubs
            weight,
            self._wide(self.factor),
            self._wide(self.base),
            0,
            -most,
            most,
            weight[0].numel(),
        )
        return made

    def _wide(self, values_O: Tensor) -> Tensor:
        """Shape values of channels like the weight."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return values_O.view(shape)

    def _call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own: dict[str, Any] = {"weight": weight, "bias": bias}
        made: Tensor = functional_call(self.layer, own, (x,))
        return made

    def settled(self) -> nn.Module:
        """Return the layer of integer weights."""
        with torch.no_grad():
            weight, bias, _ = self._folded()
            scale_O = self.base * self.factor.clamp_min(_LEAST)
            layer: Any = self.layer
            layer.weight = nn.Parameter(weight.clone())
            layer.bias = None if bias is None else nn.Parameter(bias.clone())
            return quantized(layer, scale_O, self.bits)


def late(net: nn.Module) -> Callable[[int, int], None] | None:
    """Return what a trainer is to call after each step, with the steps done and all; or None.

    It freezes batch norms and observed ranges when their time has come.
    """
    fakes = [m for m in net.modules() if isinstance(m, (FakeLayer, FakeRounding))]
    if not fakes:
        return None

    def on_step(done: int, total: int) -> None:
        for fake in fakes:
            if done >= fake.freeze * total:
                fake.frozen.fill_(True)

    return on_step


def settle(net: Any) -> Any:
    """Put integer layers where rounding was trained, and biases of integer layers on their grid.

    A runtime keeps a bias in steps of (input scale * weight scale) with 32 bits. Rounded to them
    in memory, too, both compute the same. Layers are told the scale of the codes that come in, with
    which they sum exactly. Other networks stay as they are.
    """
    if not isinstance(net, nn.Module):
        return net
    for name, fake in list(net.named_modules()):
        if isinstance(fake, (FakeLayer, FakeRounding)):
            net.set_submodule(name, fake.settled().eval())
    if isinstance(net, fx.GraphModule):
        _tell_scales(net)
    return net


def _tell_scales(captured: fx.GraphModule) -> None:
    modules = dict(captured.named_modules())
    scales: dict[Any, set[float]] = {}
    for node in captured.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, INTEGER):
            source = node.args[0] if node.args else node.kwargs.get("input")
            before = modules.get(str(source.target)) if isinstance(source, fx.Node) else None
            scale = before.scale if isinstance(before, Quantize) else 0.0
            scales.setdefault(layer, set()).add(scale)
    for layer, found in scales.items():
        # a layer that is called with codes of several scales has no one grid
        layer.input_scale = found.pop() if len(found) == 1 else 0.0
        if layer.input_scale and isinstance(layer.bias, Tensor):
            step = layer.input_scale * layer.scale.double()
            bias = ((layer.bias.detach().double() / step).round() * step).float()
            layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
