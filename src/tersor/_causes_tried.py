"""Causes that are found by taking them away: run with other settings, and measured at once."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor import benchmark
from tersor._causes_time import Profile
from tersor.core import plugins
from tersor.core.errors import TersorError
from tersor.core.hardware import Machine, usable_cores
from tersor.core.model import Inputs
from tersor.core.runtime import Arrays, Runner, Target
from tersor.core.statistics import Comparison

Found = tuple[str, float, str]
_CHAIN = 64
"""Operators of the network that measures what starting one takes."""
_WORTH = 0.1
"""Share of the time from which a layer is tried alone."""
_LANES, _CHANNELS = (16, 8), 4
_DEPTH = 4
"""Convolutions in a row, when one is tried with other channels."""


def tried_causes(
    file: Path,
    target: Target,
    profile: Profile,
    feeds: Sequence[Arrays],
    larger: tuple[int, Sequence[Arrays]] | None,
    machine: Machine,
    budget_s: float,
) -> list[Found]:
    """Try what is cheap to try.

    Args:
        file: What the runtime loads.
        target: Where, and with which options.
        profile: Of the file.
        feeds: Batches.
        larger: How many times more samples at once, and such batches; None: not in question.
        machine: Whose vectors and cores.
        budget_s: Longest time of each contest.
    """

    def contest(
        other: Target = target, path: Path = file, batches: Sequence[Arrays] = feeds
    ) -> Comparison:
        return race(file, target, feeds, path, other, batches, budget_s)

    found: list[Found] = []
    found += _threads(target, contest)
    if target.options.get("optimization", "all") != "all":
        c = contest(replace(target, options={**target.options, "optimization": "all"}))
        said = f"optimization is {target.options['optimization']!r}; with 'all' {_told(c)}"
        found.append(("not_optimized", _saved(c), said))
    if larger is not None:
        times, batches = larger
        c = contest(batches=batches)
        gain = c.speedup * times
        said = (
            f"a sample takes {c.a_ms / len(next(iter(feeds[0].values()))):.3g} ms; in a batch "
            f"{times} times larger it is {gain:.1f} times faster"
        )
        found.append(("small_batch", max(0.0, 1 - 1 / gain), said))
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        found += _overhead(target, profile, contest, Path(folder), budget_s)
        if file.suffix == ".onnx":
            found += _unpacked(file, profile, contest, Path(folder))
            found += _lanes(target, profile, Path(folder), machine, budget_s)
    return [each for each in found if each[1] > 0]


def race(
    a: Path,
    a_target: Target,
    a_feeds: Sequence[Arrays],
    b: Path,
    b_target: Target,
    b_feeds: Sequence[Arrays],
    budget_s: float,
) -> Comparison:
    """Time two files against each other."""
    runners: list[Runner] = []
    try:
        for path, target in ((a, a_target), (b, b_target)):
            runners.append(plugins.runtime(target.runtime).open(path, target))
        one, other = runners
        return benchmark.contest(
            one, other, a_feeds, b_inputs=b_feeds, budget_s=budget_s, warm_up_s=0.1
        )
    finally:
        for runner in runners:
            runner.close()


def _saved(c: Comparison) -> float:
    return 1 - 1 / c.speedup if c.verdict == "faster" else 0.0


def _told(c: Comparison) -> str:
    return f"it is {c.speedup:.2f}x as fast ({c.low:.2f} to {c.high:.2f})"


def _threads(target: Target, contest: Callable[..., Comparison]) -> Iterator[Found]:
    cores = usable_cores()
    now = target.threads or cores
    tried = sorted({1, min(cores, now)} - {now})
    best: Found | None = None
    for threads in tried:
        c = contest(replace(target, options={**target.options, "threads": threads}))
        # threads that have to wait for a core scatter so much that few contests are decided
        saved = 1 - 1 / c.speedup if now > cores else _saved(c)
        if best is None or saved > best[1]:
            said = f"{now} threads on {cores} usable cores; with {threads} {_told(c)}"
            best = ("threads", saved, said)
    if best is not None:
        yield best


def _overhead(
    target: Target,
    profile: Profile,
    contest: Callable[..., Comparison],
    folder: Path,
    budget_s: float,
) -> Iterator[Found]:
    """Measure what an operator that does next to nothing takes, and count operators."""
    import torch
    from onnx import TensorProto, helper, numpy_helper

    names = ["x", *(f"x{i}" for i in range(_CHAIN))]
    chain = helper.make_graph(
        [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(_CHAIN)],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")],
    )
    model = helper.make_model(chain, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    runtime = plugins.runtime(target.runtime)
    options = {k: v for k, v in target.options.items() if k == "threads"}
    plain = replace(target, options=options)
    place = folder / "chain"
    place.mkdir()
    try:
        file = runtime.write(model, place, Inputs(example={"x": torch.zeros(1, 2)}), plain)[0]
        c = contest(plain, file, [{"x": np.zeros((1, 2), np.float32)}] * 16)
    except TersorError:
        return
    each_ms, count = c.b_ms / _CHAIN, len(profile.operators)
    said = (
        f"{count} operators run, of {1e3 * c.a_ms / count:.1f} us on average; one that does next "
        f"to nothing takes {1e3 * each_ms:.1f} us"
    )
    yield "overhead", min(1.0, max(0, count - 1) * each_ms / c.a_ms), said


def _unpacked(
    file: Path, profile: Profile, contest: Callable[..., Comparison], folder: Path
) -> Iterator[Found]:
    """Unpack weights beforehand whose unpacking the runtime repeats in each run."""
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    constants = profile.graph.constants
    ran = [profile.in_file(each) for each in profile.operators]
    names = {
        op.name
        for op in ran
        if op is not None and op.kind == "DequantizeLinear" and op.inputs[0] in constants
    }
    if not names:
        return
    model = onnx.load(file)
    kept = []
    for node in model.graph.node:
        if (node.name or node.output[0]) not in names:
            kept.append(node)
            continue
        opsets = list(model.opset_import)
        lone = onnx.helper.make_graph(
            [node], "lone", [], [onnx.ValueInfoProto(name=node.output[0])],
            [t for t in model.graph.initializer if t.name in node.input],
        )  # fmt: skip
        made: Any = ReferenceEvaluator(onnx.helper.make_model(lone, opset_imports=opsets)).run(
            None, {}
        )
        model.graph.initializer.append(numpy_helper.from_array(made[0], node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    other = folder / "unpacked.onnx"
    onnx.save(model, other)
    c = contest(path=other)
    said = f"{len(names)} weights are made floats in each run; made so beforehand {_told(c)}"
    yield "unpacked_each_run", _saved(c), said


def _lanes(
    target: Target, profile: Profile, folder: Path, machine: Machine, budget_s: float
) -> Iterator[Found]:
    """Run convolutions whose channels fill no vector alone, and padded to whole vectors."""
    lanes = _LANES[0] if "avx512f" in machine.flags else _LANES[1]
    share, said = 0.0, ""
    rates: dict[tuple[Any, ...], tuple[float, float]] = {}  # products a second; speed, to its own
    for each in profile.operators:
        op = profile.layer(each) if each.kind in ("Conv", "FusedConv") else None
        if op is None or op.groups != 1 or len(op.shapes) != 2 or len(op.shapes[0]) != 4:
            continue
        sizes = (op.shapes[0][1], op.shapes[1][1])
        if min(sizes) < _CHANNELS or all(n % _CHANNELS == 0 for n in sizes):
            continue
        key = (op.shapes, profile.graph.constants[op.weight].shape)
        alike = sum(
            e.ms for e in profile.operators if (o := profile.layer(e)) and o.shapes == op.shapes
        )
        if alike < _WORTH * profile.total_ms:
            continue
        if key not in rates:
            padded = [math.ceil(n / lanes) * lanes for n in sizes]
            c = _padded(op, padded, target, folder, key[1], budget_s)
            rates[key] = c.low * math.prod(padded) / math.prod(sizes), c.speedup
            said = (
                f"convolutions of {sizes[0]} to {sizes[1]} channels, in vectors of {lanes}; such a "
                f"layer of {padded[0]} to {padded[1]} is {c.speedup:.2f}x as fast, with "
                f"{math.prod(padded) / math.prod(sizes):.2f}x the products"
            )
        rate, speedup = rates[key]
        # wider layers have a higher rate anyway: only one that takes less time for more counts
        share += (1 - 1 / rate if speedup > 1 else 0) * each.ms / profile.total_ms
    if share:
        yield "idle_lanes", share, said


def _padded(
    op: Any,
    padded: Sequence[int],
    target: Target,
    folder: Path,
    shape: tuple[int, ...],
    budget_s: float,
) -> Comparison:
    """Time a convolution with its channels and with more, a few of them in a row."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    files, feeds = [], []
    rng = np.random.default_rng(0)
    keep = ("pads", "strides", "dilations", "kernel_shape", "auto_pad")
    about = {k: v for k, v in op.attributes.items() if k in keep}
    # alone, a layer would pay for reordering channels, which a network does once for many layers
    length = _DEPTH if op.shapes[0][2:] == op.shapes[1][2:] else 1
    for made, given in ((shape[0], shape[1]), (padded[1], padded[0])):
        nodes, weights = [], []
        for i in range(length):
            pair = (made, given) if i % 2 == 0 else (given, made)
            weight = rng.standard_normal((*pair, *shape[2:])) / math.sqrt(math.prod(shape[1:]))
            weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
            nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], **about))
        size = [op.shapes[0][0], given, *op.shapes[0][2:]]
        graph = helper.make_graph(
            nodes,
            "convolutions",
            [helper.make_tensor_value_info("x0", TensorProto.FLOAT, size)],
            [helper.make_tensor_value_info(f"x{length}", TensorProto.FLOAT, None)],
            weights,
        )
        files.append(folder / f"conv{made}x{given}.onnx")
        opsets = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), files[-1])
        feeds.append([{"x0": rng.standard_normal(size).astype(np.float32)}] * 16)
    one = replace(target, options={"threads": 1})
    return race(files[0], one, feeds[0], files[1], one, feeds[1], budget_s)
