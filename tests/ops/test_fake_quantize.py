"""Rounding that is trained: gradients, folding, freezing, and what it settles to."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.context import Data
from tersor.core.model import Inputs
from tersor.ops.fake_quantize import FakeLayer, FakeRounding, _Round, late, settle
from tersor.ops.fold import fold_batch_norm
from tersor.ops.modules import QuantConv2d, Quantize, quantized, rows
from tersor.ops.precision import gains_from_bf16
from tersor.ops.quantize import channel_scales
from tersor.quantization.static import Static, static
from tests import networks


def plain(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """LSQ as in the paper, section 2.1, by autograd."""
    v = (x / scale).clamp(low, high)
    return (v + (v.round() - v).detach()) * scale


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_those_of_the_paper(channels: int) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 40, dtype=torch.float64)).requires_grad_()
    base = torch.tensor([[0.3], [0.2], [0.5]][:channels], dtype=torch.float64)
    factor = torch.ones_like(base, requires_grad=True)
    upstream = torch.randn(3, 40, dtype=torch.float64)
    made = _Round.apply(x, factor, base, 0, -7, 7, 40)
    made.backward(upstream)

    other = x.detach().clone().requires_grad_()
    scale = base.clone().requires_grad_()
    wanted = plain(other, scale, -7, 7)
    wanted.backward(upstream)
    assert torch.allclose(made, wanted)
    # half a step beyond the end still rounds to it: there the gradient passes, not so in `plain`
    v = (x / base).detach()
    edge = (v.abs() > 7) & (v.abs() < 7.5)
    assert torch.allclose(x.grad[~edge], other.grad[~edge])
    assert torch.equal(x.grad[edge], upstream[edge])
    beyond = (upstream * edge * -v).sum(0 if channels == 1 else 1, keepdim=True)
    beyond = beyond.sum(1, keepdim=True)
    expected = (scale.grad + beyond) / (40 * 7) ** 0.5 / base
    assert torch.allclose(factor.grad, expected)


def make(bits: int = 8, freeze: float = 0.5) -> tuple[FakeLayer, nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)
    with torch.no_grad():
        bn.weight.uniform_(0.5, 2)
        bn.bias.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    folded = copy.deepcopy(conv)
    fold_batch_norm(folded, bn.eval())
    scale = channel_scales(rows(folded), bits=bits)
    fake = FakeLayer(conv, bn, scale, bits=bits, ranges="learned", freeze=freeze)
    return fake, folded, bn


def test_in_eval_mode_it_is_the_folded_integer_layer() -> None:
    fake, folded, _ = make()
    x = torch.randn(2, 3, 6, 6)
    wanted = quantized(folded, fake.base)
    assert torch.allclose(fake.eval()(x), wanted(x), atol=1e-5)
    made = settle(nn.Sequential(fake))
    assert isinstance(made[0], QuantConv2d)
    assert torch.equal(made[0].weight, wanted.weight)


def test_training_sees_the_statistics_of_the_batch_until_it_is_frozen() -> None:
    fake, _, bn = make()
    x = 5 + 2 * torch.randn(8, 3, 6, 6)
    made = fake.train()(x)
    mean = made.mean((0, 2, 3))
    assert torch.allclose(mean, bn.bias, atol=1e-4)
    assert not fake.frozen
    step = late(fake)
    assert step is not None
    step(1, 10)
    assert not fake.frozen
    step(5, 10)
    assert fake.frozen
    before = bn.running_mean.clone()
    frozen = fake(x)
    assert torch.equal(bn.running_mean, before)
    assert torch.allclose(frozen, fake.eval()(x), atol=1e-5)


def test_a_dead_channel_stays_finite() -> None:
    fake, _, bn = make()
    with torch.no_grad():
        bn.weight[0] = 0.0
        fake.layer.weight[1] = 0.0
    x = torch.randn(8, 3, 6, 6)
    made = fake.train()(x)
    made.square().mean().backward()
    assert torch.isfinite(made).all()
    assert all(torch.isfinite(p.grad).all() for p in fake.parameters() if p.grad is not None)
    assert torch.isfinite(settle(nn.Sequential(fake.eval()))(x)).all()


def test_observed_ranges_follow_the_values_and_stop() -> None:
    start = Quantize(0.01, 0)
    fake = FakeRounding(start, ceiling=False, symmetric=False, ranges="observed", freeze=0.5)
    fake.train()
    for _ in range(600):
        fake(torch.tensor([-4.0, 6.0]))
    assert float(fake.base) == pytest.approx(10 / 255, rel=0.02)
    late(fake)(5, 10)  # type: ignore[misc]  # it has roundings
    fake(torch.tensor([-100.0, 100.0]))
    made = fake.eval().settled()
    assert isinstance(made, Quantize)
    assert made.scale == pytest.approx(10 / 255, rel=0.02)
    assert made.zero == round(4 / made.scale)


def test_a_ceiling_is_not_passed() -> None:
    fake = FakeRounding(
        Quantize(6 / 255, 0), ceiling=True, symmetric=False, ranges="learned", freeze=1
    )
    with torch.no_grad():
        fake.factor.fill_(1.5)
    assert 0.999 * 6 / 255 < fake.settled().scale <= 6 / 255


def test_rounding_is_not_trained_in_bfloat16() -> None:
    fake, _, _ = make()
    assert not gains_from_bf16(nn.Sequential(fake))
    assert late(nn.Linear(2, 2)) is None
    assert settle("anything") == "anything"


class Twice(nn.Module):
    """One layer for inputs of two sizes of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(20 * torch.tanh(self.shared(x)))


def test_a_layer_called_with_two_scales_is_left_with_float_sums(tiny_context: Any) -> None:
    torch.manual_seed(0)
    net = Twice().eval()
    x = torch.randn(64, 8)
    inputs = Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}})
    context = replace(tiny_context(net), inputs=inputs, data=Data(calibration=[{"x": x}]))
    made = settle(static(copy.deepcopy(net), Static(), context)).eval()
    roundings = {m.scale for m in made.modules() if isinstance(m, Quantize)}
    assert len(roundings) == 2
    assert made.get_submodule("shared").input_scale == 0.0
    with torch.no_grad():
        assert float((made(x) - net(x)).abs().max()) < 0.05 * float(net(x).abs().max())


def test_a_settled_layer_sums_exactly_and_its_bias_can_be_trained(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    made = settle(static(copy.deepcopy(net), Static(), tiny_context(net))).eval()
    layer = made.get_submodule("fc")
    scale = layer.input_scale
    assert scale > 0
    codes = torch.randint(-128, 128, (5, layer.in_features)).double()
    step = layer.scale.double() * scale
    bias = (layer.bias.detach().double() / step).round()
    wanted = (codes @ layer.weight.double().T + bias) * step
    with torch.no_grad():
        found = layer((codes * scale).float()).double()
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=0)
    layer.train()
    layer((codes * scale).float()).sum().backward()
    assert float(layer.bias.grad.abs().min()) > 0
