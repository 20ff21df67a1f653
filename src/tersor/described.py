"""predict(), compare(): how fast a network can be on machines that are described, not here.

Every operator takes at least the time of its arithmetic at the machine's peak, and at least the
time of its bytes at the memory's bandwidth. How near a machine comes to those roofs differs by
layer and kernel, so a prediction is a range: each roof reached at 80 %, which the best kernels do,
to 10 %, as with small layers. AMD's own table for its accelerator (UG1354, ZCU104) lies between.

Source:
    Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore
    architectures", CACM 2009.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tersor.core.errors import ModelError
from tersor.core.machine import WIDTHS, Machine
from tersor.core.runtime import Arrays
from tersor.ops.onnx_count import COUNTED
from tersor.ops.onnx_work import Counter, Work

Bound = Literal["compute", "memory", "starts"]
FAST = 0.8
"""Share of a roof that the best kernels reach; the lower end of a latency."""
SLOW = 0.1
"""Share of a roof that small or unusual layers reach; the upper end of a latency."""
SLOW_STARTS = 2.0
"""Times `start_us`, where operators are started one by one and not as a captured graph; measured in
benchmarks/results/gpu.json. In the upper end of a latency."""
MIDDLE = math.sqrt(FAST * SLOW)
"""Where it is judged what bounds a network, and what a change can buy."""
_JOINED = ("Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "BatchNormalization")
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")
_CODES = ("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "DynamicQuantizeLinear")
_FLOAT_ONLY = ("LSTM", "GRU", "RNN", "Loop", "If", "Scan")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What is started at once: an operator, with the activation or batch norm that follows it."""

    name: str
    kind: str
    work: Work
    taken: tuple[str, ...]
    """Tensors that it takes, weights left out."""
    made: tuple[str, ...]
    view: bool = False
    """Whether it only renames its input: nothing is started or moved."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A float network, counted for one size of inputs."""

    operators: tuple[Operator, ...]
    """In the order in which they can run."""
    sizes: Mapping[str, int]
    """Bytes of each tensor that an operator takes or makes, as in the file; those whose shape
    cannot be told are left out."""
    floats: frozenset[str]
    """Those of them that hold floats."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    width: int
    """Bytes of a number in the file."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a run."""
        return sum(each.work.macs for each in self.operators)

    @property
    def weight_bytes(self) -> int:
        """As in the file."""
        return sum(each.work.weight_bytes for each in self.operators)

    @property
    def edge_bytes(self) -> int:
        """Bytes of the network's inputs and outputs."""
        return sum(self.sizes[name] for name in {*self.inputs, *self.outputs})


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where the time of some operators goes, were each roof reached in full."""

    compute: float
    memory: float
    longer: float
    """Sum of the longer of both, operator by operator."""
    starts: float

    def total_ms(self, reach: float, starts: float = 1.0) -> float:
        """Milliseconds where a share of each roof is reached, and starting takes times as long."""
        return 1e3 * (self.longer / reach + starts * self.starts)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A network on a machine, in one number format."""

    format: str
    low_ms: float
    """Each roof reached at 80 %."""
    high_ms: float
    """Each roof reached at 10 %, operators started one by one."""
    bound: Bound
    weight_bytes: int
    working_bytes: int
    """Of the operator that takes and makes most: no schedule needs less."""
    fits: bool
    on_chip: bool
    """Whether weights and activations stay on the chip, so that only inputs and outputs move."""

    @property
    def middle_ms(self) -> float:
        """The geometric middle, to order by."""
        return math.sqrt(self.low_ms * self.high_ms)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a technique can buy on a machine."""

    technique: str
    low: float
    """Times as fast."""
    high: float
    """At most; never more than twice `low`."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A network on a machine."""

    machine: Machine
    macs: int
    operators: int
    """That are started."""
    estimates: tuple[Estimate, ...]
    """By format, the widest first."""
    reason: str = ""
    """Why it cannot run there; empty if it can."""
    gains: tuple[Gain, ...] = ()
    """What buys most first."""
    useless: Mapping[str, str] = field(default_factory=dict)
    """Techniques that buy nothing there, and why."""

    @property
    def able(self) -> tuple[Estimate, ...]:
        """Estimates in formats that fit the memory."""
        return tuple(each for each in self.estimates if each.fits)

    @property
    def plain(self) -> Estimate | None:
        """The network as it is: in the widest format that fits."""
        return self.able[0] if self.able and not self.reason else None

    @property
    def best(self) -> Estimate | None:
        """The network in the fastest format that fits."""
        return min(self.able, key=lambda e: e.middle_ms) if self.plain else None


def count(net: Any, inputs: Arrays) -> Graph:
    """Count the work of each operator, once for all machines.

    Args:
        net: onnx.ModelProto, in floats. Not modified.
        inputs: By the names of the graph's inputs.

    Raises:
        ModelError: a shape cannot be told, or the network is quantized already.
    """
    import onnx.inliner

    kinds = {node.op_type for node in net.graph.node}
    codes = sorted(k for k in kinds if k in _CODES or k.startswith("QLinear") or "Integer" in k)
    if codes:
        raise ModelError(
            f"the network is quantized already ({', '.join(codes)}); give the float network that "
            "it was made from: number formats are compared here"
        )
    net = onnx.inliner.inline_local_functions(net) if len(net.functions) else net
    for node in net.graph.node:
        if any(deep.op_type in COUNTED for a in node.attribute for deep in a.g.node):
            raise ModelError(
                f"the work inside {node.op_type} {node.name!r} depends on the data; it cannot be "
                "predicted"
            )
    counter = Counter(net, inputs)
    graph = net.graph
    weights = set(counter.weights)
    known = _known(graph.node, weights)
    operators = []
    for group in _groups(graph, known):
        work = counter.work(node.output[0] for node in group)
        inner = {name for node in group for name in node.output}
        own = inner | known | weights
        taken = [n for node in group for n in node.input if n and n not in own]
        head = group[0]
        operators.append(
            Operator(
                name=head.name or head.output[0],
                kind=head.op_type,
                work=work,
                taken=tuple(dict.fromkeys(taken)),
                made=tuple(name for node in group for name in node.output if name),
                view=head.op_type in _VIEWS,
            )
        )
    fed = tuple(v.name for v in graph.input if v.name not in weights)
    names = {*fed, *(v.name for v in graph.output)}
    names |= {name for each in operators for name in (*each.taken, *each.made)}
    for name in (*fed, *(v.name for v in graph.output)):
        if name not in counter.shapes:
            raise ModelError(f"cannot tell the shape of {name!r}, an input or output")
    floats = {1, 10, 11, 16}  # FLOAT, FLOAT16, DOUBLE, BFLOAT16
    largest = max(graph.initializer, key=lambda t: math.prod(t.dims), default=None)
    return Graph(
        operators=tuple(operators),
        sizes={name: counter.bytes_of(name) for name in names & set(counter.shapes)},
        floats=frozenset(name for name in names if counter.types.get(name, 1) in floats),
        inputs=fed,
        outputs=tuple(v.name for v in graph.output),
        width=2 if largest is not None and largest.data_type in (10, 16) else 4,
    )


def _known(nodes: Iterable[Any], weights: set[str]) -> set[str]:
    """Name the tensors that follow from shapes and weights alone: they are made before any run."""
    known: set[str] = set()
    for node in nodes:
        given = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size") or all(n in known | weights for n in given):
            known.update(node.output)
    return known


def _groups(graph: Any, known: set[str]) -> list[list[Any]]:
    """Join activations and batch norms to the operator that alone makes their input."""
    users: dict[str, int] = {value.name: 1 for value in graph.output}
    for node in graph.node:
        for name in node.input:
            users[name] = users.get(name, 0) + 1
    made: dict[str, list[Any]] = {}
    groups: list[list[Any]] = []
    for node in graph.node:
        if all(name in known for name in node.output if name):
            continue
        before = made.get(node.input[0]) if node.input else None
        if before and node.op_type in _JOINED and users.get(node.input[0]) == 1:
            group = before
            group.append(node)
        else:
            group = [node]
            groups.append(group)
        made.update(dict.fromkeys(node.output, group))
    return groups


def predict(net: Any, inputs: Arrays, machine: Machine) -> Prediction:
    """Predict a network's latency on a machine, what bounds it, and what can buy what there.

    The lower end of a latency has each roof reached at 80 % and `start_us` for each operator, the
    upper end 10 % and twice that. What fits the chip does not move, but inputs and outputs.

    Args:
        net: onnx.ModelProto, in floats. Not modified.
        inputs: By the names of the graph's inputs.
        machine: Where it is to run.

    Raises:
        ModelError: a shape cannot be told, or the network is quantized already.
    """
    return on(count(net, inputs), machine)


def compare(net: Any, inputs: Arrays, machines: Sequence[Machine]) -> tuple[Prediction, ...]:
    """Predict for several machines; the fastest first, those that cannot run it last."""
    graph = count(net, inputs)
    found = [on(graph, machine) for machine in machines]
    return tuple(sorted(found, key=_order))


def unknown_starts(machines: Sequence[Machine]) -> str:
    """Say of which machines the cost of starting an operator is not known; empty: of none."""
    silent = ", ".join(dict.fromkeys(each.name for each in machines if not each.start_us))
    if not silent:
        return ""
    return (
        "Starting an operator is not in the figures where what it costs is not known "
        f"({silent}): small networks take longer there."
    )


def _order(found: Prediction) -> float:
    return math.inf if found.best is None else found.best.middle_ms


def on(graph: Graph, machine: Machine) -> Prediction:
    """Predict for a network that is counted; the rest is as in `predict`."""
    from tersor._described_gains import gains

    estimates = tuple(estimate(graph, machine, name) for name in machine.formats)
    made = Prediction(
        machine=machine,
        macs=graph.macs,
        operators=sum(not each.view for each in graph.operators),
        estimates=estimates,
        reason=_reason(graph, machine, estimates),
    )
    if made.plain is None:
        return made
    able, useless = gains(graph, made)
    return Prediction(**{**vars(made), "gains": able, "useless": useless})


def _reason(graph: Graph, machine: Machine, estimates: Sequence[Estimate]) -> str:
    """Say why a network cannot run on a machine."""
    kinds = sorted({each.kind for each in graph.operators} & set(_FLOAT_ONLY))
    if kinds and machine.formats == ("int8",):
        return f"it computes in 8-bit integers only, and {', '.join(kinds)} stays in floats"
    if any(each.fits for each in estimates):
        return ""
    least = estimates[-1]
    if machine.working_bytes and least.working_bytes > machine.working_bytes:
        return (
            f"activations need {least.working_bytes / 1e6:.2f} MB at least in {least.format}, its "
            f"working memory has {machine.working_bytes / 1e6:.2f} MB"
        )
    need = least.weight_bytes + (0 if machine.working_bytes else least.working_bytes)
    return (
        f"weights and activations need {need / 1e6:.2f} MB at least in {least.format}, its memory "
        f"has {machine.memory_bytes / 1e6:.2f} MB"
    )


def estimate(
    graph: Graph, machine: Machine, name: str, operators: Sequence[Operator] | None = None
) -> Estimate:
    """Estimate the latency of a network, or of some of its operators, in one number format."""
    chosen = graph.operators if operators is None else operators
    scale = WIDTHS[name] / graph.width
    weights = math.ceil(scale * sum(each.work.weight_bytes for each in chosen))
    working = math.ceil(scale * max((each.work.moved_bytes for each in chosen), default=0))
    on_chip = 0 < weights + working <= machine.cache_bytes
    spent = seconds(graph, machine, name, chosen, on_chip=on_chip)
    parts: dict[Bound, float] = {
        "compute": spent.compute / MIDDLE,
        "memory": spent.memory / MIDDLE,
        "starts": spent.starts,
    }
    return Estimate(
        format=name,
        low_ms=spent.total_ms(FAST),
        high_ms=spent.total_ms(SLOW, SLOW_STARTS),
        bound=max(parts, key=lambda part: parts[part]),
        weight_bytes=weights,
        working_bytes=working,
        fits=_fits(machine, weights, working),
        on_chip=on_chip,
    )


def _fits(machine: Machine, weights: int, working: int) -> bool:
    if machine.working_bytes:
        return weights <= machine.memory_bytes and working <= machine.working_bytes
    return not machine.memory_bytes or weights + working <= machine.memory_bytes


def seconds(
    graph: Graph,
    machine: Machine,
    name: str,
    operators: Sequence[Operator],
    *,
    on_chip: bool,
    faster: float = 1.0,
    cut: float = 0.0,
    weights: float = 1.0,
    dropped: float = 0.0,
) -> Seconds:
    """Tell where the time goes, were each roof reached in full.

    Args:
        graph: The network.
        machine: Where it runs.
        name: Number format.
        operators: Those to time.
        on_chip: Whether only the network's inputs and outputs move.
        faster: Times the peak of the arithmetic.
        cut: Share of the arithmetic and of the bytes that is cut away.
        weights: Bytes of weights, relative to those of the format.
        dropped: Share of the operators that is dropped.
    """
    scale = WIDTHS[name] / graph.width
    edges = scale * graph.edge_bytes / (machine.memory_gb_s * 1e9)
    compute = memory = longer = 0.0
    for each in operators:
        if each.view:
            continue
        kept = (1 - cut) * (1 - dropped)
        arithmetic = kept * 2 * each.work.macs / (faster * machine.gops[name] * 1e9)
        moved = weights * each.work.weight_bytes + each.work.moved_bytes
        traffic = 0.0 if on_chip else kept * scale * moved / (machine.memory_gb_s * 1e9)
        longer += max(arithmetic, traffic)
        compute += arithmetic if arithmetic >= traffic else 0.0
        memory += traffic if traffic > arithmetic else 0.0
    starts = (1 - dropped) * sum(not each.view for each in operators) * machine.start_us * 1e-6
    if on_chip:
        memory, longer = memory + edges, longer + edges
    return Seconds(compute=compute, memory=memory, longer=longer, starts=starts)
