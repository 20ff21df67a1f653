"""TensorRT, as far as it goes without a GPU: options, what is exported, profiles, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper

from tersor.core import plugins
from tersor.core.errors import DependencyError, TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.pruning.semi_structured import SemiStructured, semi_structured
from tersor.quantization.static import Static, static
from tersor.runtimes import tensorrt
from tests import networks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "fp61"},
            r"^precision must be one of fp32, fp16, bf16; got 'fp61'\. Did you mean 'fp16'\?$",
        ),
        ({"sparse": 1}, r"^sparse must be true or false; got 1$"),
        ({"batches": [8, 1, 64]}, r"^batches must be \[SMALLEST, USUAL, LARGEST\], rising from 1"),
        ({"batches": [0, 1, 2]}, r"^batches .*; got \[0, 1, 2\]$"),
        ({"batches": 8}, r"^batches .*; got 8$"),
        ({"optimization": 6}, r"^optimization must be 0 to 5; got 6$"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        tensorrt.settings(options)


def test_options_are_read() -> None:
    assert tensorrt.settings({}) == tensorrt.Settings()
    made = tensorrt.settings({"precision": "fp16", "sparse": True, "batches": [1, 1, 4]})
    assert made == tensorrt.Settings(precision="fp16", sparse=True, batches=(1, 1, 4))


def test_biases_are_floats_and_nothing_else_changes(tiny_context: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net = networks.tiny_cnn()
    net = static(net, Static(symmetric=True), tiny_context(net))
    model = lower(net, "onnx", networks.inputs())
    (file,) = tensorrt.export(model, tmp_path, networks.inputs())
    made = onnx.load(file)
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    read = [kinds.get(n.input[0]) for n in made.graph.node if n.op_type == "DequantizeLinear"]
    assert TensorProto.INT8 in read
    assert TensorProto.INT32 not in read
    x = networks.split(1200, 1264)[0]["x"].numpy()
    found, wanted = (
        onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0]
        for m in (made, model)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_zero_points_are_refused(tiny_context: Any, tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    model = lower(static(net, Static(), tiny_context(net)), "onnx", networks.inputs())
    message = r"is rounded to uint8 or with a zero point; TensorRT has int8 around 0 only\. "
    with pytest.raises(TargetError, match=message):
        tensorrt.export(model, tmp_path, networks.inputs())


def sequence(folder: Path) -> Any:
    """Export y = relu(x) of shape (batch, length, 3)."""
    import torch

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "net",
        [value("x", TensorProto.FLOAT, ["batch", "length", 3])],
        [value("y", TensorProto.FLOAT, ["batch", "length", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (file,) = tensorrt.export(model, folder, Inputs(example={"x": torch.zeros(2, 16, 3)}))
    return onnx.load(file)


def test_profiles_follow_the_option_and_the_size_at_export(tmp_path: Path) -> None:
    made = tensorrt.profile_shapes(sequence(tmp_path), (1, 8, 64))
    assert made == {"x": [(1, 1, 3), (8, 16, 3), (64, 32, 3)]}


def test_fixed_inputs_need_no_profile(tmp_path: Path) -> None:
    model = sequence(tmp_path)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (2, 16, 3), strict=True):
        dim.dim_value = size
    assert tensorrt.profile_shapes(model, (1, 8, 64)) == {}


@pytest.mark.parametrize("rounded", [False, True])
def test_two_zeros_in_four_are_found(rounded: bool, tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    assert tensorrt.sparse_layers(lower(net, "onnx", networks.inputs())) == []
    context = tiny_context(net)
    net = semi_structured(net, SemiStructured(), context)
    if rounded:
        net = static(net, Static(symmetric=True), context)
    found = tensorrt.sparse_layers(lower(net, "onnx", networks.inputs()))
    # the first convolution has one input channel
    assert len(found) == 8


def test_sparsity_without_zeros_is_refused(tmp_path: Path) -> None:
    model = lower(networks.tiny_cnn(), "onnx", networks.inputs())
    (file,) = tensorrt.export(model, tmp_path, networks.inputs())
    target = Target(runtime="tensorrt", device="cuda", options={"sparse": True})
    with pytest.raises(TargetError, match=r"^sparse: no layer has two zeros in every four weigh"):
        tensorrt.load(file, target)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x08\x0a\x12 nothing")
    with pytest.raises(TargetError, match=r"^model\.onnx is no ONNX file: "):
        tensorrt.load(file, Target(runtime="tensorrt", device="cuda"))


@pytest.mark.skipif(plugins.installed("tensorrt"), reason="tensorrt is installed")
def test_missing_package_is_named() -> None:
    runtime = plugins.runtime("tensorrt")
    message = r"^runtime 'tensorrt' needs the package 'tensorrt'\. Install it with: pip install "
    with pytest.raises(DependencyError, match=message):
        plugins.require("runtimes", "tensorrt", runtime.to_run)


def test_a_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    error, count = cuda.cudaGetDeviceCount()
    if not int(error) and count:
        pytest.skip("there is a GPU")
    model = lower(networks.tiny_cnn(), "onnx", networks.inputs())
    (file,) = tensorrt.export(model, tmp_path, networks.inputs())
    with pytest.raises(TargetError, match=r"^no NVIDIA GPU can be used: .*; run where there is"):
        tensorrt.load(file, Target(runtime="tensorrt", device="cuda"))


def test_timings_are_kept_outside_of_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tensorrt._timing_file(b"one")
    assert file.parent == tmp_path / "tersor"
    assert file != tensorrt._timing_file(b"two")
