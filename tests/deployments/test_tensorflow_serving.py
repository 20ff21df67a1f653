"""A SavedModel is loaded by TensorFlow, and computes what the artifact does."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tersor
from tersor.core import environments, remote
from tersor.core.artifact import Artifact
from tersor.core.errors import DependencyError, RecipeError, TargetError
from tersor.deployments import tensorflow_serving
from tersor.deployments._interface import Interface
from tests.deployments.conftest import expected

LOAD = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow as tf
folder, x, out = sys.argv[1:]
serve = tf.saved_model.load(folder).signatures["serving_default"]
assert serve.structured_input_signature[1]["x"].shape.as_list() == [None, 1, 8, 8]
np.savez(out, **{n: t.numpy() for n, t in serve(x=tf.constant(np.load(x))).items()})
"""


@pytest.fixture(scope="module")
def python() -> Path:
    found = environments.python("tensorflow_serving")
    if found is None:
        pytest.skip("needs the environment: tersor doctor --create tensorflow_serving")
    return found


@pytest.mark.slow
def test_tensorflow_computes_what_the_artifact_does(
    artifact_of: Callable[[str], Artifact], python: Path, x: np.ndarray, tmp_path: Path
) -> None:
    artifact = artifact_of("onnxruntime")
    options = {"name": "digits", "version": 3, "tolerance": 1e-5}
    made = tersor.deploy(artifact, to="tensorflow_serving", out=tmp_path / "out", options=options)
    assert "digits/3/saved_model.pb" in made.files
    assert (
        made.check == 'tensorflow_model_server --model_name=digits --model_base_path="$PWD/digits"'
    )
    np.save(tmp_path / "x.npy", x)
    place = str(tmp_path / "out" / "digits" / "3")
    words = [place, str(tmp_path / "x.npy"), str(tmp_path / "y.npz")]
    subprocess.run([str(python), "-c", LOAD, *words], check=True)
    name, wanted = expected(artifact, x)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as arrays:
        # float32, other orders of addition
        np.testing.assert_allclose(arrays[name], wanted, rtol=1e-4, atol=1e-5)


def nodes() -> list[tuple[str, list[str], dict[str, Any]]]:
    """Every operator whose translation is more than one call, in ONNX's own variants."""
    grouped = {"group": 2, "kernel_shape": [3, 3], "pads": [1, 0, 1, 2], "strides": [2, 1]}
    return [
        ("Conv", ["x", "w_6233", "b6"], grouped),
        ("Conv", ["x", "w_8133"], {"group": 4, "kernel_shape": [3, 3], "dilations": [2, 2]}),
        ("Conv", ["row", "w_545"], {"kernel_shape": [5], "pads": [2, 2]}),
        ("MaxPool", ["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 0, 0], "strides": [2, 2]}),
        ("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("AveragePool", ["x"], {"kernel_shape": [2, 2], "pads": [1, 0, 1, 0], "count_include_pad": 1}),
        ("GlobalAveragePool", ["x"], {}),
        ("Gemm", ["m", "m", "b3"], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
        ("LayerNormalization", ["x", "b6"], {"axis": -1}),
        ("BatchNormalization", ["x", "b4", "b4", "b4", "p4"], {}),
        ("Pad", ["x", "pads"], {}),
        ("Pad", ["x", "pads", "two"], {"mode": "reflect"}),
        ("Reshape", ["x", "copy"], {}),
        ("Flatten", ["x"], {"axis": 2}),
        ("Slice", ["x", "starts", "ends", "axes", "steps"], {}),
        ("Squeeze", ["thin", "axis_1"], {}),
        ("Unsqueeze", ["m", "axis_1"], {}),
        ("Expand", ["b4s", "shape"], {}),
        ("Gather", ["x", "places"], {"axis": 1}),
        ("Trilu", ["m"], {"upper": 0}),
        ("Clip", ["x", "", "two"], {}),
        ("Gelu", ["x"], {}),
        ("HardSigmoid", ["x"], {"alpha": 0.1}),
        ("HardSwish", ["x"], {}),
        ("Pow", ["x", "three"], {}),
        ("Div", ["counts", "seven"], {}),
        ("ReduceMean", ["x", "axis_1"], {"keepdims": 0}),
        ("Resize", ["x", "", "scales"], {"mode": "linear"}),
        ("Resize", ["x", "", "scales"], {"mode": "nearest"}),
        ("QuantizeLinear", ["x", "s4", "z4"], {"axis": 1}),
        ("LSTM", ["series", "w_lstm", "r_lstm", "b_lstm"], {"hidden_size": 4, "direction": "bidirectional"}),
        ("GRU", ["series", "w_gru", "r_gru", "b_gru"], {"hidden_size": 4, "linear_before_reset": 1}),
        ("GRU", ["series", "w_gru", "r_gru", "b_gru"], {"hidden_size": 4, "direction": "reverse"}),
    ]  # fmt: skip


def constants() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    floats = {
        "w_6233": (6, 2, 3, 3), "b6": (6,), "w_8133": (8, 1, 3, 3), "w_545": (5, 4, 5), "b3": (3,), "b4": (4,),
        "b4s": (4, 1), "w_lstm": (2, 16, 5), "r_lstm": (2, 16, 4), "b_lstm": (2, 32), "w_gru": (1, 12, 5),
        "r_gru": (1, 12, 4), "b_gru": (1, 24),
    }  # fmt: skip
    whole: dict[str, list[int]] = {
        "pads": [0, 0, 1, 2, 0, 0, 0, 1], "copy": [0, -1, 3], "starts": [1, -1], "ends": [2**62, -(2**62)],
        "axes": [1, 3], "steps": [2, -1], "axis_1": [1], "shape": [2, 4, 3], "places": [0, -1],
    }  # fmt: skip
    return {
        **{name: draw.standard_normal(shape).astype("float32") for name, shape in floats.items()},
        **{name: np.array(value, "int64") for name, value in whole.items()},
        "p4": np.abs(draw.standard_normal(4)).astype("float32"),
        "two": np.array(0.2, "float32"),
        "three": np.array(3, "int64"),
        "seven": np.array(-7, "int64"),
        "scales": np.array([1, 1, 2, 2], "float32"),
        "s4": np.array([0.1, 0.2, 0.05, 0.3], "float32"),
        "z4": np.array([0, 3, -5, 0], "int8"),
    }


@pytest.mark.slow
def test_every_operator_against_onnx_runtime(python: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    draw = np.random.default_rng(1)
    shapes = {
        "x": (2, 4, 6, 6),
        "row": (2, 4, 9),
        "m": (3, 3),
        "thin": (3, 1, 2),
        "series": (7, 2, 5),
    }
    given = {n: draw.standard_normal(s).astype("float32") for n, s in shapes.items()}
    given["counts"] = np.arange(-20, 20, dtype="int64")
    made, outputs = [], []
    for i, (kind, inputs, attributes) in enumerate(nodes()):
        made.append(onnx.helper.make_node(kind, inputs, [f"y{i}"], **attributes))
        outputs.append(f"y{i}")
        if kind == "QuantizeLinear":
            made.append(
                onnx.helper.make_node(
                    "DequantizeLinear", [f"y{i}", *inputs[1:]], ["back"], **attributes
                )
            )
            outputs.append("back")
    graph = onnx.helper.make_graph(
        made,
        "operators",
        [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants().items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.save(model, tmp_path / "network.onnx")
    wanted = onnxruntime.InferenceSession(str(tmp_path / "network.onnx")).run(outputs, given)
    np.savez(tmp_path / "example.npz", **given)
    entries = {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in given.items()}
    (tmp_path / "request.json").write_text(json.dumps({"inputs": entries, "outputs": outputs}))
    done = subprocess.run(
        remote.command(python, "saved_model", str(tmp_path)), capture_output=True, text=True
    )
    assert (tmp_path / "answer.npz").exists(), (tmp_path / "answer.json").read_text() + done.stderr
    with np.load(tmp_path / "answer.npz", allow_pickle=False) as answers:
        for name, array in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(answers[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_an_operator_that_is_missing_is_named(python: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Det", ["x"], ["y"], name="n")],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, [2, 2])],
        [onnx.helper.make_tensor_value_info("y", kind, [])],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "network.onnx")
    found = Interface(inputs=(), outputs=(), example={"x": np.eye(2, dtype="f")}, made={})
    with pytest.raises(TargetError) as caught:
        tensorflow_serving._ask(tmp_path, found, python)
    assert (
        "the network cannot be written as a SavedModel: TensorFlow has no operator Det (y)"
        in str(caught.value)
    )


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    wanted = np.array([1.0, 4.0])
    np.savez(tmp_path / "a.npz", y=wanted + np.array([0, 0.1]))
    found = Interface(inputs=(), outputs=(), example={}, made={"y": wanted})
    tensorflow_serving._compare(found, tmp_path / "a.npz", 0.03)
    for tolerance, answer in (
        (0.02, wanted + np.array([0, 0.1])),
        (0.5, wanted * np.array([np.nan, 1])),
    ):
        np.savez(tmp_path / "a.npz", y=answer)
        with pytest.raises(
            TargetError, match="the SavedModel computes something else: output 'y' differs by"
        ):
            tensorflow_serving._compare(found, tmp_path / "a.npz", tolerance)


def test_without_its_environment_it_says_how_to_make_it(
    artifact_of: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(
        DependencyError, match="Make it with: tersor doctor --create tensorflow_serving"
    ):
        tersor.deploy(artifact_of("onnxruntime"), to="tensorflow_serving", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "a.b"}, "name must be letters, digits, '_' and '-', got 'a.b'"),
        ({"version": 0}, "version must be at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must not be negative, got -1"),
    ],
)
def test_settings_that_make_no_sense(
    options: dict[str, Any], said: str, artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        tersor.deploy(
            artifact_of("onnxruntime"), to="tensorflow_serving", out=tmp_path / "o", options=options
        )
    assert said in str(caught.value)
