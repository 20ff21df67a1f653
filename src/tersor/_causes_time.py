"""Where the time of a run goes in vain: the runtime's profile, beside the graph of the file."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.core.hardware import Machine
from tersor.core.runtime import OperatorTime
from tersor.ops.file_graph import LAYERS, FileGraph, FileOperator

Found = tuple[str, float, str]
"""Cause, share of the time, evidence."""

_ADDED = re.compile(r"(_nchwc|_token_\d+|/duplicated|_Dequant\w*)+$")
"""What ONNX Runtime appends to names."""
_FLOAT_LAYERS = (
    *("Conv", "FusedConv", "NhwcFusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"),
    *("LSTM", "GRU", "RNN", "ConvTranspose"),
    *("FullyConnected", "Convolution", "GroupConvolution", "Deconvolution", "RNNSeq", "RNNCell"),
)
_INTEGER_LAYERS = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits"),
)
_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize")
_ROUNDED_ACTIVATIONS = ("QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax")
_CASTS = ("Cast", "Convert")
_COPIES = (
    *("Transpose", "Pad", "Concat", "Slice", "Split", "Gather", "GatherElements", "Expand"),
    *("ReorderInput", "ReorderOutput", "Reorder", "StridedSlice", "Tile"),
)
_INTEGER_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_LEAST_ZEROS = 0.3
_REUSE = 16
_INTEGERS_SAVE = 0.75
"""Of a float layer's time, where integers are four times as fast or a quarter of the bytes."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Operators of a run, each with its place in the file where its name tells it."""

    operators: Sequence[OperatorTime]
    graph: FileGraph

    def __post_init__(self) -> None:
        assert self.operators

    @property
    def total_ms(self) -> float:
        """Add up all operators."""
        return sum(each.ms for each in self.operators) or 1e-9

    def ms(self, kinds: Iterable[str]) -> float:
        """Add up operators of some kinds."""
        return sum(each.ms for each in self.operators if each.kind in tuple(kinds))

    def in_file(self, each: OperatorTime) -> FileOperator | None:
        """Find an operator in the file by its name."""
        names = {op.name: op for op in self.graph.operators}
        return names.get(_ADDED.sub("", each.name))

    def layer(self, each: OperatorTime) -> FileOperator | None:
        """Find the layer that an operator computes, maybe fused with what follows it."""
        makers = self.graph.makers()
        op = self.in_file(each)
        for _ in range(4):
            if op is None or op.kind in LAYERS:
                return op
            before = [makers[n] for n in op.inputs if n in makers]
            op = before[0] if before else None
        return None


def time_causes(profile: Profile, machine: Machine) -> list[Found]:
    """Assign shares of the time to causes; one operator counts under one cause of its own kind."""
    found = [
        *_unfused(profile),
        *_left_in_float(profile),
        *_moved(profile),
        *_zeros(profile),
        *_factors(profile),
        *_memory(profile, machine),
        *_instructions(profile, machine),
    ]
    return [(cause, min(share, 1.0), said) for cause, share, said in found if share > 0]


def _unfused(profile: Profile) -> list[Found]:
    """Tell rounding around layers, which placement could fuse, from that around float operators."""
    graph, total = profile.graph, profile.total_ms
    makers, users = graph.makers(), graph.users()
    edges_ms = outside_ms = float_ms = 0.0
    lone: dict[str, int] = {}
    rounding = 0
    for each in profile.operators:
        op = profile.in_file(each)
        if each.kind in _ROUNDING and each.kind != "DynamicQuantizeLinear":
            if op is not None and op.inputs[0] in graph.constants:
                continue  # a weight: unpacked in each run
            rounding += 1
            near = [] if op is None else _neighbors(op, makers, users)
            if near and not any(kind in LAYERS for kind in near):
                outside_ms += each.ms
            else:
                edges_ms += each.ms
        elif each.kind in _ROUNDED_ACTIVATIONS:
            edges_ms += each.ms
            lone[each.kind] = lone.get(each.kind, 0) + 1
        elif each.kind in _FLOAT_LAYERS:
            layer = profile.layer(each)
            fed = None if layer is None else makers.get(layer.inputs[0])
            if fed is not None and fed.kind == "DequantizeLinear":
                float_ms += each.ms
    found: list[Found] = []
    if edges_ms + float_ms > 0 and (rounding > 2 or lone):
        alone = f", {sum(lone.values())} activations on integers by themselves" if lone else ""
        found.append(
            (
                "unfused_qdq",
                (edges_ms + _INTEGERS_SAVE * float_ms) / total,
                f"{rounding} QuantizeLinear and DequantizeLinear run as operators{alone}: "
                f"{_percent(edges_ms, total)} of the time; layers that get rounded inputs and run "
                f"in float all the same: {_percent(float_ms, total)}",
            )
        )
    others = [e for e in profile.operators if not _known(e.kind)]
    others_ms = sum(e.ms for e in others)
    if rounding or profile.ms(_INTEGER_LAYERS):
        kinds = sorted({e.kind for e in others}, key=lambda k: -profile.ms([k]))[:3]
        found.append(
            (
                "no_integer_kernel",
                (others_ms + outside_ms) / total,
                f"{', '.join(kinds)} take {_percent(others_ms, total)} of the time in float, and "
                f"rounding around them {_percent(outside_ms, total)}",
            )
        )
    return found


def _neighbors(
    op: FileOperator, makers: Mapping[str, FileOperator], users: Mapping[str, list[FileOperator]]
) -> list[str]:
    """List kinds of the operators on the float side of a rounding: its source or its readers."""
    if op.kind == "QuantizeLinear":
        return [makers[op.inputs[0]].kind] if op.inputs[0] in makers else []
    return [user.kind for name in op.outputs for user in users.get(name, ())]


def _known(kind: str) -> bool:
    return kind in {
        *_FLOAT_LAYERS,
        *_INTEGER_LAYERS,
        *_ROUNDING,
        *_ROUNDED_ACTIVATIONS,
        *_CASTS,
        *_COPIES,
    } or kind.startswith("QLinear")


def _left_in_float(profile: Profile) -> list[Found]:
    """Weigh float layers beside integer ones."""
    integers = sum(each.kind in _INTEGER_LAYERS for each in profile.operators)
    makers = profile.graph.makers()
    left: list[OperatorTime] = []
    for each in profile.operators:
        layer = profile.layer(each) if each.kind in _FLOAT_LAYERS else None
        if layer is not None and not layer.unpacked and layer.weight:
            fed = makers.get(layer.inputs[0])
            if fed is None or fed.kind != "DequantizeLinear":
                left.append(each)
    if not integers or not left:
        return []
    ms = sum(each.ms for each in left)
    names = ", ".join(each.name for each in sorted(left, key=lambda e: -e.ms)[:3])
    said = (
        f"{len(left)} layers run in float beside {integers} in integers and take "
        f"{_percent(ms, profile.total_ms)} of the time: {names}"
    )
    return [("float_layers", _INTEGERS_SAVE * ms / profile.total_ms, said)]


def _moved(profile: Profile) -> list[Found]:
    """Weigh casts, with what they enclose, and copies."""
    makers, users, total = profile.graph.makers(), profile.graph.users(), profile.total_ms
    casts = copies = enclosed = 0.0
    kinds: dict[str, int] = {}
    for each in profile.operators:
        op = profile.in_file(each)
        if each.kind in _CASTS:
            casts += each.ms
        elif each.kind in _COPIES:
            if op is not None and op.kind == "Gather" and op.inputs[0] in profile.graph.constants:
                continue  # an embedding
            copies += each.ms
            kinds[each.kind] = kinds.get(each.kind, 0) + 1
        elif op is not None and op.kind not in LAYERS:
            before = {makers[n].kind for n in op.inputs if n in makers}
            after = {u.kind for n in op.outputs for u in users.get(n, ())}
            enclosed += each.ms if before == after == {"Cast"} else 0.0
    found: list[Found] = []
    if casts:
        inside = f", and what runs between them {_percent(enclosed, total)}" if enclosed else ""
        said = f"conversions between types take {_percent(casts, total)} of the time{inside}"
        found.append(("casts", (casts + enclosed) / total, said))
    if copies:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        said = f"{what} move tensors and compute nothing: {_percent(copies, total)} of the time"
        found.append(("copies", copies / total, said))
    return found


def _zeros(profile: Profile) -> list[Found]:
    """Count the products with zeros that dense kernels compute."""
    graph = profile.graph
    layers_ms = profile.ms((*_FLOAT_LAYERS, *_INTEGER_LAYERS))
    macs = wasted = 0.0
    many = 0
    for op in graph.operators:
        if op.weight and op.macs:
            zeros = float((graph.constants[op.weight] == 0).mean())
            macs += op.macs
            if zeros >= _LEAST_ZEROS:
                wasted, many = wasted + zeros * op.macs, many + 1
    if not wasted:
        return []
    said = (
        f"{many} layers have weights that are zero, {_percent(wasted, macs)} of all products; "
        f"their kernels are dense and compute them: {_percent(layers_ms, profile.total_ms)} of the "
        "time is in layers"
    )
    return [("dense_kernels", wasted / macs * layers_ms / profile.total_ms, said)]


def _factors(profile: Profile) -> list[Found]:
    """Find neighboring layers that one layer of fewer products could replace."""
    graph = profile.graph
    users = graph.users()
    layers = [op for op in graph.operators if op.weight and op.macs]
    macs = sum(op.macs for op in layers)
    excess, pairs, taken = 0.0, 0, set()
    for op in layers:
        following = users.get(op.outputs[0], [])
        if len(following) != 1 or following[0] not in layers or op.name in taken:
            continue
        second = following[0]
        if op.kind != "MatMul" or second.kind != "MatMul" or not (op.shapes and second.shapes):
            continue
        rows = op.macs // (op.shapes[0][-1] * op.shapes[1][-1])
        whole = rows * op.shapes[0][-1] * second.shapes[1][-1]
        if op.macs + second.macs > whole:
            excess, pairs = excess + op.macs + second.macs - whole, pairs + 1
            taken.add(second.name)
    if not pairs:
        return []
    layers_ms = profile.ms((*_FLOAT_LAYERS, *_INTEGER_LAYERS))
    said = (
        f"{pairs} pairs of layers with nothing between them do {_percent(excess, macs)} more "
        "products than the layers they could be"
    )
    return [("rank", excess / macs * layers_ms / profile.total_ms, said)]


def _memory(profile: Profile, machine: Machine) -> list[Found]:
    """Compare the time of layers that use each weight a few times with reading their bytes."""
    graph = profile.graph
    layers = [op for op in graph.operators if op.weight and graph.reuse(op) < _REUSE]
    num_bytes = sum(graph.constants[op.weight].nbytes for op in layers)
    floats = sum(graph.constants[op.weight].nbytes for op in layers if not op.unpacked)
    if num_bytes <= machine.caches.get("L2", 1 << 20):
        return []
    rate = _bytes_each_ms()
    share = min(num_bytes / rate, profile.ms(_FLOAT_LAYERS)) / profile.total_ms
    said = (
        f"{len(layers)} layers use each weight for at most {_REUSE} products, and their "
        f"{num_bytes / 1e6:.1f} MB do not fit the caches near a core; this machine reads "
        f"{rate / 1e6:.1f} GB/s, which alone is {100 * share:.0f} % of the time"
    )
    return [("memory_bound", _INTEGERS_SAVE * share * floats / num_bytes, said)]


def _bytes_each_ms() -> float:
    """Measure how fast one thread reads memory."""
    large = np.ones(1 << 24, np.float32)
    best = np.inf
    for _ in range(4):
        began = time.perf_counter()
        float(large @ large)
        best = min(best, time.perf_counter() - began)
    return large.nbytes / (1e3 * best)


def _instructions(profile: Profile, machine: Machine) -> list[Found]:
    """Weigh integer layers on a processor without integer dot products."""
    ms = profile.ms(_INTEGER_LAYERS)
    if not ms or any(flag in machine.flags for flag in _INTEGER_FLAGS):
        return []
    said = (
        f"layers in integers take {_percent(ms, profile.total_ms)} of the time, and this processor "
        f"has none of {', '.join(_INTEGER_FLAGS)}"
    )
    return [("missing_instructions", 0.5 * ms / profile.total_ms, said)]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"
