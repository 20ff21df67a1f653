"""predict() and compare(): rooflines of machines that are not here, by hand."""

from dataclasses import replace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tersor.core.errors import ModelError  # noqa: E402
from tersor.core.machine import Machine, find, machines  # noqa: E402
from tersor.described import FAST, MIDDLE, SLOW, compare, count, predict  # noqa: E402

SLOW_CHIP = Machine(
    name="chip",
    kind="cpu",
    what="a chip",
    gops={"fp32": 1.0, "int8": 4.0},
    memory_gb_s=1.0,
    start_us=10.0,
    sources=("this test",),
)


def network(nodes: list, weights: dict[str, tuple[int, ...]], x: tuple[int, ...], y: tuple = ()):
    """Build a network of ones in fp32."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y or None)],
        [numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def two_layers(batch: int = 4):
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="second"),
    ]
    net = network(nodes, {"v": (64, 128), "w": (128, 10)}, (batch, 64), (batch, 10))
    return net, {"x": np.ones((batch, 64), np.float32)}


def test_two_layers_by_hand() -> None:
    found = predict(*two_layers(), SLOW_CHIP)
    assert found.macs == 4 * 64 * 128 + 4 * 128 * 10
    assert found.operators == 2  # the activation is part of the first
    fp32, int8 = found.estimates
    # operations a second: 1e9; bytes a second: 1e9; so microseconds are thousands of them
    first = max(2 * 4 * 64 * 128, 4 * (4 * 64 + 64 * 128 + 4 * 128)) / 1e3
    second = max(2 * 4 * 128 * 10, 4 * (4 * 128 + 128 * 10 + 4 * 10)) / 1e3
    assert fp32.low_ms == pytest.approx(((first + second) / 0.8 + 2 * 10) / 1e3)
    assert fp32.high_ms == pytest.approx(((first + second) / 0.1 + 2 * 20) / 1e3)
    assert fp32.bound == "compute"
    assert fp32.weight_bytes == 4 * (64 * 128 + 128 * 10)
    assert fp32.working_bytes == 4 * (4 * 64 + 4 * 128)
    first = max(2 * 4 * 64 * 128 / 4, 4 * 64 + 64 * 128 + 4 * 128) / 1e3
    second = max(2 * 4 * 128 * 10 / 4, 4 * 128 + 128 * 10 + 4 * 10) / 1e3
    assert int8.low_ms == pytest.approx(((first + second) / 0.8 + 2 * 10) / 1e3)
    assert int8.weight_bytes == 64 * 128 + 128 * 10


def test_what_bounds_it() -> None:
    net, x = two_layers(batch=1)
    assert predict(net, x, replace(SLOW_CHIP, start_us=0.0)).estimates[0].bound == "memory"
    assert predict(net, x, replace(SLOW_CHIP, start_us=1e3)).estimates[0].bound == "starts"


def test_gains_by_hand() -> None:
    net, x = two_layers(batch=1)
    chip = replace(SLOW_CHIP, start_us=0.0)
    found = {gain.technique: gain for gain in predict(net, x, chip).gains}
    # every layer is memory-bound in fp32: 4 bytes a number; in 8 bits only weights shrink
    fp32 = 4 * (64 + 64 * 128 + 128) + 4 * (128 + 128 * 10 + 10)
    weights = max(2 * 64 * 128, 4 * 64 + 64 * 128 + 4 * 128)
    weights += max(2 * 128 * 10, 4 * 128 + 128 * 10 + 4 * 10)
    assert found["weight_only"].high == pytest.approx(fp32 / weights)
    assert found["weight_only"].low == pytest.approx(1 + (fp32 / weights - 1) / 2)
    assert "weights are 97% of the bytes that bound the network" in found["weight_only"].why
    assert found["static"].high == pytest.approx(4.0, rel=0.01)
    assert found["channels"].high == pytest.approx(1 / 0.75)
    useless = predict(net, x, chip).useless
    assert useless["half"] == "it has no arithmetic in 16 bits"
    assert useless["drop_layers"] == "what starting an operator costs there is not known"
    assert useless["semi_structured"].startswith("it has no arithmetic that leaves out zeros")


def test_starts_want_fewer_layers() -> None:
    found = predict(*two_layers(), replace(SLOW_CHIP, start_us=1e4))
    (gain,) = found.gains
    assert gain.technique == "drop_layers"
    assert gain.high == pytest.approx(1 / 0.75, rel=0.01)
    assert found.useless["channels"].startswith("starting operators bounds the network")
    assert found.useless["static"].startswith("at most 1.0")


def test_zeros_pay_only_where_units_leave_them_out() -> None:
    gpu = replace(SLOW_CHIP, gops={"fp32": 1.0, "fp16": 2.0}, sparse_2_4=True, start_us=0.0)
    net, x = two_layers(batch=64)
    found = {gain.technique: gain for gain in predict(net, x, gpu).gains}
    assert found["semi_structured"].high == pytest.approx(2.0, rel=0.05)
    assert "on top of fp16" in found["semi_structured"].why
    assert "semi_structured" in predict(net, x, replace(gpu, sparse_2_4=False)).useless


def test_memory_decides_what_fits() -> None:
    net, x = two_layers()
    weights, working = 64 * 128 + 128 * 10, 4 * 64 + 4 * 128
    small = replace(SLOW_CHIP, memory_bytes=2 * (weights + working))
    found = predict(net, x, small)
    assert [each.fits for each in found.estimates] == [False, True]
    assert found.plain is not None
    assert found.plain.format == "int8"
    tiny = predict(net, x, replace(SLOW_CHIP, memory_bytes=5000))
    assert tiny.plain is None
    assert tiny.reason == (
        "weights and activations need 0.01 MB at least in int8, its memory has 0.01 MB"
    )
    apart = replace(SLOW_CHIP, memory_bytes=weights, working_bytes=working - 1)
    assert "activations need" in predict(net, x, apart).reason
    assert predict(net, x, replace(apart, working_bytes=working)).reason == ""


def test_what_stays_on_the_chip_does_not_move() -> None:
    net, x = two_layers(batch=1)
    chip = replace(SLOW_CHIP, cache_bytes=1_000_000, start_us=0.0)
    (fp32, _) = predict(net, x, chip).estimates
    assert fp32.on_chip
    compute, edges = 2 * (64 * 128 + 128 * 10), 4 * (64 + 10)
    assert fp32.low_ms == pytest.approx((compute + edges) / FAST / 1e6)
    assert fp32.high_ms == pytest.approx((compute + edges) / SLOW / 1e6)
    assert FAST > MIDDLE > SLOW


def test_integers_only_refuses_what_stays_in_floats() -> None:
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["y"], name="lstm", hidden_size=3)]
    net = network(nodes, {"w": (1, 12, 2), "r": (1, 12, 3)}, (5, 1, 2), (5, 1, 1, 3))
    x = {"x": np.ones((5, 1, 2), np.float32)}
    found = predict(net, x, find("coral-edge-tpu"))
    assert found.plain is None
    assert found.reason == "it computes in 8-bit integers only, and LSTM stays in floats"
    assert predict(net, x, find("raspberry-pi-5")).plain is not None


def test_compare_orders_and_puts_last_what_cannot() -> None:
    net, x = two_layers()
    fast = replace(SLOW_CHIP, name="fast", gops={"fp32": 100.0}, memory_gb_s=10.0)
    full = replace(SLOW_CHIP, name="full", memory_bytes=10)
    found = compare(net, x, [full, SLOW_CHIP, fast])
    assert [each.machine.name for each in found] == ["fast", "chip", "full"]
    assert found[-1].gains == ()


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("name", machines())
def test_shipped_machines_promise_ranges(name: str, batch: int) -> None:
    found = predict(*two_layers(batch), find(name))
    assert found.plain is not None
    for each in found.estimates:
        assert 0 < each.low_ms < each.high_ms
    for gain in found.gains:
        assert 1 < gain.low <= gain.high <= 2 * gain.low
        assert gain.why
    told = {gain.technique for gain in found.gains} | set(found.useless)
    assert told | {"static"} == {
        "static", "half", "channels", "weight_only", "drop_layers", "semi_structured",
    }  # fmt: skip


def test_shapes_are_no_work() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Reshape", ["x", "s"], ["z"], name="reshape"),
        helper.make_node("MatMul", ["z", "w"], ["y"], name="product"),
    ]
    net = network(nodes, {"w": (8, 4)}, (2, 8), (2, 4))
    graph = count(net, {"x": np.ones((2, 8), np.float32)})
    assert [(each.name, each.view) for each in graph.operators] == [
        ("reshape", True),
        ("product", False),
    ]
    assert predict(net, {"x": np.ones((2, 8), np.float32)}, SLOW_CHIP).operators == 1


def test_a_quantized_network_is_refused() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    net = network(nodes, {"s": ()}, (2, 8), (2, 8))
    with pytest.raises(ModelError) as caught:
        predict(net, {"x": np.ones((2, 8), np.float32)}, SLOW_CHIP)
    assert str(caught.value) == (
        "the network is quantized already (DequantizeLinear, QuantizeLinear); give the float "
        "network that it was made from: number formats are compared here"
    )


def test_work_that_depends_on_the_data_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, (2, 4))],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=branch),
    ]
    net = network(nodes, {"w": (8, 4)}, (2, 8), (2, 4))
    with pytest.raises(ModelError, match="the work inside If 'if' depends on the data"):
        predict(net, {"x": np.ones((2, 8), np.float32)}, SLOW_CHIP)
