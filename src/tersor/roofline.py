"""profile(): where a network's time goes, how near that is to what the machine can do, and why.

Source:
    Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore
    architectures", CACM 2009. What a change can buy at most follows from Amdahl's law.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tersor.core import plugins
from tersor.core.context import Track, silent
from tersor.core.errors import ModelError, TargetError
from tersor.core.hardware import environment, preflight, probe, usable_cores
from tersor.core.loops import closed
from tersor.core.operators import covered
from tersor.core.runtime import Arrays, OperatorTime, Target
from tersor.ops.ceilings import Ceilings, ceilings
from tersor.ops.onnx_work import Counter, Work

Bound = Literal["compute", "memory", "none"]
ROUNDS = 5
"""Turns of plain runs and of runs under the runtime's profiler; the quietest of each counts, since
other programs only ever add."""
AGREE = 0.1
"""Operators' times and the latency agree within this share."""
LOW = 0.25
"""Below this share of its roof neither arithmetic nor bandwidth holds a layer back."""
SHORT_MS = 0.1
"""Below this mean length of operators, the cost of timing them shows."""
FREE = 0.02
"""Share of the latency from which what free shapes cost is spoken of."""
CUT = 0.25
"""Share of channels whose pruning is spoken of."""
_ROUND_S = 0.25
_MOST_RUNS = 200


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operator as the runtime executes it."""

    name: str
    """The runtime's profiler's."""
    kind: str
    what: str
    """For a reader: "3x3 convolutions, 32 -> 32 channels"."""
    covers: tuple[str, ...]
    """Operators of the network that it computes."""
    ms: float
    """Of a run."""
    share: float
    """Of all operators' times, in [0, 1]."""
    macs: int = 0
    weight_bytes: int = 0
    moved_bytes: int = 0
    intensity: float = 0.0
    """Operations for each byte."""
    format: str = "fp32"
    gflops: float = 0.0
    """Billions of operations a second reached."""
    gb_s: float = 0.0
    """Billions of bytes a second that were moved at least."""
    bound: Bound = "none"
    """The side of the roofline it is on; none: nothing is counted there."""
    of_roof: float = 0.0
    """Share of that roof reached; more than 1 where a kernel saves multiplications (Winograd)."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A network's time by operator, on one machine."""

    subject: str
    target: str
    batch: int
    threads: int
    latency_ms: float
    """Of a run without profiler: median, in the quietest turn."""
    operators_ms: float
    """Sum of the operators' times."""
    free_shapes_ms: float = 0.0
    """Of a run: what it costs that shapes may change, by runs with fixed ones beside; 0 where the
    runtime has no such choice, or the target fixes them."""
    between_ms: float = 0.0
    """The part of it that is in no operator."""
    cached: bool
    """Whether weights and activations fit the last cache, whose bandwidth is then the roof."""
    layers: tuple[Layer, ...]
    """In the order of the runtime."""
    ceilings: Ceilings
    words: tuple[str, ...]
    """What limits the network here, and what can move it."""
    warnings: tuple[str, ...]
    environment: Mapping[str, Any]

    @property
    def agrees(self) -> bool:
        """Whether operators, and what free shapes cost between them, are 10 % off at most."""
        return abs(self.accounted - 1) <= AGREE

    @property
    def accounted(self) -> float:
        """Share of the latency that they add up to."""
        return (self.operators_ms + self.between_ms) / self.latency_ms

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        rows = [
            (each.name, each.what, f"{each.ms:.4f}", f"{each.share:.1%}", each.bound)
            for each in self.layers
        ]
        title = f"{self.subject} on {self.target}: {self.latency_ms:.4g} ms"
        head = ("operator", "what", "ms", "share", "bound")
        return shown(title, head, rows, (*self.words, *self.warnings))


def profile(
    file: Path,
    target: Target,
    inputs: Sequence[Arrays],
    *,
    subject: str = "",
    batch: int = 1,
    fresh: bool = False,
    display: Track = silent,
) -> Profile:
    """Time a network by operator, and set each beside the work it has to do.

    Args:
        file: An ONNX file, which the runtime of `target` reads.
        target: Its runtime must have a profiler.
        inputs: Distinct batches of one size.
        subject: How to call the network.
        batch: Samples of a batch.
        fresh: Measure the machine's roofs again.
        display: Progress.

    Raises:
        ModelError: it is no ONNX file. TargetError: the runtime has no profiler.
    """
    import onnx

    runtime = plugins.runtime(target.runtime)
    if runtime.profile is None or runtime.fused is None:
        able = [n for n in plugins.names("runtimes") if _able(n)]
        raise TargetError(
            f"{target.runtime} does not tell where its time goes; profile on {' or '.join(able)}"
        )
    if file.suffix != ".onnx":
        raise ModelError(
            f"the work in {file.name!r} cannot be counted; give the network it was made from, or "
            "its .onnx file"
        )
    plugins.require("runtimes", target.runtime, runtime.to_run)
    threads = target.threads or usable_cores()
    warnings = preflight(probe())
    counter = Counter(onnx.load(file), inputs[0])
    latency_ms, times, free_shapes_ms, between_ms = _times(file, target, inputs, display)
    covers = covered(times, runtime.fused(file, target), counter.nodes)
    roofs = ceilings(threads, fresh=fresh)
    others = [name for each in covers.values() for name in each]
    works = {each.name: counter.work(covers.get(each.name, ()), others) for each in times}
    held = sum(w.weight_bytes for w in works.values())
    held += max((w.moved_bytes for w in works.values()), default=0)
    cached = held <= max(probe().caches.values(), default=0)
    total_ms = sum(each.ms for each in times)
    layers = tuple(
        _layer(each, covers.get(each.name, ()), works[each.name], total_ms, target, roofs, cached)
        for each in times
    )
    made = Profile(
        subject=subject or str(file),
        target=target.text,
        batch=batch,
        threads=threads,
        latency_ms=latency_ms,
        operators_ms=total_ms,
        free_shapes_ms=free_shapes_ms,
        between_ms=between_ms,
        cached=cached,
        layers=layers,
        ceilings=roofs,
        words=(),
        warnings=warnings,
        environment=environment(),
    )
    return replace(
        made, words=(*_busy(made), *_bottlenecks(made), *_shapes(made), _agreement(made))
    )


def _able(name: str) -> bool:
    found = plugins.own_runtime(name)
    return found.profile is not None and found.fused is not None


def _times(
    file: Path, target: Target, inputs: Sequence[Arrays], display: Track
) -> tuple[float, list[OperatorTime], float, float]:
    """Take turns of plain and profiled runs, with fixed shapes too; the quietest of each counts.

    Returns:
        The latency, the operators' times, what free shapes cost, and that between operators.
    """
    runtime = plugins.runtime(target.runtime)
    assert runtime.profile is not None
    targets = {"free": target}
    with ExitStack() as stack:
        calls = {"free": _calls(file, target, inputs, stack)}
        if "shapes" in runtime.options and target.options.get("shapes") != "fixed":
            fixed = replace(target, options={**target.options, "shapes": "fixed"})
            with suppress(TargetError):  # of this network, or beside other options
                calls["fixed"] = _calls(file, fixed, inputs, stack)
                targets["fixed"] = fixed
        plain_ms: dict[str, list[float]] = {kind: [] for kind in targets}
        rounds: dict[str, list[Sequence[OperatorTime]]] = {kind: [] for kind in targets}
        warm = closed(calls["free"], seconds=0.3, fewest=3)
        count = max(3, min(_MOST_RUNS, int(1000 * _ROUND_S / np.median(warm.service_ms))))
        repeated = [inputs[i % len(inputs)] for i in range(count)]
        for _ in display(range(ROUNDS), "profiling", ROUNDS):
            for kind, on in targets.items():
                runs = closed(calls[kind], seconds=_ROUND_S, fewest=3)
                plain_ms[kind].append(float(np.median(runs.service_ms)))
                rounds[kind].append(runtime.profile(file, on, repeated))
    latency_ms = {kind: min(each) for kind, each in plain_ms.items()}
    times = {kind: min(each, key=_sum_ms) for kind, each in rounds.items()}
    if "fixed" not in targets:
        return latency_ms["free"], list(times["free"]), 0.0, 0.0
    cost_ms = max(0.0, latency_ms["free"] - latency_ms["fixed"])
    inside_ms = max(0.0, _sum_ms(times["free"]) - _sum_ms(times["fixed"]))
    return latency_ms["free"], list(times["free"]), cost_ms, max(0.0, cost_ms - inside_ms)


def _sum_ms(times: Sequence[OperatorTime]) -> float:
    return sum(each.ms for each in times)


def _calls(
    file: Path, target: Target, inputs: Sequence[Arrays], stack: ExitStack
) -> list[Callable[[], Arrays]]:
    runner = plugins.runtime(target.runtime).load(file, target)
    stack.callback(runner.close)
    return [runner.bind(arrays) for arrays in inputs]


def _layer(
    time: OperatorTime,
    covers: Sequence[str],
    work: Work,
    total_ms: float,
    target: Target,
    roofs: Ceilings,
    cached: bool,
) -> Layer:
    seconds = max(time.ms, 1e-4) / 1e3  # a profiler may count whole microseconds
    kind = "int8" if work.integers else str(target.options.get("precision", "fp32"))
    gflops = 2 * work.macs / seconds / 1e9
    gb_s = (work.weight_bytes + work.moved_bytes) / seconds / 1e9
    ridge = roofs.peak(kind) / roofs.bandwidth(cached)
    bound: Bound = "none"
    of_roof = 0.0
    if work.macs and work.intensity >= ridge:
        bound, of_roof = "compute", gflops / roofs.peak(kind)
    elif work.weight_bytes + work.moved_bytes:
        bound, of_roof = "memory", gb_s / roofs.bandwidth(cached)
    return Layer(
        name=time.name,
        kind=time.kind,
        what=_what(time.kind, work),
        covers=tuple(covers),
        ms=time.ms,
        share=time.ms / max(total_ms, 1e-12),
        macs=work.macs,
        weight_bytes=work.weight_bytes,
        moved_bytes=work.moved_bytes,
        intensity=work.intensity,
        format=kind if work.macs else "",
        gflops=gflops,
        gb_s=gb_s,
        bound=bound,
        of_roof=of_roof,
    )


def _what(kind: str, work: Work) -> str:
    """Name a kind of work, so that layers of one kind are one group."""
    shape = work.shape
    if len(shape) >= 3:
        size = "x".join(map(str, shape[2:]))
        if work.groups > 1:
            word = "depthwise " if shape[1] == 1 else f"grouped ({work.groups}) "
            return f"{size} {word}convolutions, {shape[0]} channels"
        return f"{size} convolutions, {shape[1]} -> {shape[0]} channels"
    if len(shape) == 2:
        return f"matrix products, {shape[0]} -> {shape[1]}"
    return f"{kind} operators"


def groups(found: Profile) -> list[tuple[str, list[Layer]]]:
    """Gather layers of one kind, the ones that take longest first."""
    made: dict[str, list[Layer]] = {}
    for layer in found.layers:
        made.setdefault(layer.what, []).append(layer)
    return sorted(made.items(), key=lambda item: -sum(layer.ms for layer in item[1]))


def amdahl(share: float, times: float) -> float:
    """Return how many times faster the whole is if a share of it becomes `times` faster."""
    return 1 / (1 - share + share / times)


def _bottlenecks(found: Profile) -> list[str]:
    """Say of the groups that take most of the time what limits them and what that allows."""
    said: list[str] = []
    covered = 0.0
    for what, layers in groups(found):
        share = sum(layer.share for layer in layers)
        if covered >= 0.8 or len(said) == 3 or share < 0.05:
            break
        covered += share
        said.append(_bottleneck(found, what, layers, share))
    return said


def _bottleneck(found: Profile, what: str, layers: Sequence[Layer], share: float) -> str:
    ms = sum(layer.ms for layer in layers)
    main = max(layers, key=lambda layer: layer.ms)
    head = f"{share:.0%} of the operators' time is in {what}"
    reached = sum(layer.ms * layer.of_roof for layer in layers) / max(ms, 1e-12)
    place = "the cache's" if found.cached else "the memory's"
    if main.bound == "none":
        return f"{head}: nothing is counted there; fusion or another runtime may remove them"
    roof = f"the {main.format} peak" if main.bound == "compute" else f"{place} bandwidth"
    if reached < LOW:
        return (
            f"{head}, at {reached:.0%} of {roof}: neither arithmetic nor bandwidth holds them "
            "back but the kernels and the cost of calling them; larger batches, fewer and larger "
            "layers or another runtime can move it, fewer bits or zeros hardly"
        )
    if main.bound == "compute":
        return f"{head}, compute-bound at {reached:.0%} of {roof}: " + _compute(found, main, share)
    weights = sum(layer.weight_bytes for layer in layers)
    moved = sum(layer.moved_bytes for layer in layers)
    part = weights / max(1, weights + moved)
    saved = amdahl(share, 1 / (1 - 0.75 * part)) if main.format in ("", "fp32") else 1.0
    text = f"{head}, memory-bound at {reached:.0%} of {roof}; weights are {part:.0%} of the bytes"
    if saved > 1.02:
        return f"{text}: weights of 8 bits can buy at most {saved:.2f}x, pruning as their share"
    return f"{text}: fusion, or smaller activations, can move it; fewer bits of weights cannot"


def _compute(found: Profile, main: Layer, share: float) -> str:
    """Say what pruning and fewer bits can buy where arithmetic is the limit."""
    pruned = amdahl(share, 1 / (1 - CUT))
    text = f"pruning {CUT:.0%} of its channels can buy at most {pruned:.2f}x"
    if main.format == "int8":
        return text
    ratio = found.ceilings.peak("int8") / found.ceilings.peak(main.format)
    if "int8" not in found.ceilings.gflops or ratio <= 1.02:
        return f"{text}; 8-bit integers are not faster on this machine"
    return f"{text}; 8-bit integers, {ratio:.2f}x as fast here, at most {amdahl(share, ratio):.2f}x"


def _shapes(found: Profile) -> list[str]:
    share = found.free_shapes_ms / found.latency_ms
    if share < FREE:
        return []
    return [
        f"{share:.0%} of the latency is spent because shapes may change from run to run; where "
        f"they do not, `shapes: fixed` among the target's options can buy {1 / (1 - share):.2f}x"
    ]


def _agreement(found: Profile) -> str:
    """Say whether the parts add up to the whole."""
    part = found.accounted
    also = ", with what free shapes cost between them" if found.between_ms else ""
    sums = f"the operators' times add up to {part:.0%} of the latency{also}"
    if any(layer.of_roof > 1 for layer in found.layers):
        sums = (
            "more than 100% of a roof: that was measured while the machine was busy, the kernel "
            f"saves multiplications, or data came from a nearer cache; {sums}"
        )
    if found.agrees:
        return sums
    if found.warnings:
        return f"{sums}; turns of a machine that is busy differ, profile again when it is not"
    if part < 1:
        return f"{sums}; the rest is spent between operators: the call, and handing over"
    if found.operators_ms < SHORT_MS * len(found.layers):
        return f"{sums}: the profiler itself takes time in operators as short as these"
    return f"{sums}: the machine was slower while the profiler ran, profile again"


def _busy(found: Profile) -> list[str]:
    if not found.warnings:
        return []
    return ["the machine was busy: shares of time hold, shares of a roof are too low"]
