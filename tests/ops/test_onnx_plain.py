"""Networks without roundings and strided slices compute the same, in ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops.lower import lower
from tersor.quantization.static import Static, static
from tersor.quantization.weight_only import WeightOnly, weight_only
from tests import networks

onnx_plain = pytest.importorskip("tersor.ops.onnx_plain")
onnxruntime = pytest.importorskip("onnxruntime")


def computed(model: Any, x: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x.numpy()})[0])


def both(net: nn.Module, x: Tensor) -> tuple[np.ndarray, np.ndarray, set[str]]:
    model = lower(net.eval(), "onnx", Inputs(example={"x": x}))
    made = onnx_plain.plain(model)
    return computed(model, x), computed(made, x), {node.op_type for node in made.graph.node}


def test_roundings_become_arithmetic(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    quantized = static(net, Static(), tiny_context(net))
    before, after, kinds = both(quantized, torch.rand(4, 1, 8, 8))
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    assert np.abs(after - before).max() < 0.02 * np.abs(before).max()


def test_grouped_weights_become_floats(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net)
    x = next(iter(context.data.calibration))["x"][:2]
    made = weight_only(net, WeightOnly(bits=4), context)
    before, after, kinds = both(made, x)
    assert "DequantizeLinear" not in kinds
    np.testing.assert_allclose(after, before, atol=1e-5)


class _Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::3] + 1


def test_strided_slices_become_pooling() -> None:
    before, after, kinds = both(_Strided(), torch.randn(2, 3, 9, 7))
    assert "MaxPool" in kinds
    assert "Slice" not in kinds
    np.testing.assert_array_equal(after, before)
