"""Faults 1-6, 12-19 and 28: files that are not the model they claim to be."""

import resource
import signal
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from tersor.core.errors import ModelError
from tersor.sources import exported, module
from tersor.sources import onnx as source
from tests.faults.jobs import fork, wait
from tests.sources.onnx_models import (
    FLOAT,
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

HTML = b"<!DOCTYPE html><html><head><title>404</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"


def refuse(place, said: str, load=source.load, **options) -> None:
    """Check the message, its length, the exit code and the time."""
    began = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load(str(place), **options)
    assert said in str(caught.value)
    assert str(caught.value).count("\n") <= 2
    assert caught.value.exit_code == 2
    assert time.perf_counter() - began < 5


@pytest.fixture
def net_script(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")
    return f"{file}:net"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is an empty file"),
        (HTML, "looks like an HTML page; was the download blocked?"),
        (POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    ],
)
def test_1_4_5_what_downloads_leave(tmp_path, net_script, content, said):
    for suffix, load in ((".onnx", source.load), (".pt2", exported.load)):
        file = tmp_path / f"x{suffix}"
        file.write_bytes(content)
        refuse(file, said, load)
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    refuse(net_script, said, module.load, weights=file)


def test_2_onnx_cut_off_anywhere(tmp_path):
    data = network().SerializeToString()
    file = tmp_path / "x.onnx"
    for part in range(64):
        file.write_bytes(data[: len(data) * part // 64])
        with pytest.raises(ModelError) as caught:
            source.load(str(file))
        assert str(caught.value).count("\n") <= 2


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(changed)))
        if rng.random() < 0.5:
            changed[place] ^= 1 << int(rng.integers(8))
        else:
            changed[place] = int(rng.integers(256))
    return bytes(changed)


def fuzz(folder: Path, count: int) -> dict[str, int]:
    """Read mutated models in children; what is accepted runs in ONNX Runtime, within budgets.

    Returns:
        How many were refused, ran, failed while running, and how many killed the runtime.
    """
    data, found = network().SerializeToString(), {"refused": 0, "ran": 0, "failed": 0, "killed": 0}
    log = folder / "log"
    first = 0
    while first < count:
        log.write_bytes(b"")

        def work(first: int = first) -> None:
            import onnxruntime

            resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            file = folder / "mutated.onnx"
            with log.open("ab", buffering=0) as out:
                for i in range(first, min(first + 1000, count)):
                    signal.alarm(20)
                    file.write_bytes(mutate(data, np.random.default_rng(i)))
                    out.write(b"L")
                    try:
                        made = source.load(str(file))
                    except ModelError:
                        out.write(b"e")
                        continue
                    out.write(b"R")
                    try:
                        session = onnxruntime.InferenceSession(
                            made.net.SerializeToString(),
                            options,
                            providers=["CPUExecutionProvider"],
                        )
                        session.run(None, {k: v.numpy() for k, v in made.inputs.example.items()})
                        out.write(b"r")
                    except Exception:
                        out.write(b"f")

        code = wait(fork(work), seconds=500)
        done = log.read_bytes().decode()
        assert code == 0 or done.endswith("R"), (
            f"reading mutation {first + done.count('L') - 1} ended with {code}"
        )
        for word, mark in (("refused", "e"), ("ran", "r"), ("failed", "f")):
            found[word] += done.count(mark)
        found["killed"] += code != 0
        first += done.count("L")
    assert sum(found.values()) == count
    return found


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_3_random_mutations(tmp_path, count):
    pytest.importorskip("onnxruntime")
    found = fuzz(tmp_path, count)
    assert found["refused"] > count // 10
    assert found["ran"] > count // 10
    assert found["killed"] == 0


def test_6_wrong_endings(tmp_path, net_script):
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    tensors = struct.pack("<Q", len(header)) + header + b"\0"
    (tmp_path / "a.onnx").write_bytes(tensors)
    refuse(tmp_path / "a.onnx", "is a safetensors file; give it as --weights of the network's code")
    with zipfile.ZipFile(tmp_path / "b.onnx", "w") as archive:
        archive.writestr("x", b"1")
    refuse(tmp_path / "b.onnx", "is a zip archive, whatever its name says")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "b.onnx").read_bytes())
    refuse(
        net_script,
        "is a zip archive, not a safetensors file",
        module.load,
        weights=tmp_path / "c.safetensors",
    )
    (tmp_path / "d.pt2").write_bytes(network().SerializeToString())
    refuse(tmp_path / "d.pt2", "is not a zip archive", exported.load)
    refuse(tmp_path, "is not a file")


def node(kind, inputs, outputs, name=None, **more):
    return helper.make_node(kind, inputs, outputs, name, **more)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: model(
                [
                    node("Add", ["x", "b"], ["a"], "one"),
                    node("Relu", ["a"], ["b"], "two"),
                    node("Relu", ["b"], ["y"], "three"),
                ]
            ),
            "the graph has a cycle through node 'one' (Add), by 'b'",
        ),
        (
            lambda: model(
                [node("Relu", ["a"], ["y"], "late"), node("Relu", ["x"], ["a"], "early")]
            ),
            "node 'late' (Relu) takes 'a', which is made only later; its nodes are not sorted",
        ),
        (
            lambda: model([node("Relu", ["gone"], ["y"], "n")]),
            "node 'n' (Relu) takes 'gone', which nothing makes",
        ),
        (
            lambda: model([node("Relu", ["x"], ["y"], "a"), node("Relu", ["x"], ["y"], "b")]),
            "node 'b' (Relu) makes 'y' again, which node 'a' (Relu) makes",
        ),
        (
            lambda: model([node("Relu", ["x"], ["x"], "a")]),
            "node 'a' (Relu) makes 'x' again, which an input",
        ),
        (lambda: model([node("Relu", ["x"], ["z"], "a")]), "output 'y' is made by no node"),
        (
            lambda: model([node("Relu", ["x"], ["y"])], inputs=[value("x"), value("x")]),
            "two inputs are called 'x'",
        ),
        (
            lambda: adding("w", stored=[array("w", [1.0]), array("w", [1.0])]),
            "two initializers are called 'w'",
        ),
        (
            lambda: model([node("Rellu", ["x"], ["y"], "n")]),
            "node 'n' (Rellu): there is no operator 'Rellu' in opset 21",
        ),
        (lambda: model([node("Relu", ["x", "x"], ["y"], "n")]), "n"),
    ],
)
def test_12_structure(tmp_path, made, said):
    refuse(save(made(), tmp_path / "m.onnx"), said)


def test_13_versions(tmp_path):
    plain = [node("Relu", ["x"], ["y"])]
    refuse(save(model(plain, opset=999), tmp_path / "m.onnx"), "opset 999 is newer than the ")
    refuse(save(model(plain, opset=999), tmp_path / "m.onnx"), "needs onnxruntime >= ")
    refuse(save(model(plain, ir=99), tmp_path / "m.onnx"), "IR version 99 is newer than the ")
    refuse(save(model(plain, opset=1), tmp_path / "m.onnx"), "opset 1 is too old")
    bare = model(plain)
    del bare.opset_import[:]
    refuse(save(bare, tmp_path / "m.onnx"), "imports no operator set")


def test_13_the_newest_that_is_let_through_runs(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    made = model(
        [node("Relu", ["x"], ["y"])], opset=onnx.defs.onnx_opset_version(), ir=onnx.IR_VERSION
    )
    found = source.load(save(made, tmp_path / "m.onnx"))
    runtime.InferenceSession(found.net.SerializeToString(), providers=["CPUExecutionProvider"])


def test_14_custom_operators(tmp_path):
    made = model([node("Evil", ["x"], ["y"], "n", domain="evil.ops")], domains=["evil.ops"])
    refuse(
        save(made, tmp_path / "m.onnx"),
        "node 'n' (Evil) is of the custom operator domain 'evil.ops', whose code is not part of the file; "
        "custom operators are refused",
    )
    made = model([node("Gelu", ["x"], ["y"], "n", domain="com.microsoft")])
    refuse(save(made, tmp_path / "m.onnx"), "is of domain 'com.microsoft', which is not imported")


def tensor(dims, kind=FLOAT, **fields):
    return TensorProto(name="w", data_type=kind, dims=dims, **fields)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (
            tensor([4], raw_data=b"\0" * 12),
            "has shape [4], which needs 16 bytes, but 12 bytes of data",
        ),
        (tensor([2**30], raw_data=b"\0" * 16), "needs 4294967296 bytes, but 16 bytes of data"),
        (tensor([2**40, 2**40], raw_data=b"\0"), "has more elements than can be counted"),
        (tensor([-3], raw_data=b"\0" * 12), "has a negative dimension: [-3]"),
        (tensor([1] * 1000, raw_data=b"\0" * 4), "has 1000 dimensions, more than 64"),
        (tensor([3], float_data=[1.0]), "which needs 3 values, but 1 values of data"),
        (tensor([1], kind=99, raw_data=b"\0"), "has the unknown type 99"),
        (
            tensor([1], kind=TensorProto.INT8, int32_data=[300]),
            "has a value outside [-128, 127], the range of its type",
        ),
        (tensor([3]), "which needs 3 values, but 0 values"),
    ],
)
def test_15_tensors_that_are_not_what_they_say(tmp_path, stored, said):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(
        save(adding("w", stored=[stored]), tmp_path / "m.onnx"),
        f"tensor 'w' {said}" if said[0] == "h" else said,
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def bombs():
    shape = array("shape", [2**20, 2**20], np.int64)
    yield (
        "ConstantOfShape",
        [
            node("ConstantOfShape", ["shape"], ["big"], "bomb"),
            node("ReduceMax", ["big"], ["m"]),
            node("Add", ["x", "m"], ["y"]),
        ],
        [shape],
        "4 TiB",
    )
    yield (
        "Expand",
        [
            node("Expand", ["one", "shape"], ["big"], "bomb"),
            node("ReduceMax", ["big"], ["m"]),
            node("Add", ["x", "m"], ["y"]),
        ],
        [shape, array("one", [1.0])],
        "4 TiB",
    )
    yield (
        "Tile",
        [
            node("Tile", ["one", "shape"], ["big"], "bomb"),
            node("ReduceMax", ["big"], ["m"]),
            node("Add", ["x", "m"], ["y"]),
        ],
        [shape, array("one", [[1.0]])],
        "4 TiB",
    )


@pytest.mark.parametrize(
    ("nodes", "stored", "needs"), [b[1:] for b in bombs()], ids=[b[0] for b in bombs()]
)
def test_16_memory_bombs(tmp_path, nodes, stored, needs):
    refuse(
        save(model(nodes, stored=stored), tmp_path / "m.onnx"),
        f"node 'bomb' ({nodes[0].op_type}) makes a tensor that needs {needs}, budget 8 GiB; refused before running",
    )


def test_16_a_bomb_in_several_pieces(tmp_path):
    shape = array("shape", [2**10, 2**10, 2**10], np.int64)
    nodes = [node("ConstantOfShape", ["shape"], [f"b{i}"], f"b{i}") for i in range(3)]
    nodes += [
        node("Sum", ["b0", "b1", "b2"], ["s"]),
        node("ReduceMax", ["s"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ]
    refuse(
        save(model(nodes, stored=[shape]), tmp_path / "m.onnx"),
        "running it needs 16 GiB at once, budget 8 GiB",
    )


def loop(body_nodes, count):
    body = helper.make_graph(
        body_nodes,
        "body",
        [value("i", INT64, []), value("go", TensorProto.BOOL, []), value("state")],
        [value("go2", TensorProto.BOOL, []), value("next")],
    )
    return model(
        [node("Loop", ["count", "", "x"], ["y"], "loop", body=body)],
        stored=[array("count", count, np.int64)],
    )


def test_17_endless_loops(tmp_path):
    body = [node("Identity", ["go"], ["go2"]), node("Relu", ["state"], ["next"])]
    refuse(
        save(loop(body, 2**62), tmp_path / "m.onnx"),
        "node 'loop' (Loop) loops 4611686018427387904 times, more than the budget of 10000000",
    )
    source.load(save(loop(body, 10), tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("depth", "said"),
    [(20, "are nested more than 16 deep"), (2000, "cut off while it was copied, or damaged")],
)
def test_17_deep_nesting(tmp_path, depth, said):
    inner = b""
    graph = helper.make_graph(
        [node("Identity", ["x"], ["z"])], "g", [], [value("z")]
    ).SerializeToString()
    for _ in range(depth):
        inner = graph
        attribute = field(1, b"then_branch") + field(6, inner) + b"\xa0\x01\x05"
        made = (
            field(1, b"flag")
            + field(2, b"z")
            + field(3, b"if")
            + field(4, b"If")
            + field(5, attribute)
        )
        graph = field(1, made) + field(2, b"g") + field(12, value("z").SerializeToString())
    outer = model(
        [node("Relu", ["x"], ["y"])], inputs=[value("x"), value("flag", TensorProto.BOOL, [])]
    )
    data = outer.SerializeToString()
    attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
    extra = (
        field(1, b"flag")
        + field(2, b"q")
        + field(3, b"top")
        + field(4, b"If")
        + field(5, attribute)
    )
    file = tmp_path / "m.onnx"
    file.write_bytes(data + field(7, field(1, extra)))  # protobuf merges the two graphs
    refuse(file, said)


def field(number: int, data: bytes) -> bytes:
    """Encode one protobuf field of bytes."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    return varint(number << 3 | 2) + varint(len(data)) + data


def test_18_files_larger_than_protobuf(tmp_path):
    file = tmp_path / "m.onnx"
    with file.open("wb") as stream:
        stream.write(network().SerializeToString())
        stream.truncate(3 << 30)
    refuse(file, "it has 3.0 GiB, but a protobuf file can have 2; save it with external data")


@pytest.mark.slow
def test_18_more_than_two_gigabytes_outside(tmp_path):
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(5 << 29)
    stored = [external("w", [5 << 27], location="w.bin")]
    nodes = [node("ReduceMax", ["w"], ["m"], "max"), node("Add", ["x", "m"], ["y"], "add")]
    found = source.load(save(model(nodes, stored=stored), tmp_path / "m.onnx"))
    assert len(found.net.graph.initializer[0].raw_data) == 5 << 29


def test_19_broken_numbers(tmp_path):
    stored = [
        array("a", [1.0, np.nan, 0.0]),
        array("b", [np.inf, 1.0, 2.0]),
        array("c", [1.0, 1e-45, 0.0]),
    ]
    refuse(
        save(adding("a", "b", "c", stored=stored), tmp_path / "m.onnx"),
        "NaN or infinite values in 2 tensors: a, b; train or repair",
    )
    for scale in (0.0, -1.0):
        made = model(
            [
                node("QuantizeLinear", ["x", "s"], ["q"], "quantize"),
                node("DequantizeLinear", ["q", "s"], ["y"], "dq"),
            ],
            stored=[array("s", scale)],
        )
        refuse(save(made, tmp_path / "m.onnx"), "scale 's' of node 'quantize' is not positive")


@pytest.mark.parametrize("name", ["模型.onnx", "a b \U0001f600.onnx", "n" * 250 + ".onnx"])
def test_28_any_name(tmp_path, name):
    source.load(save(network(), tmp_path / name))
