"""Scales and shifts of norms go into the layers behind them; outputs stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.fusion.fuse_norm_linear import FuseNormLinear, fuse_norm_linear
from tests import networks


class Normed(nn.Module):
    """A norm that two layers read; `also` something else, too."""

    def __init__(self, norm: nn.Module, bias: bool = True, also: bool = False) -> None:
        super().__init__()
        self.norm, self.also = norm, also
        self.left, self.right = nn.Linear(8, 4, bias=bias), nn.Linear(8, 4)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        made = self.left(y) + self.right(y)
        return made + y[..., :4] if self.also else made


def given() -> Inputs:
    return Inputs(example={"x": torch.randn(2, 5, 8)}, dynamic={"x": {0: "batch"}})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_columns_are_scaled(
    kind: Callable[[int], nn.Module], bias: bool, tiny_context: Callable[..., Any]
) -> None:
    net, inputs = Normed(kind(8), bias).eval(), given()
    x = inputs.example["x"]
    wanted, norm = net(x), net.norm
    scale, shift = norm.weight.clone().double(), getattr(norm, "bias", None)
    weight = net.left.weight.clone().double()
    old = net.left.bias.clone().double() if bias else torch.zeros(4).double()
    context = tiny_context(net, inputs=inputs)
    made = fuse_norm_linear(net, FuseNormLinear(), context)
    assert made is net
    assert context.facts["folded"] == ["norm"]
    assert not list(net.norm.parameters())
    columns = torch.stack([weight[:, i] * scale[i] for i in range(8)], dim=1)
    torch.testing.assert_close(net.left.weight.double(), columns, rtol=1e-6, atol=1e-7)
    if kind is nn.LayerNorm:
        # `shift` is the tensor that the norm held before
        torch.testing.assert_close(net.left.bias.double(), old + weight @ shift.double())
    else:
        assert (net.left.bias is None) is (not bias)
    torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_that_is_written_out(tiny_context: Callable[..., Any]) -> None:
    net, x = networks.written_transformer(), networks.digits()[0][:50]
    wanted = net(x)
    context = tiny_context(net)
    made = fuse_norm_linear(net, FuseNormLinear(), context)
    assert context.facts["folded"] == ["norm1", "scale"]
    assert "scale" not in dict(made.named_parameters())
    torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-4)


def test_reading_the_shape_is_no_reading(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net)
    fuse_norm_linear(net, FuseNormLinear(layers=Layers(patterns=("norm1",))), context)
    assert context.facts["folded"] == ["norm1"]
    assert context.facts["left"] == {"norm2": "excluded by layers"}
    assert net.norm2.weight is not None


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Normed(nn.LayerNorm(8), also=True), "norm: read by getitem, which is no linear layer"),
        (nn.Sequential(nn.Linear(8, 4)), "the network has no layer norm or RMS norm with a scale"),
        (nn.Sequential(nn.LayerNorm((5, 8)), nn.Linear(8, 4)), "more than the last dimension"),
    ],
)
def test_what_stays_is_said_and_untouched(
    net: nn.Module, message: str, tiny_context: Callable[..., Any]
) -> None:
    net.eval()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    inputs = given()
    if isinstance(net, nn.Sequential):
        inputs = Inputs(example={"input": inputs.example["x"]})
    with pytest.raises(UnfitError, match=rf"no norm can be folded \(.*{message}"):
        fuse_norm_linear(net, FuseNormLinear(), tiny_context(net, inputs=inputs))
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def test_misspelt_layer(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_transformer(trained=False)
    config = FuseNormLinear(layers=Layers(patterns=("nrom1",)))
    with pytest.raises(RecipeError, match=r"'nrom1' matches no layer. Did you mean 'norm1'"):
        fuse_norm_linear(net, config, tiny_context(net))
