"""offload(): local, cloud, edge and hybrid, on graphs whose best cut is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx")

from onnx import helper

from tersor.core.errors import RecipeError
from tersor.core.machine import Machine
from tersor.described import FAST, SLOW, count
from tersor.offloading import Link, crossing, offload, read_deadline
from tests.test_described import network

DEVICE = Machine(
    name="device",
    kind="cpu",
    what="slow",
    gops={"fp32": 1.0},
    memory_gb_s=1e6,
    sources=("this test",),
)
SERVER = replace(DEVICE, name="server", gops={"fp32": 1000.0})
LINK = Link(mbit_s=8.0, rtt_ms=1.0)  # a thousand bytes a millisecond


def narrow():
    """Build a network with a waist: 4096 numbers in, 8 after the first layer, then much to do."""
    sizes = (4096, 8, 65536, 16)
    names = ["x", "a", "b", "y"]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"layer{i}")
        for i in range(3)
    ]
    weights = {f"w{i}": (sizes[i], sizes[i + 1]) for i in range(3)}
    net = network(nodes, weights, (1, 4096), (1, 16))
    return net, {"x": np.ones((1, 4096), np.float32)}, sizes


def test_the_best_cut_is_the_waist() -> None:
    net, x, sizes = narrow()
    found = offload(net, x, device=DEVICE, server=SERVER, link=LINK, transfers=(32,))
    split = next(each for each in found.options if each.where == "hybrid")
    # by hand: at every cut, twice the multiply-accumulates at 1 and at 1000 operations a
    # nanosecond, four bytes of every number that crosses it and of the 16 that come back
    macs = [sizes[i] * sizes[i + 1] for i in range(3)]
    times = {}
    for cut in (1, 2):
        device = 2 * sum(macs[:cut]) / 1e6
        server = 2 * sum(macs[cut:]) / 1e9
        link = 1 + 4 * (sizes[cut] + 16) / 1e3
        times[cut] = (link + (device + server) / FAST, link + (device + server) / SLOW)
    best = min(times, key=lambda cut: math.prod(times[cut]))
    assert best == 1
    assert split.after == "layer0"
    assert (split.low_ms, split.high_ms) == pytest.approx(times[best], rel=1e-3)
    assert split.sent == ("a",)
    assert (split.sent_bytes, split.returned_bytes) == (32, 64)
    cloud = next(each for each in found.options if each.where == "cloud")
    assert cloud.sent == ("x",)
    assert cloud.link_ms == pytest.approx(1 + (4 * 4096 + 64) / 1e3)
    assert found.options[0] is split  # faster than both ends
    assert found.advice.startswith("split it after layer0: device first, then server")


def test_eight_bits_take_a_quarter_of_the_link() -> None:
    net, x, _ = narrow()
    found = offload(net, x, device=DEVICE, server=SERVER, link=LINK)
    sent = {each.bits: each.sent_bytes for each in found.options if each.where == "cloud"}
    assert sent == {32: 4 * 4096, 8: 4096}


def test_a_branch_crosses_with_all_its_tensors() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w"], ["z"], name="second"),
        helper.make_node("Add", ["z", "x"], ["y"], name="sum"),
    ]
    net = network(nodes, {"v": (8, 8), "w": (8, 8)}, (1, 8), (1, 8))
    graph = count(net, {"x": np.ones((1, 8), np.float32)})
    assert [crossing(graph, cut) for cut in range(4)] == [("x",), ("h", "x"), ("x", "z"), ()]


def test_local_is_advised_where_it_is_enough() -> None:
    net, x, _ = narrow()
    found = offload(net, x, device=DEVICE, server=SERVER, link=LINK, deadline_ms=1e3)
    assert found.options[0].where == "hybrid"
    assert found.advice == (
        "run it on the device (fp32): it meets the deadline and needs no link, so it works "
        "offline and nothing leaves the device"
    )


def test_what_is_not_in_the_figures_is_said() -> None:
    net, x, _ = narrow()
    timed = replace(DEVICE, start_us=5.0)
    found = offload(net, x, device=timed, server=SERVER, link=LINK)
    assert found.unknown == (
        "Starting an operator is not in the figures where what it costs is not known (server): "
        "small networks take longer there."
    )
    found = offload(net, x, device=DEVICE, server=SERVER, edge=DEVICE, link=LINK)
    assert "not known (device, server):" in found.unknown
    known = offload(net, x, device=timed, server=replace(timed, name="server"), link=LINK)
    assert known.unknown == ""


def test_a_deadline_that_nothing_meets() -> None:
    net, x, _ = narrow()
    found = offload(net, x, device=DEVICE, server=SERVER, link=LINK, deadline_ms=0.5)
    assert {each.meets for each in found.options} == {"no"}
    assert found.advice.startswith("nothing meets 0.5 ms; the nearest is split it after layer0")
    assert "of which the link takes 1.0" in found.advice


def test_a_deadline_inside_a_range() -> None:
    net, x, _ = narrow()
    slow = Link(mbit_s=0.01, rtt_ms=1e3)
    found = offload(net, x, device=DEVICE, server=SERVER, link=slow, deadline_ms=10.0)
    assert found.options[0].where == "local"
    assert found.options[0].meets == "perhaps"
    assert found.advice.endswith("whether it meets 10 ms only a measurement can tell")


def test_the_edge_has_a_link_of_its_own() -> None:
    net, x, _ = narrow()
    found = offload(
        net,
        x,
        device=DEVICE,
        server=SERVER,
        link=Link(mbit_s=8.0, rtt_ms=100.0),
        edge=replace(SERVER, name="near"),
        edge_link=LINK,
        transfers=(32,),
    )
    ways = {(each.where, each.server): each.link_ms for each in found.options}
    assert ways["edge", "near"] == pytest.approx(1 + (4 * 4096 + 64) / 1e3)
    assert ways["cloud", "server"] == pytest.approx(100 + (4 * 4096 + 64) / 1e3)
    assert found.options[0].server == "near"


def test_a_device_too_small_for_the_whole_can_run_a_part() -> None:
    net, x, _ = narrow()
    small = replace(DEVICE, memory_bytes=200_000)
    found = offload(net, x, device=small, server=SERVER, link=LINK)
    assert {each.where for each in found.options} == {"cloud", "hybrid"}
    (refused,) = found.refused
    assert refused.startswith("local: device cannot run it: weights and activations need 6.")
    none = replace(SERVER, memory_bytes=10)
    closed = offload(net, x, device=replace(small, memory_bytes=10), server=none, link=LINK)
    assert closed.options == ()
    assert closed.advice.startswith("nothing can run this network: local: device cannot run it")


def test_links_and_deadlines_are_read() -> None:
    assert Link.parse("50Mbit,30ms") == Link(mbit_s=50.0, rtt_ms=30.0)
    assert Link.parse("1.5 Gbit/s, 800us") == Link(mbit_s=1500.0, rtt_ms=0.8)
    assert read_deadline("20ms") == 20.0
    assert read_deadline("1s") == 1000.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("50Mbit", "--link '50Mbit': give rate and round trip, such as 50Mbit,30ms"),
        ("50,30ms", "--link '50,30ms': '50' is no number with a unit"),
        ("50MB,30ms", "--link '50MB,30ms': unknown unit 'MB'."),
        ("0Mbit,30ms", "--link '0Mbit,30ms': the rate of a link must be more than 0, got 0"),
    ],
)
def test_bad_links(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Link.parse(text)
    assert said in str(caught.value)


def test_bad_deadlines() -> None:
    with pytest.raises(RecipeError, match="--deadline 'soon': 'soon' is no number with a unit"):
        read_deadline("soon")
    with pytest.raises(RecipeError, match="--deadline '0ms' must be more than 0"):
        read_deadline("0ms")
