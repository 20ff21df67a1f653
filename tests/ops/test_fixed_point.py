"""Quantized ONNX networks as layers on fixed-point numbers: types by hand, and what is refused."""

from typing import Any

import numpy as np
import pytest

from tersor.core.errors import TargetError
from tersor.ops.fixed_point import Fixed, Network, read

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

DEFAULT = Fixed(bits=24, fraction=16)


def network(nodes: list[Any], constants: dict[str, Any], shape: Any = ("n", 2)) -> Any:
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def rounding(source: str, scale: str, zero: str, to: str) -> list[Any]:
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [f"{to} codes"]),
        helper.make_node("DequantizeLinear", [f"{to} codes", scale, zero], [to]),
    ]


def linear(
    scale_x: float = 2**-3, zero: Any = None, bias: Any = (0.3, -1.0), **changes: Any
) -> Any:
    """Return y = w round(x) + b, with weights of the scales 1/4 and 1/16."""
    constants = {
        "scale_x": np.float32(scale_x),
        "zero": np.int8(0) if zero is None else zero,
        "codes_w": np.array([[5, -3], [100, 7]], np.int8),
        "scale_w": np.array([2**-2, 2**-4], np.float32),
        "zero_w": np.zeros(2, np.int8),
        "b": np.array(bias, np.float32),
        **changes,
    }
    nodes = [
        *rounding("x", "scale_x", "zero", "x rounded"),
        helper.make_node("DequantizeLinear", ["codes_w", "scale_w", "zero_w"], ["w"], axis=0),
        helper.make_node("Gemm", ["x rounded", "w", "b"], ["y"], transB=1),
    ]
    return network(nodes, constants)


def made(net: Network, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    (layer,) = [e for e in net.layers if e["class_name"] == kind]
    return layer, net.types[layer["name"]]


def test_types_hold_every_result() -> None:
    net = read(linear(), DEFAULT)
    assert net.exact
    # the input is rounded where it comes in: 8 bits, 3 behind the point
    assert made(net, "InputLayer")[1] == {"result": "fixed<8,5,RND_CONV,SAT>"}
    layer, types = made(net, "Dense")
    np.testing.assert_array_equal(layer["weight_data"], [[1.25, 6.25], [-0.75, 0.4375]])
    # sums are in steps of 1/32 and 1/128; a bias is rounded to its channel's
    np.testing.assert_array_equal(layer["bias_data"], [10 / 32, -1.0])
    assert types["weight"] == "fixed<8,4>"  # |6.25| < 8, 4 bits behind the point
    assert types["bias"] == "fixed<9,2>"  # 128 / 128 takes 8 bits and the sign
    # at most 16 * (6.25 + 0.4375) + 1 = 108: 7 bits before the point, 7 behind, and the sign
    assert types["accum"] == types["result"] == "fixed<15,8>"


def test_largest_sums_fit_their_type() -> None:
    """The end of the range of `result` against the largest sum, in float64."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        codes = rng.integers(-127, 128, (2, 2)).astype(np.int8)
        layer, types = made(read(linear(codes_w=codes), DEFAULT), "Dense")
        most = float((np.abs(layer["weight_data"]).sum(0) * 16 + np.abs(layer["bias_data"])).max())
        bits, integer = (int(n) for n in types["result"][6:-1].split(","))
        assert most < 2 ** (integer - 1)
        assert 2.0 ** (integer - bits) == 2**-7


def test_unrounded_layers_get_the_given_type() -> None:
    constants = {"w": np.eye(2, dtype=np.float32)}
    net = read(network([helper.make_node("MatMul", ["x", "w"], ["y"])], constants), DEFAULT)
    assert not net.exact
    assert made(net, "Dense")[1] == {"result": "fixed<24,8>"}


def test_images_lie_channels_last() -> None:
    weight = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    matrix = np.arange(5 * 8, dtype=np.float32).reshape(5, 8)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["y"], transB=1),
    ]
    net = read(network(nodes, {"w": weight, "m": matrix}, ("n", 3, 3, 3)), DEFAULT)
    layer, _ = made(net, "Conv2D")
    np.testing.assert_array_equal(layer["weight_data"], weight.transpose(2, 3, 1, 0))
    layer, _ = made(net, "Dense")
    wanted = matrix.reshape(5, 2, 2, 2).transpose(2, 3, 1, 0).reshape(8, 5)
    np.testing.assert_array_equal(layer["weight_data"], wanted)
    assert net.inputs == {"x": (3, 3, 3)}
    assert net.outputs == {"y": (5,)}


CURE = r"quantize with `static: \{symmetric: true, power_of_two: true\}`"


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (linear(scale_x=0.1), rf"^'x' has the scale 0\.1, which is no power of two; {CURE}"),
        (linear(zero=np.uint8(3)), rf"^'x' is rounded with a zero point, .*; {CURE}"),
        (linear(zero_w=np.ones(2, np.int8)), rf"^'codes_w' has codes with a zero point; {CURE}"),
        (
            linear(scale_w=np.array([0.3, 0.25], np.float32)),
            r"^'w' has the scale 0\.3, which is no power of two",
        ),
        (linear(zero=np.int16(0)), r"^'x' is rounded to int16; hls takes 8 bits$"),
        (
            network([helper.make_node("Softmax", ["x"], ["y"], name="end")], {}),
            r"^hls has no operator Softmax \('end'\); it has Gemm, .*\. Choose another target",
        ),
        (
            network([helper.make_node("MatMul", ["x", "x"], ["y"])], {}, (2, 2)),
            r"^MatMul \('y'\) reads 'x', which is computed; hls takes weights that are fixed$",
        ),
        (
            network([helper.make_node("Relu", ["x"], ["y"])], {}, ("n", "length")),
            r"^input 'x' has the shape \['n', 'length'\]; hls takes vectors and images",
        ),
        (
            network(
                [helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])],
                {"w": np.zeros((1, 1, 1, 1), np.float32)},
                ("n", 1, 4, 4),
            ),
            r"^hls has no 1 x 1 Conv with a stride \('y'\)$",
        ),
        (
            network(
                [helper.make_node("Conv", ["x", "w"], ["y"], group=2)],
                {"w": np.zeros((2, 1, 3, 3), np.float32)},
                ("n", 2, 4, 4),
            ),
            r"^hls has no Conv with groups or dilations \('y'\)$",
        ),
        (
            network(
                [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], pads=[1, 1, 1, 1])],
                {},
                ("n", 2, 4, 4),
            ),
            r"^hls takes a MaxPool of 2 dimensions without pads \('y'\)$",
        ),
        (
            network([helper.make_node("Flatten", ["x"], ["y"])], {}, ("n", 2, 4, 4)),
            r"^hls cannot give out 'y', an image as a vector$",
        ),
    ],
)
def test_what_cannot_be_built_is_named(net: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        read(net, DEFAULT)
