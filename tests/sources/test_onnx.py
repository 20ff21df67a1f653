"""ONNX files: the signature that is read, and honest models that must pass the checks."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from tersor.core.errors import ModelError
from tersor.sources.onnx import load
from tests.sources.onnx_models import (
    INT64,
    TensorProto,
    adding,
    array,
    external,
    helper,
    model,
    network,
    onnx,
    save,
    value,
)


def test_a_model_is_read_with_its_inputs(tmp_path):
    place = save(network(), tmp_path / "x.onnx")
    found = load(place)
    assert (found.form, found.origin, found.notes) == ("onnx", f"onnx:{place}", ())
    assert found.inputs.example["x"].shape == (2, 1, 6, 6)
    assert found.inputs.example["x"].dtype == torch.float32
    assert found.inputs.example["x"].std() > 0.5
    assert found.inputs.dynamic == {"x": {0: "batch"}}
    assert found.net.SerializeToString() == network().SerializeToString()


def test_types_and_free_dimensions_of_inputs(tmp_path):
    made = model(
        [helper.make_node("Gather", ["table", "ids"], ["y"], "gather")],
        inputs=[value("ids", INT64, ["n", "length"]), value("flag", TensorProto.BOOL, [None])],
        outputs=[value("y", shape=["n", "length", 2])],
        stored=[array("table", np.ones((5, 2)))],
    )
    inputs = load(save(made, tmp_path / "x.onnx")).inputs
    assert inputs.example["ids"].dtype == torch.int64
    assert inputs.example["ids"].shape == (2, 16)
    assert inputs.example["flag"].dtype == torch.bool
    assert inputs.dynamic == {"ids": {0: "n", 1: "length"}, "flag": {0: "batch"}}


def test_fixed_batches_stay_fixed(tmp_path):
    made = model(
        [helper.make_node("Relu", ["x"], ["y"])],
        inputs=[value("x", shape=[1, 3])],
        outputs=[value("y", shape=[1, 3])],
    )
    inputs = load(save(made, tmp_path / "x.onnx")).inputs
    assert inputs.example["x"].shape == (1, 3)
    assert inputs.dynamic == {}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([value("x", TensorProto.STRING)], "input 'x' is no tensor of numbers"),
        ([value("x", shape=[1 << 20, 1 << 20])], "impossible shape"),
        ([helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], "input 'x' has no shape"),
        (
            [helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)],
            "input 'x' is no tensor of numbers",
        ),
    ],
)
def test_inputs_that_cannot_be_made(tmp_path, inputs, said):
    made = model(
        [helper.make_node("Identity", ["c"], ["y"])],
        inputs=inputs,
        stored=[array("c", np.ones((2, 3)))],
    )
    with pytest.raises(ModelError) as caught:
        load(save(made, tmp_path / "x.onnx"))
    assert said in str(caught.value)


def test_external_data_beside_the_model_are_brought_in(tmp_path):
    data = np.arange(6, dtype=np.float32)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(b"\0" * 8 + data.tobytes())
    stored = [
        external("a", [3], location="sub/w.bin", offset="8", length="12"),
        external("b", [3], location="sub/w.bin", offset="20", length="12"),
    ]
    found = load(save(adding("a", "b", stored=stored), tmp_path / "x.onnx"))
    values = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in found.net.graph.initializer}
    assert values == {"a": [0, 1, 2], "b": [3, 4, 5]}


def test_subgraphs_functions_and_contrib_operators_pass(tmp_path):
    branch = [helper.make_node("Add", ["x", "c"], ["inner"], "inner")]
    graphs = {
        side: helper.make_graph(branch, side, [], [value("inner", shape=None)])
        for side in ("then_branch", "else_branch")
    }
    nodes = [
        helper.make_node("If", ["flag"], ["z"], "choose", **graphs),
        helper.make_node("Gelu", ["z"], ["w"], "gelu", domain="com.microsoft"),
        helper.make_node("Twice", ["w"], ["y"], "twice", domain="mine"),
    ]
    made = model(
        nodes,
        inputs=[value("x"), value("flag", TensorProto.BOOL, [])],
        stored=[array("c", np.ones(3))],
        domains=["com.microsoft", "mine"],
    )
    made.functions.append(
        helper.make_function(
            "mine",
            "Twice",
            ["a"],
            ["b"],
            [helper.make_node("Add", ["a", "a"], ["b"])],
            [helper.make_opsetid("", 21)],
        )
    )
    load(save(made, tmp_path / "x.onnx"))


def test_what_tersor_writes_is_read(tmp_path):
    pytest.importorskip("onnxscript")
    from tersor.ops.lower import lower
    from tests import networks

    made = lower(networks.tiny_cnn(trained=False), "onnx", networks.inputs())
    found = load(save(made, tmp_path / "x.onnx"))
    assert found.inputs.example["x"].shape == (2, 1, 8, 8)


@pytest.mark.parametrize("name", ["fastestdet_coco", "mnist_cntk"])
def test_real_models_are_read(shared, name):
    assert load(str(shared / "data" / "models" / f"{name}.onnx")).inputs.example


def test_a_mask_of_infinities_is_not_a_broken_weight(tmp_path):
    mask = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
    load(save(adding("mask", stored=[array("mask", mask)]), tmp_path / "x.onnx"))


def test_weights_beside_a_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match="holds its own weights; leave --weights out"):
        load(save(network(), tmp_path / "x.onnx"), weights=tmp_path / "w.safetensors")
