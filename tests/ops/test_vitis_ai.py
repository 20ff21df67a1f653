"""Quantized ONNX by the rules of Vitis AI: checked by structure, and run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnx
from onnx import numpy_helper

from tersor.core.errors import TargetError
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.ops.vitis_ai import to_vitis_ai
from tersor.quantization.static import Static, static
from tersor.runtimes import onnxruntime as runtime
from tests import networks

DPU = Static(symmetric=True, power_of_two=True, per_channel=False)
CURE = r"; quantize with `static: \{symmetric: true, power_of_two: true, per_channel: false\}`$"


def lowered(config: Static | None, context: Any) -> Any:
    net = networks.tiny_cnn()
    if config is not None:
        net = static(net, config, context(net))
    return lower(net, "onnx", networks.inputs())


def test_everything_is_int8_with_a_power_of_two(tiny_context: Any, tmp_path: Path) -> None:
    model = lowered(DPU, tiny_context)
    before = model.SerializeToString()
    target = Target(runtime="onnxruntime", options={"threads": 1, "format": "vitis_ai"})
    (file,) = runtime.export(model, tmp_path, networks.inputs(), target)
    assert model.SerializeToString() == before
    made = onnx.load(file)
    onnx.checker.check_model(made, full_check=True)
    assert made.opset_import[0].version >= 13
    constants = {i.name: numpy_helper.to_array(i) for i in made.graph.initializer}
    makers = {n.output[0]: n for n in made.graph.node}
    seen = 0
    for node in made.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = constants[node.input[1]], constants[node.input[2]]
            assert len(set(scale.ravel().tolist())) == 1
            assert float(np.log2(scale.ravel()[0])) % 1 == 0
            assert zero.dtype == np.int8
            assert not zero.any()
        if node.op_type in ("Conv", "Gemm"):
            assert all(makers[name].op_type == "DequantizeLinear" for name in node.input)
            assert constants[makers[node.input[2]].input[0]].dtype == np.int8
            seen += 1
    assert seen == 9
    x = networks.split(1200, 1264)[0]["x"].numpy()
    found = runtime.load(file, target).bind({"x": x})()
    plain = runtime.export(model, tmp_path, networks.inputs())[0]
    wanted = runtime.load(plain, Target(runtime="onnxruntime")).bind({"x": x})()
    (found_, wanted_) = (next(iter(o.values())) for o in (found, wanted))
    # a bias of 8 bits is off by at most 1/254 of the layer's largest one
    error = np.sqrt(np.mean((found_ - wanted_) ** 2) / np.mean(wanted_**2))
    assert 0 < float(error) < 0.05
    with pytest.raises(TargetError, match=r"^model\.onnx is not in the format 'vitis_ai'; export"):
        runtime.load(plain, target)


def test_a_network_in_float_is_left_as_it_is(tiny_context: Any) -> None:
    model = lowered(None, tiny_context)
    assert to_vitis_ai(model).SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Static(), r"^'x' is not rounded to int8 around 0 with one scale that is a power of two"),
        (Static(symmetric=True, power_of_two=True), r"^'conv1\.weight' is not rounded to int8"),
    ],
)
def test_other_roundings_are_refused(config: Any, message: str, tiny_context: Any) -> None:
    with pytest.raises(TargetError, match=message + ".*" + CURE):
        to_vitis_ai(lowered(config, tiny_context))
