"""Roundings as arithmetic: the same numbers as the operators that they stand for."""

from typing import Any

import torch

from tersor.core.model import Inputs
from tersor.ops.lower import lower
from tersor.ops.plain_rounding import without_quantized
from tersor.quantization.static import Static, static
from tersor.quantization.weight_only import WeightOnly, weight_only
from tests import networks


def _kinds(program: Any) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if "quantized_decomposed" in str(n.target)}


def test_static_network(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    made = static(net, Static(), tiny_context(net))
    x = torch.rand(4, 1, 8, 8)
    program = lower(made, "exported", Inputs(example={"x": x}))
    plain = without_quantized(program)
    assert _kinds(program)
    assert not _kinds(plain)
    torch.testing.assert_close(plain.module()(x=x), program.module()(x=x), atol=0, rtol=0)


def test_grouped_weights(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net)
    made = weight_only(net, WeightOnly(bits=4), context)
    x = next(iter(context.data.calibration))["x"][:2]
    program = lower(made, "exported", Inputs(example={"x": x}))
    plain = without_quantized(program, groups_only=True)
    assert not any("group" in kind for kind in _kinds(plain))
    torch.testing.assert_close(plain.module()(x=x), program.module()(x=x), atol=1e-6, rtol=1e-6)


def test_a_network_in_float_is_left_as_it_is() -> None:
    program = lower(networks.tiny_cnn(), "exported", Inputs(example={"x": torch.rand(2, 1, 8, 8)}))
    assert without_quantized(program) is program
