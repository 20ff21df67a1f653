"""Twenty compressions that bought no speed, no throughput or no bytes, each with its one cause.

A case writes three files: the network before, what a compression made of it, and the same with the
cause taken away. That the third beats the second, measured by slow_cases.py, is the proof that the
cause is the right one. `explain` is given the first two and is not told.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from _slow_graphs import Graph, chain, to_openvino
from onnx import TensorProto

Question = Literal["latency", "throughput", "size"]
CAUSES: Mapping[str, str] = {
    "dense_kernels": "weights are zero, and kernels multiply by them all the same",
    "stored_zeros": "weights are zero, or few values, and the file stores each in full",
    "float_storage": "weights were rounded to a few levels, and are stored as floats",
    "duplicates": "the same weights are stored more than once",
    "unfused_qdq": "rounding to integers and back runs as operators of its own",
    "float_layers": "layers that could be in integers were left in float",
    "no_integer_kernel": "most of the time goes to operators that have no integer kernel",
    "overhead": "operators are so small that starting them takes the time",
    "idle_lanes": "channels do not fill the vectors of the fast kernel",
    "memory_bound": "reading weights takes the time, not arithmetic",
    "small_batch": "too few samples at once",
    "threads": "more threads than cores, or than the work is worth",
    "casts": "numbers are converted between types in each run",
    "unpacked_each_run": "weights are unpacked again in each run",
    "copies": "tensors are moved, not computed",
    "rank": "two factors do more work than the layer they replace",
    "not_optimized": "the runtime is told not to optimize the graph",
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """A file and how it is run."""

    file: Path
    runtime: str = "onnxruntime"
    options: Mapping[str, Any] = field(default_factory=lambda: {"threads": 1})
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was done, what was hoped for, and why it did not come."""

    name: str
    question: Question
    cause: str
    done: str
    fix: str
    build: Callable[[Path], tuple[Side, Side, Side]]
    """Write before, after and fixed into a folder."""


CASES: list[Case] = []


def case(
    question: Question, cause: str, done: str, fix: str
) -> Callable[[Callable[[Path], tuple[Side, Side, Side]]], None]:
    assert cause in CAUSES

    def keep(build: Callable[[Path], tuple[Side, Side, Side]]) -> None:
        CASES.append(
            Case(
                name=build.__name__, question=question, cause=cause, done=done, fix=fix, build=build
            )
        )

    return keep


def _convs(
    file: Path,
    channels: int,
    *,
    zeros: float = 0.0,
    levels: int = 0,
    count: int = 4,
    side: int = 16,
) -> Path:
    """Convolutions of 3 x 3 with ReLU between."""
    graph = Graph(3, side, side)
    x = "x"
    for i, o in chain([3, *[channels] * count]):
        weight = graph.weight(o, i, 3, 3, zeros=zeros if i > 3 else 0.0)
        if levels:
            step = np.abs(weight).max() / (levels // 2)
            weight = (np.rint(weight / step) * step).astype(np.float32)
        x = graph.op("Relu", graph.conv(x, weight))
    return graph.save(file, graph.op("GlobalAveragePool", x))


def _linears(file: Path, sizes: list[int], *, zeros: float = 0.0, groups: bool = False) -> Path:
    graph = Graph(sizes[0])
    x = "x"
    for i, o in chain(sizes):
        weight_OI = graph.weight(o, i, zeros=zeros)
        if groups:  # 2 of each 4 neighboring inputs
            quads = weight_OI.reshape(o, i // 4, 4)
            order = np.abs(quads).argsort(axis=2)
            np.put_along_axis(quads, order[:, :, :2], 0, axis=2)
        x = graph.op("Relu", graph.linear(x, weight_OI.T))
    return graph.save(file, x)


@case(
    "latency",
    "dense_kernels",
    "90 % of the weights of convolutions set to zero, one by one",
    "two thirds of the channels cut",
)
def zeros_in_convolutions(folder: Path) -> tuple[Side, Side, Side]:
    return (
        Side(file=_convs(folder / "before.onnx", 96)),
        Side(file=_convs(folder / "after.onnx", 96, zeros=0.9)),
        Side(file=_convs(folder / "fixed.onnx", 32)),
    )


@case(
    "latency",
    "dense_kernels",
    "2 of 4 weights of linear layers set to zero, on OpenVINO",
    "half of the features cut",
)
def two_of_four_zeros(folder: Path) -> tuple[Side, Side, Side]:
    sizes = [256, 512, 512, 512, 64]
    options = {"threads": 1}
    files = (
        _linears(folder / "before.onnx", sizes),
        _linears(folder / "after.onnx", sizes, groups=True),
        _linears(folder / "fixed.onnx", [256, 256, 256, 256, 64]),
    )
    a, b, c = (
        Side(file=to_openvino(f), runtime="openvino", options=options, batch=64) for f in files
    )
    return a, b, c


@case(
    "size",
    "stored_zeros",
    "95 % of the weights set to zero, in a program of PyTorch",
    "the file packed",
)
def zeros_on_disk(folder: Path) -> tuple[Side, Side, Side]:
    import torch
    from torch import nn

    from tersor.core.packing import pack

    def network(file: Path, zeros: float) -> Path:
        graph = Graph()
        layers = [nn.Linear(512, 512) for _ in range(3)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(torch.from_numpy(graph.weight(512, 512, zeros=zeros)))
        torch.export.save(
            torch.export.export(nn.Sequential(*layers).eval(), (torch.zeros(1, 512),)), file
        )
        return file

    a, b, c = (
        Side(file=file, runtime="torch_export")
        for file in (
            network(folder / "before.pt2", 0.0),
            network(folder / "after.pt2", 0.95),
            pack([network(folder / "again.pt2", 0.95)], folder / "fixed.packed"),
        )
    )
    return a, b, c


@case(
    "size",
    "float_storage",
    "weights rounded to 255 levels, fake-quantized, and saved",
    "codes stored in int8",
)
def rounded_on_disk(folder: Path) -> tuple[Side, Side, Side]:
    graph = Graph(3, 16, 16)
    x = "x"
    for i, o in chain([3, *[96] * 4]):
        x = graph.op("Relu", graph.conv(x, graph.stored(graph.weight(o, i, 3, 3)), size=3))
    fixed = graph.save(folder / "fixed.onnx", graph.op("GlobalAveragePool", x))
    return (
        Side(file=_convs(folder / "before.onnx", 96)),
        Side(file=_convs(folder / "after.onnx", 96, levels=254)),
        Side(file=fixed),
    )


@case("size", "duplicates", "layers tied, and saved once for each use", "stored once")
def tied_on_disk(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, *, tied: bool, once: bool = False) -> Path:
        graph = Graph(256)
        shared = graph.weight(256, 256)
        name = graph.constant(shared, "weight") if once else ""
        x = "x"
        for _ in range(6):
            weight = shared if tied else graph.weight(256, 256)
            x = graph.op("Relu", graph.linear(x, name or weight))
        return graph.save(file, x)

    return (
        Side(file=network(folder / "before.onnx", tied=False)),
        Side(file=network(folder / "after.onnx", tied=True)),
        Side(file=network(folder / "fixed.onnx", tied=True, once=True)),
    )


@case(
    "size",
    "float_layers",
    "linear layers stored in int8, the embedding in float",
    "the embedding in int8, too",
)
def embedding_on_disk(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, *, linear: bool, embedding: bool) -> Path:
        graph = Graph(16)
        table = graph.weight(8000, 128, fan=1)
        name = graph.stored(table) if embedding else graph.constant(table, "embedding")
        codes = graph.op("Cast", graph.op("Abs", "x"), to=7)
        x = graph.op("Gather", name, codes, axis=0)
        for _ in range(3):
            weight = graph.weight(128, 128)
            x = graph.op("Relu", graph.linear(x, graph.stored(weight, 1) if linear else weight))
        return graph.save(file, x)

    return (
        Side(file=network(folder / "before.onnx", linear=False, embedding=False)),
        Side(file=network(folder / "after.onnx", linear=True, embedding=False)),
        Side(file=network(folder / "fixed.onnx", linear=True, embedding=True)),
    )


def _quantized_convs(file: Path, channels: int, *, whole: bool) -> Path:
    """Convolutions with Q/DQ around inputs, and, where `whole`, around weights and results."""
    graph = Graph(3, 32, 32)
    x = "x"
    for i, o in chain([3, *[channels] * 6]):
        weight = graph.weight(o, i, 3, 3)
        x = graph.conv(graph.rounded(x), graph.stored(weight) if whole else weight, size=3)
        x = graph.op("Relu", x)
        x = graph.rounded(x, zero=0) if whole else x
    return graph.save(file, graph.op("GlobalAveragePool", x))


@case(
    "latency",
    "unfused_qdq",
    "inputs of convolutions rounded to int8, weights left as they were",
    "weights and results rounded, too",
)
def inputs_rounded_only(folder: Path) -> tuple[Side, Side, Side]:
    return (
        Side(file=_convs(folder / "before.onnx", 16, side=32, count=6)),
        Side(file=_quantized_convs(folder / "after.onnx", 16, whole=False)),
        Side(file=_quantized_convs(folder / "fixed.onnx", 16, whole=True)),
    )


@case(
    "latency",
    "unfused_qdq",
    "depthwise blocks with Q/DQ on both sides of each activation",
    "one Q/DQ after the activation",
)
def activations_between(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, *, quantized: bool, split: bool = False) -> Path:
        graph = Graph(48, 24, 24)
        x = graph.rounded("x") if quantized else "x"
        for _ in range(4):
            for weight, groups in (
                (graph.weight(48, 1, 3, 3), 48),
                (graph.weight(48, 48, 1, 1), 1),
            ):
                given = graph.stored(weight) if quantized else weight
                x = graph.conv(x, given, size=weight.shape[-1], groups=groups)
                x = graph.rounded(x) if split else x
                x = graph.op(
                    "LeakyRelu" if split else "Relu", x, **({"alpha": 0.0} if split else {})
                )
                x = graph.rounded(x, zero=0) if quantized else x
        return graph.save(file, graph.op("GlobalAveragePool", x))

    return (
        Side(file=network(folder / "before.onnx", quantized=False)),
        Side(file=network(folder / "after.onnx", quantized=True, split=True)),
        Side(file=network(folder / "fixed.onnx", quantized=True)),
    )


@case(
    "latency",
    "float_layers",
    "linear layers quantized dynamically, the LSTM left out",
    "the LSTM, too",
)
def lstm_excluded(folder: Path) -> tuple[Side, Side, Side]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = Graph(40, 128)
    size = 256
    rows = graph.op("Transpose", "x", perm=[1, 0, 2])
    y = graph.op(
        "LSTM",
        rows,
        graph.constant(graph.weight(1, 4 * size, 128, fan=size), "weight"),
        graph.constant(graph.weight(1, 4 * size, size, fan=size), "recurrent"),
        hidden_size=size,
    )
    last = graph.op("ReduceMean", y, graph.constant(np.array([0, 1])), keepdims=0)
    before = graph.save(folder / "before.onnx", graph.linear(last, graph.weight(size, 64)))
    files = []
    for name, kinds in (("after.onnx", ["MatMul"]), ("fixed.onnx", ["MatMul", "LSTM"])):
        files.append(folder / name)
        quantize_dynamic(before, files[-1], op_types_to_quantize=kinds, weight_type=QuantType.QInt8)
    return Side(file=before), Side(file=files[0]), Side(file=files[1])


@case(
    "latency",
    "no_integer_kernel",
    "linear layers in int8 between activations by Erf",
    "ReLU in place of GELU",
)
def gelu_between(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, *, quantized: bool, cheap: bool = False) -> Path:
        graph = Graph(32, 32)
        x = "x"
        for _ in range(3):
            for i, o in ((32, 256), (256, 32)):
                weight_IO = graph.weight(i, o, fan=i)
                if quantized:
                    x = graph.linear(graph.rounded(x), graph.stored(weight_IO, 1))
                    x = graph.rounded(x)
                else:
                    x = graph.linear(x, weight_IO)
                if o > i:
                    x = graph.op("Relu", x) if cheap else _gelu(graph, x)
        return graph.save(file, x)

    return (
        Side(file=network(folder / "before.onnx", quantized=False), batch=8),
        Side(file=network(folder / "after.onnx", quantized=True), batch=8),
        Side(file=network(folder / "fixed.onnx", quantized=True, cheap=True), batch=8),
    )


def _gelu(graph: Graph, x: str) -> str:
    inner = graph.op("Erf", graph.op("Mul", x, graph.constant(np.float32(0.70710677))))
    outer = graph.op("Mul", x, graph.op("Add", inner, graph.constant(np.float32(1))))
    return graph.op("Mul", outer, graph.constant(np.float32(0.5)))


@case(
    "latency",
    "overhead",
    "half of the channels of 200 tiny linear layers cut",
    "the layers multiplied into one, as nothing is between them",
)
def tiny_layers(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, size: int, count: int) -> Path:
        graph = Graph(size)
        x = "x"
        for _ in range(count):
            x = graph.linear(x, graph.weight(size, size))
        return graph.save(file, x)

    return (
        Side(file=network(folder / "before.onnx", 16, 200)),
        Side(file=network(folder / "after.onnx", 8, 200)),
        Side(file=network(folder / "fixed.onnx", 8, 1)),
    )


@case("latency", "idle_lanes", "channels cut from 64 to 57", "channels cut to 48")
def odd_channels(folder: Path) -> tuple[Side, Side, Side]:
    return (
        Side(file=_convs(folder / "before.onnx", 64, count=6)),
        Side(file=_convs(folder / "after.onnx", 57, count=6)),
        Side(file=_convs(folder / "fixed.onnx", 48, count=6)),
    )


@case(
    "latency",
    "memory_bound",
    "GELU replaced by ReLU behind large matrices, at batch 1",
    "weights in int8: the same products, a quarter of the bytes",
)
def large_matrices(folder: Path) -> tuple[Side, Side, Side]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def network(file: Path, *, cheap: bool) -> Path:
        graph = Graph(2048)
        x = "x"
        for _ in range(4):
            x = graph.linear(x, graph.weight(2048, 2048))
            x = graph.op("Relu", x) if cheap else _gelu(graph, x)
        return graph.save(file, x)

    before = network(folder / "before.onnx", cheap=False)
    after = network(folder / "after.onnx", cheap=True)
    quantize_dynamic(after, folder / "fixed.onnx", weight_type=QuantType.QInt8)
    return Side(file=before), Side(file=after), Side(file=folder / "fixed.onnx")


@case(
    "throughput",
    "small_batch",
    "a fifth of the features of linear layers cut, at batch 1",
    "32 samples at once",
)
def one_by_one(folder: Path) -> tuple[Side, Side, Side]:
    after = _linears(folder / "after.onnx", [160, 160, 160, 160, 160])
    return (
        Side(file=_linears(folder / "before.onnx", [200, 200, 200, 200, 200])),
        Side(file=after),
        Side(file=after, batch=32),
    )


@case(
    "latency", "threads", "channels cut, and eight threads asked for on fewer cores", "one thread"
)
def oversubscribed(folder: Path) -> tuple[Side, Side, Side]:
    after = _convs(folder / "after.onnx", 24, count=8)
    return (
        Side(file=_convs(folder / "before.onnx", 32, count=8)),
        Side(file=after, options={"threads": 8}),
        Side(file=after),
    )


@case("latency", "casts", "channels cut by a quarter; gains kept in double precision", "in float")
def double_precision(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, channels: int, *, double: bool) -> Path:
        graph = Graph(channels, 32, 32)
        x = "x"
        for _ in range(6):
            x = graph.conv(x, graph.weight(channels, channels, 1, 1))
            gain = graph.weight(channels, 1, 1)
            if double:
                x = graph.op("Cast", x, to=TensorProto.DOUBLE)
                x = graph.op("Mul", x, graph.constant(gain.astype(np.float64)))
                x = graph.op("Cast", x, to=TensorProto.FLOAT)
            else:
                x = graph.op("Mul", x, graph.constant(gain))
            x = graph.op("Relu", x)
        return graph.save(file, graph.op("GlobalAveragePool", x))

    return (
        Side(file=network(folder / "before.onnx", 32, double=False)),
        Side(file=network(folder / "after.onnx", 24, double=True)),
        Side(file=network(folder / "fixed.onnx", 24, double=False)),
    )


@case(
    "latency",
    "unpacked_each_run",
    "weights of convolutions stored in int8, activations not",
    "weights unpacked once, before saving",
)
def weights_in_integers(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, *, stored: bool) -> Path:
        graph = Graph(192, 4, 4)
        x = "x"
        for _ in range(4):
            weight = graph.weight(192, 192, 3, 3)
            given = graph.stored(weight) if stored else weight
            x = graph.op("Relu", graph.conv(x, given, size=3))
        return graph.save(file, graph.op("GlobalAveragePool", x))

    plain = network(folder / "before.onnx", stored=False)
    return (
        Side(file=plain),
        Side(file=network(folder / "after.onnx", stored=True)),
        Side(file=plain),
    )


@case(
    "latency",
    "copies",
    "channels cut; shortcuts gather and pad what is left",
    "the same channels cut in all layers that are added",
)
def gathered_channels(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, channels: int, kept: int) -> Path:
        graph = Graph(channels, 32, 32)
        x = "x"
        for _ in range(6):
            y = x
            if kept != channels:
                chosen = np.sort(graph.rng.permutation(channels)[:kept])
                y = graph.op("Gather", x, graph.constant(chosen), axis=1)
            y = graph.op("Relu", graph.conv(y, graph.weight(kept, kept, 1, 1)))
            if kept != channels:
                pads = np.array([0, 0, 0, 0, 0, channels - kept, 0, 0])
                y = graph.op("Pad", y, graph.constant(pads))
                order = graph.constant(graph.rng.permutation(channels))
                y = graph.op("Gather", y, order, axis=1)
            x = graph.op("Add", x, y)
        return graph.save(file, graph.op("GlobalAveragePool", x))

    return (
        Side(file=network(folder / "before.onnx", 32, 32)),
        Side(file=network(folder / "after.onnx", 32, 24)),
        Side(file=network(folder / "fixed.onnx", 24, 24)),
    )


@case(
    "latency",
    "rank",
    "linear layers split into factors of rank 320 of 512, on OpenVINO",
    "of rank 96",
)
def high_rank(folder: Path) -> tuple[Side, Side, Side]:
    def network(file: Path, rank: int) -> Path:
        graph = Graph(512)
        x = "x"
        for _ in range(4):
            if rank:
                x = graph.linear(x, graph.weight(512, rank))
                x = graph.linear(x, graph.weight(rank, 512, fan=rank))
            else:
                x = graph.linear(x, graph.weight(512, 512))
            x = graph.op("Relu", x)
        return graph.save(file, x)

    names = (("before.onnx", 0), ("after.onnx", 320), ("fixed.onnx", 96))
    a, b, c = (
        Side(file=to_openvino(network(folder / name, rank)), runtime="openvino", batch=32)
        for name, rank in names
    )
    return a, b, c


@case(
    "latency",
    "not_optimized",
    "channels cut by a quarter, run with optimization disabled",
    "optimization allowed",
)
def optimization_disabled(folder: Path) -> tuple[Side, Side, Side]:
    after = _convs(folder / "after.onnx", 48, count=6)
    return (
        Side(file=_convs(folder / "before.onnx", 64, count=6)),
        Side(file=after, options={"threads": 1, "optimization": "disable"}),
        Side(file=after),
    )
