"""One representation of quantized layers: int8 and 4-bit weights, on two runtimes, against memory."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.ops.modules import (
    GroupedLinear,
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose2d,
    Quantize,
    QuantLinear,
    quantized,
    rows,
)
from tersor.ops.quantize import channel_scales, group_codes

RUNTIMES = ("onnxruntime", "openvino")


def run(net: nn.Module, x: Tensor, runtime: str, folder: Path, batch: int) -> np.ndarray:
    """Export with a dynamic batch, and run with another batch size than the example's."""
    pytest.importorskip(runtime)
    inputs = Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}})
    made = plugins.runtime(runtime)
    files = made.export(lower(net, made.takes, inputs), folder, inputs)
    runner = made.load(files[0], Target(runtime=runtime, options={"threads": 1}))
    return next(iter(runner.bind({"x": x[:batch].numpy()})().values()))


def int8(layer: nn.Module) -> nn.Module:
    return quantized(layer, channel_scales(rows(layer))).eval()


class IntegerCnn(nn.Module):
    """Convolution, depthwise convolution, residual addition, linear: as `static` would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.rounding = nn.ModuleList(
            Quantize(s, z) for s, z in ((0.04, 128), (0.02, 0), (0.02, 0), (0.03, 0), (0.01, 5))
        )
        self.conv = int8(nn.Conv2d(3, 8, 3, padding=1))
        self.depthwise = int8(nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.linear = int8(nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounding[0](x)
        x = self.rounding[1](F.relu(self.conv(x)))
        y = self.rounding[2](F.relu(self.depthwise(x)))
        y = self.rounding[3](F.relu(x + y))
        return self.linear(self.rounding[4](y.mean(dim=(2, 3))))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_int8_network_runs_as_in_memory(runtime: str, tmp_path: Path) -> None:
    net, x = IntegerCnn().eval(), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        wanted = net(x).numpy()
    found = run(net, x, runtime, tmp_path, 5)
    # a code may fall the other way where a runtime sums in another order: one step of the last
    # rounding, times the largest row sum of the linear layer's weights
    step = 0.01 * float(rows(net.linear).float().abs().sum(1).max() * net.linear.scale.max())
    assert np.abs(found - wanted).max() <= step
    assert np.abs(found - wanted).mean() <= 0.05 * np.abs(wanted).mean()


def test_onnxruntime_fuses_all_integer_operators(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx

    model = lower(
        IntegerCnn().eval(),
        "onnx",
        Inputs(example={"x": torch.randn(2, 3, 8, 8)}, dynamic={"x": {0: "batch"}}),
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 2
    assert kinds["QLinearAdd"] == 1
    assert kinds["QGemm"] == 1
    assert kinds["Conv"] == kinds["Gemm"] == kinds["Relu"] == 0


def test_openvino_computes_all_layers_in_integers(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    net = IntegerCnn().eval()
    net.linear = int8(nn.Linear(8, 8))  # as wide as the convolutions
    inputs = Inputs(example={"x": torch.randn(2, 3, 8, 8)}, dynamic={"x": {0: "batch"}})
    files = plugins.runtime("openvino").export(lower(net, "onnx", inputs), tmp_path, inputs)
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(files[0]), "CPU", hint)
    told = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = Counter(
        (info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in told
    )
    assert kinds["Convolution", "u8"] == 2, kinds
    assert kinds["FullyConnected", "u8"] == 1, kinds


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("bits", "symmetric", "shape"),
    [
        (4, True, (6, 64)),
        (4, False, (6, 64)),
        (8, True, (6, 64)),
        (8, False, (6, 64)),
        (3, True, (6, 64)),
        (2, False, (6, 64)),
        (4, True, (6, 5, 64)),
    ],
)
def test_grouped_weights_are_exact_on_runtimes(
    runtime: str, bits: int, symmetric: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    layer = nn.Linear(64, 48)
    net = GroupedLinear(64, 48, bits=bits, group_size=32, symmetric=symmetric).eval()
    net.weight, net.scale, net.zero = group_codes(
        layer.weight.detach(), bits=bits, group_size=32, symmetric=symmetric
    )
    net.bias = layer.bias
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = net(x).numpy()
    # both sum 64 products in float32; ONNX Runtime rounds activations beside weights of 8 bits
    allowed = 2e-2 if bits == 8 and runtime == "onnxruntime" else 1e-5
    assert np.abs(run(net, x, runtime, tmp_path, 6) - wanted).max() < allowed


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_onnxruntime_multiplies_by_packed_weights(
    bits: int, symmetric: bool, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx

    net = GroupedLinear(64, 48, bits=bits, group_size=32, symmetric=symmetric).eval()
    model = lower(
        net, "onnx", Inputs(example={"x": torch.randn(2, 64)}, dynamic={"x": {0: "batch"}})
    )
    codes = sum(
        len(t.raw_data)
        for t in model.graph.initializer
        if t.data_type not in (onnx.TensorProto.FLOAT,)
    )
    assert codes <= 64 * 48 * bits // 8 + 48 * 2  # and a zero for each group
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds == {"MatMulNBits": 1}


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 1), padding="same", groups=2, bias=False), (2, 4, 7, 7)),
    (nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 5, 5)),
    (nn.Linear(9, 5), (2, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_layers_equal_their_float_twin_with_rounded_weights(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    made = int8(layer)
    assert isinstance(made, (QuantConv1d, QuantConv2d, QuantConvTranspose2d, QuantLinear))
    x = torch.randn(shape)
    with torch.no_grad():
        weight = (
            layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        )
        scale = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1)) / 127
        rounded = (weight / scale).round() * scale
        layer.weight.copy_(
            rounded.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else rounded
        )
        assert torch.allclose(made(x), layer(x), atol=1e-5)


def every_module() -> list[nn.Module]:
    made: list[nn.Module] = [int8(layer) for layer, _ in LAYERS]
    made += [
        GroupedLinear(8, 4, bits=4, group_size=4, symmetric=False),
        GroupedLinear(8, 4, bits=8, group_size=2, bias=False),
    ]
    return [*made, Quantize(0.1, 3), Quantize(0.25, 0, -128, 127)]


@pytest.mark.parametrize("module", every_module(), ids=lambda m: type(m).__name__)
def test_arguments_make_the_same_structure(module: Any) -> None:
    twin = type(module)(**module.arguments())
    twin.load_state_dict(module.state_dict())
    assert twin.arguments() == module.arguments()
    shapes = {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in twin.state_dict().items()} == shapes
