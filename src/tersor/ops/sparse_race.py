"""Is a layer faster executed sparse? Measured: sparse against every dense kernel of this machine.

A race times one layer with random weights, of which a share is zero, on random inputs: executed
sparse, dense by PyTorch, and dense by each other runtime that is installed, interleaved. Which
weights are zero hardly matters for the time, how many does. Races are kept for the machine.
"""

import contextlib
import copy
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core import files, plugins
from tersor.core.errors import TersorError
from tersor.core.hardware import environment, usable_cores
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.core.schema import Mistakes, from_plain, to_plain
from tersor.core.statistics import Comparison, judge
from tersor.core.timing import interleave
from tersor.ops import native
from tersor.ops.lower import lower
from tersor.ops.sparse import sparse

MIN_EFFECT = 0.03
"""Smallest gain that a layer is executed sparse for."""
_BLOCKS, _BUDGET_S, _WARM_UP_S, _INPUTS = 15, 1.5, 0.1, 4
_MOST_KEPT = 4000
_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the time of a layer depends on, beside its zeros."""

    kind: Literal["linear", "conv2d"] = "linear"
    inputs: int
    """Features, or channels."""
    outputs: int
    batch: int = 1
    """Samples."""
    size: tuple[int, ...] = ()
    """The sample's other dimensions: positions of a sequence; height and width of an image."""
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        if self.kind == "linear":
            on = f" on {size} positions" if size else ""
            return f"linear {self.inputs} -> {self.outputs}{on}, batch {self.batch}"
        kernel = "x".join(map(str, self.kernel))
        more = [
            f"{word} {'x'.join(map(str, value))}"
            for word, value in (("stride", self.stride), ("dilation", self.dilation))
            if set(value) != {1}
        ]
        described = " ".join([f"convolution {kernel}", *more, f"{self.inputs} -> {self.outputs}"])
        return f"{described} on {size}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How many times faster sparse is than one dense kernel."""

    dense_ms: float
    times: float
    low: float
    high: float
    """The 95 % interval of `times`."""
    verdict: str
    """Of sparse: faster, slower or no difference."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """One layer shape at one share of zeros."""

    shape: Shape
    zeros: float
    """Percent of the weights."""
    threads: int
    sparse_ms: float
    executor: str
    """What executed it sparse: our kernel, or torch."""
    against: Mapping[str, Speed] = field(default_factory=dict)
    """By the name of who computes it dense."""
    stable: bool = True
    """Whether the interval against the fastest dense kernel is within 2 %."""

    @property
    def best(self) -> str:
        """Who computes it dense fastest."""
        return min(self.against, key=lambda name: self.against[name].dense_ms)


def decide(race: Race, rivals: Sequence[str]) -> tuple[bool, str]:
    """Decide whether to execute a layer sparse.

    Args:
        race: As measured.
        rivals: Dense kernels that it has to beat; those not measured are passed over.

    Returns:
        Whether it is faster than all of them, beyond the noise, and why or why not.
    """
    known = {name: race.against[name] for name in rivals if name in race.against}
    assert known, "no rival was measured"
    name, speed = min(known.items(), key=lambda item: item[1].times)
    figures = (
        f"sparse {race.sparse_ms:.3f} ms, dense {speed.dense_ms:.3f} ms ({name}): "
        f"{speed.times:.2f}x as fast ({speed.low:.2f} to {speed.high:.2f})"
    )
    if speed.verdict == "faster":
        return True, f"faster at {race.zeros:g} % zeros: {figures}"
    word = "slower" if speed.verdict == "slower" else "not faster beyond the noise"
    return False, f"{word} at {race.zeros:g} % zeros: {figures}"


def break_even(races: Sequence[Race]) -> float | None:
    """Return the percent of zeros from which sparse is faster than the best dense kernel.

    Args:
        races: Of one shape, at several shares of zeros.

    Returns:
        Where the logarithm of the ratio crosses 0, between two shares linearly; the smallest share
        where sparse wins even there; None where it loses at the largest.
    """
    ordered = sorted(races, key=lambda race: race.zeros)
    gains = [math.log(race.against[race.best].times) for race in ordered]
    if gains[-1] <= 0:
        return None
    last = max((i for i, gain in enumerate(gains) if gain <= 0), default=-1)
    if last < 0:
        return ordered[0].zeros
    share = -gains[last] / (gains[last + 1] - gains[last])
    return ordered[last].zeros + share * (ordered[last + 1].zeros - ordered[last].zeros)


class Races:
    """The races of this machine, kept between runs.

    A file belongs to a processor, the versions of the packages and our kernel; a damaged one is
    made anew. Kept are races whose verdict more time would not change; within one run all of them
    are, so that layers of one shape have one fate.
    """

    file: Path
    fresh: bool
    measured: dict[str, Race]

    def __init__(self, *, fresh: bool = False) -> None:
        self.file = native.cache_folder() / f"sparse-races-{_machine()}.json"
        self.fresh = fresh
        self.measured = {}

    def run(self, shape: Shape, zeros: Sequence[float], threads: int) -> list[Race]:
        """Return a race for each percent of zeros, measured where it is not known.

        Args:
            shape: Of the layer.
            zeros: Percents, each in [0, 100).
            threads: Of a run; 0: all usable cores.
        """
        threads = threads or usable_cores()
        known = {**({} if self.fresh else self._read()), **self.measured}
        found = {z: known.get(_key(shape, z, threads)) for z in zeros}
        missing = [z for z, race in found.items() if race is None]
        if missing:
            measured = race(shape, missing, threads)
            found.update(zip(missing, measured, strict=True))
            self.measured.update((_key(r.shape, r.zeros, r.threads), r) for r in measured)
            self._keep(measured)
        return [r for z in zeros if (r := found[z]) is not None]

    def _read(self) -> dict[str, Race]:
        try:
            plain = json.loads(self.file.read_text(encoding="utf-8"))
            rows = plain["races"] if plain["schema"] == _SCHEMA else []
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        mistakes = Mistakes()
        races = [from_plain(Race, row, (), mistakes) for row in rows]
        return {_key(r.shape, r.zeros, r.threads): r for r in races if r and r.against}

    def _keep(self, measured: Sequence[Race]) -> None:
        sure = [r for r in measured if r.stable or r.against[r.best].verdict != "no difference"]
        rows = self._read()
        for row in sure:
            key = _key(row.shape, row.zeros, row.threads)
            rows.pop(key, None)
            rows[key] = row
        plain = {"schema": _SCHEMA, "races": to_plain(list(rows.values())[-_MOST_KEPT:])}
        with contextlib.suppress(OSError):  # no room, no folder: measured again next time
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.file.exists():
                native.trim(self.file.parent, "sparse-races-*.json")
            files.replace_file(self.file, json.dumps(plain).encode())


def _key(shape: Shape, zeros: float, threads: int) -> str:
    return json.dumps([to_plain(shape), round(float(zeros), 6), threads])


def _machine() -> str:
    """Hash what the times depend on."""
    about = environment()
    machine = about["machine"]
    parts = {
        "machine": {key: machine[key] for key in ("cpu", "architecture", "flags", "caches")},
        "packages": about["packages"],
        "kernel": hashlib.sha256(native.SOURCE.read_bytes()).hexdigest(),
        "built": native.build().library is not None,
        "schema": _SCHEMA,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def race(shape: Shape, zeros: Sequence[float], threads: int) -> list[Race]:
    """Measure a layer at several percents of zeros, all interleaved with the dense kernels."""
    executor = "our kernel" if native.build().library is not None else "torch"
    layer, inputs = _layer(shape), _inputs(shape)
    before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
        dense = {"torch": _in_torch(layer, inputs)}
        dense.update(stack.enter_context(_elsewhere(layer, inputs, threads)))
        calls = [*dense.values(), *(_in_torch(sparse(_pruned(layer, z)), inputs) for z in zeros)]
        with torch.inference_mode():
            times = interleave(
                calls,
                budget_s=_BUDGET_S * max(1.0, len(calls) / 4),
                min_blocks=_BLOCKS,
                warm_up_s=_WARM_UP_S,
            )
    dense_ms = dict(zip(dense, times, strict=False))
    made = []
    for z, sparse_ms in zip(zeros, times[len(dense) :], strict=True):
        judged = {
            name: judge(ms, sparse_ms, min_effect=MIN_EFFECT) for name, ms in dense_ms.items()
        }
        done = Race(
            shape=shape,
            zeros=float(z),
            threads=threads,
            sparse_ms=float(np.median(sparse_ms)),
            executor=executor,
            against={name: _speed(c) for name, c in judged.items()},
        )
        made.append(replace(done, stable=judged[done.best].stable))
    return made


def _speed(found: Comparison) -> Speed:
    return Speed(
        dense_ms=found.a_ms,
        times=found.speedup,
        low=found.low,
        high=found.high,
        verdict=found.verdict,
    )


def _layer(shape: Shape) -> nn.Linear | nn.Conv2d:
    made: nn.Linear | nn.Conv2d
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if shape.kind == "linear":
            made = nn.Linear(shape.inputs, shape.outputs)
        else:
            made = nn.Conv2d(
                shape.inputs,
                shape.outputs,
                shape.kernel,  # type: ignore[arg-type]  # two numbers
                shape.stride,  # type: ignore[arg-type]
                shape.padding,  # type: ignore[arg-type]
                shape.dilation,  # type: ignore[arg-type]
            )
    return made.eval().requires_grad_(False)


def _pruned(layer: nn.Linear | nn.Conv2d, zeros: float) -> nn.Linear | nn.Conv2d:
    """Return a copy in which that percent of the weights, at random places, is zero."""
    made = copy.deepcopy(layer)
    count = made.weight.numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    made.weight.view(-1)[order[: round(count * zeros / 100)]] = 0
    return made


def _inputs(shape: Shape) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(1)
    if shape.kind == "linear":
        sizes = (shape.batch, *shape.size, shape.inputs)
    else:
        sizes = (shape.batch, shape.inputs, *shape.size)
    return [torch.randn(sizes, generator=drawn) for _ in range(_INPUTS)]


def _in_torch(layer: nn.Module, inputs: Sequence[Tensor]) -> list[Callable[[], Any]]:
    def bound(x: Tensor) -> Callable[[], Any]:
        return lambda: layer(x)

    return [bound(x) for x in inputs]


@contextlib.contextmanager
def _elsewhere(
    layer: nn.Module, inputs: Sequence[Tensor], threads: int
) -> Iterator[dict[str, list[Callable[[], Any]]]]:
    """Load the dense layer in every other runtime that is installed and can."""
    bound: dict[str, list[Callable[[], Any]]] = {}
    way = Inputs(example={"x": inputs[0]})
    named = _Named(layer)
    with contextlib.ExitStack() as stack:
        for name in plugins.names("runtimes"):
            runtime = plugins.own_runtime(name)  # in this process, at full speed
            packages = (*runtime.to_export, *runtime.to_run)
            able = runtime.takes == "onnx" and "cpu" in runtime.devices
            if not able or not all(plugins.installed(package) for package in packages):
                continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tersor-")))
            try:
                written = runtime.export(lower(named, "onnx", way), folder, way)
                runner = runtime.load(
                    written[0], Target(runtime=name, options={"threads": threads})
                )
            except TersorError:
                continue  # a runtime that cannot is no rival
            stack.callback(runner.close)
            bound[name] = [runner.bind({"x": x.numpy()}) for x in inputs]
        yield bound


class _Named(nn.Module):
    """A layer whose input is called x."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made
