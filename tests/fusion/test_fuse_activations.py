"""Activations are recognized by what they compute, in any spelling, and by nothing else."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import UnfitError
from tersor.core.model import Inputs
from tersor.fusion.fuse_activations import FuseActivations, fuse_activations
from tersor.ops import edits
from tests import networks

SPELLINGS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "gelu": [
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476)),
        lambda x: x * (torch.erf(x / 1.4142135623730951) + 1) / 2,
    ],
    "gelu_tanh": [
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))),
        lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    ],
    "silu": [lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid() * x],
    "hardswish": [
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * (F.relu6(x + 3.0) * (1 / 6)),
        lambda x: x * F.hardsigmoid(x),
        lambda x: x * torch.clamp(x + 3, 0, 6) / 6.0,
    ],
    "hardsigmoid": [lambda x: F.relu6(x + 3) / 6, lambda x: torch.clamp(x / 6 + 0.5, 0, 1)],
}


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def given() -> Inputs:
    return Inputs(example={"x": 3 * torch.randn(4, 8)}, dynamic={"x": {0: "batch"}})


@pytest.mark.parametrize(
    ("name", "function"), [(name, f) for name, some in SPELLINGS.items() for f in some]
)
def test_each_spelling(
    name: str, function: Callable[[Tensor], Tensor], tiny_context: Callable[..., Any]
) -> None:
    net, inputs = Between(function).eval(), given()
    wanted = net(**inputs.example)
    context = tiny_context(net, inputs=inputs)
    made = fuse_activations(net, FuseActivations(), context)
    assert context.facts["named"] == {name: 1}
    inside = [n for n in made.graph.nodes if n.op == "call_function"]
    assert len(inside) == 1
    # the constants of a spelling have 7 digits or more
    torch.testing.assert_close(made(**inputs.example), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.702 * x),  # an approximation of GELU is not GELU
        lambda x: x * F.relu6(x + 2) / 6,
        lambda x: 0.5 * x * (1 + torch.erf(x / 1.41)),
        lambda x: x * torch.sigmoid(x.roll(1, -1)),
        F.gelu,
    ],
)
def test_what_computes_something_else_stays(
    function: Callable[[Tensor], Tensor], tiny_context: Callable[..., Any]
) -> None:
    net = Between(function).eval()
    with pytest.raises(UnfitError, match=r"no activation is spelled out in several operators$"):
        fuse_activations(net, FuseActivations(), tiny_context(net, inputs=given()))


def test_a_value_that_is_read_elsewhere_stays(tiny_context: Callable[..., Any]) -> None:
    def gated(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate.mean()

    net = Between(gated).eval()
    with pytest.raises(UnfitError, match="no activation is spelled out"):
        fuse_activations(net, FuseActivations(), tiny_context(net, inputs=given()))


def test_approximations_are_made_only_when_asked_for(
    tiny_context: Callable[..., Any], tmp_path: Path
) -> None:
    net, x = networks.tiny_transformer(), networks.digits()[0][:50]
    with torch.no_grad():
        wanted = net(x)
    with pytest.raises(UnfitError, match="no activation is spelled out"):
        fuse_activations(net, FuseActivations(), tiny_context(net))
    context = tiny_context(net)
    made = fuse_activations(net, FuseActivations(approximate="tanh"), context)
    assert context.facts == {"named": {}, "approximated": 1}
    with torch.no_grad():
        moved = float((made(x) - wanted).abs().max())
    # the formula is off by at most 5e-4 for one activation; the layers behind weigh 64 of them
    assert 0 < moved < 0.05
    edits.store(made, net, tmp_path)
    again = edits.replay(tmp_path, networks.tiny_transformer())
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    cnn = networks.tiny_cnn(trained=False)
    with pytest.raises(UnfitError, match="and there is no exact GELU to approximate"):
        fuse_activations(cnn, FuseActivations(approximate="tanh"), tiny_context(cnn))
