"""The roofs of this machine, measured: operations a second by number format, bytes a second.

A peak is that of a large matrix product, in the fastest of the runtimes that are installed; a
bandwidth that of STREAM's Add, a = b + c, in numpy, in arrays that fit no cache, and in some that
do; what a call costs is taken off. They are kept for the machine and the versions of the packages.
Other programs only ever lower them: what a busy machine gave is measured again the next time, and
the higher values stay.

Source:
    McCalpin, "Memory bandwidth and machine balance in current high performance computers", 1995
    (STREAM). As there, three arrays are counted: what a store reads before it writes is not. numpy
    asks for large pages, as runtimes do not; without them memory gives less.
"""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core import files, plugins
from tersor.core.errors import TersorError
from tersor.core.hardware import environment, preflight, probe, usable_cores
from tersor.core.runtime import Target
from tersor.core.schema import Mistakes, from_plain, to_plain
from tersor.ops import native

FORMATS = ("fp32", "bf16", "int8")
RUNTIMES = ("onnxruntime", "openvino")
"""Those that are raced for a peak."""
_SIZE = 512
_SCHEMA = 2
_REPEATS, _BUDGET_S = 8, 0.7
_LEAST_BYTES, _MOST_SHARE = 1 << 26, 12
"""Of an array that fits no cache: at least so much, at most one part in so many of what is free."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine can do at most."""

    threads: int
    gflops: Mapping[str, float] = field(default_factory=dict)
    """Billions of operations a second by number format: fp32, bf16, int8."""
    by: Mapping[str, str] = field(default_factory=dict)
    """The runtime that reached it."""
    memory_gb_s: float
    """Billions of bytes a second from memory."""
    cache_gb_s: float
    """The same from the second cache."""
    busy: bool = False
    """Whether the machine was busy at every measurement so far."""

    def roof(self, intensity: float, kind: str, *, cached: bool) -> float:
        """Return what a layer can reach: min(peak, bandwidth * intensity), in GFLOP/s.

        Args:
            intensity: Operations for each byte.
            kind: Number format; fp32 where its own was not measured.
            cached: Whether its data come from the cache.
        """
        return min(self.peak(kind), intensity * self.bandwidth(cached))

    def peak(self, kind: str) -> float:
        """Return the peak of a number format."""
        return self.gflops.get(kind) or self.gflops["fp32"]

    def bandwidth(self, cached: bool) -> float:
        """Return billions of bytes a second."""
        return self.cache_gb_s if cached else self.memory_gb_s


def ceilings(threads: int = 0, *, fresh: bool = False) -> Ceilings:
    """Return this machine's roofs, measured where they are not known; a second or several.

    Args:
        threads: Of a run; 0: all usable cores.
        fresh: Measure again.

    Raises:
        TersorError: no runtime is here to measure a peak with.
    """
    threads = threads or usable_cores()
    file = native.cache_folder() / f"ceilings-{_machine()}-{threads}.json"
    known = None if fresh else _read(file)
    if known is not None and not known.busy:
        return known
    made = _measure(threads)
    if known is not None:
        made = _higher(known, made)
    content = json.dumps({"schema": _SCHEMA, "ceilings": to_plain(made)}, indent=1).encode()
    with contextlib.suppress(OSError):  # no room, no folder: measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(file, content)
    return made


def _measure(threads: int) -> Ceilings:
    busy = bool(preflight(probe()))
    gflops: dict[str, float] = {}
    by: dict[str, str] = {}
    reasons = []
    for kind in FORMATS:
        for name in RUNTIMES:
            try:
                found = _peak(kind, name, threads)
            except TersorError as error:
                reasons.append(f"{name}: {error}")
                continue
            if found > gflops.get(kind, 0.0):
                gflops[kind], by[kind] = found, name
    if "fp32" not in gflops:
        raise TersorError(f"the machine's peak cannot be measured: {'; '.join(reasons)}")
    return Ceilings(
        threads=threads,
        gflops=gflops,
        by=by,
        memory_gb_s=add(_large_bytes(), threads),
        cache_gb_s=add(_small_bytes(), threads),
        busy=busy,
    )


def _higher(one: Ceilings, other: Ceilings) -> Ceilings:
    """Keep the higher of two measurements of everything."""
    gflops, by = dict(one.gflops), dict(one.by)
    for kind, found in other.gflops.items():
        if found > gflops.get(kind, 0.0):
            gflops[kind], by[kind] = found, other.by[kind]
    return Ceilings(
        threads=one.threads,
        gflops=gflops,
        by=by,
        memory_gb_s=max(one.memory_gb_s, other.memory_gb_s),
        cache_gb_s=max(one.cache_gb_s, other.cache_gb_s),
        busy=one.busy and other.busy,
    )


def add(bytes_each: int, threads: int) -> float:
    """Measure a = b + c in numpy, each thread on arrays of its own.

    Args:
        bytes_each: Of each thread's three arrays, each.
        threads: At the same time.

    Returns:
        Billions of bytes a second: the fastest of several passes, as STREAM reports.
    """
    count = max(1, bytes_each // 8)
    passes = max(1, (1 << 24) // (8 * count))  # so that a short one lasts as long as a clock needs

    def seconds(size: int) -> float:
        arrays = [[np.full(size, value) for value in (0.0, 1.0, 2.0)] for _ in range(threads)]

        def run(three: list[np.ndarray]) -> None:
            a, b, c = three
            for _ in range(passes):
                np.add(b, c, out=a)

        with ThreadPoolExecutor(threads) as pool:
            return _fastest(lambda: list(pool.map(run, arrays)))

    spent = seconds(count)
    called = seconds(1)
    return 3 * 8 * count * passes * threads / max(spent - called, spent / 2) / 1e9


def product(kind: str, size: int) -> Any:
    """Write a matrix product as ONNX; "int8" has quantized inputs and weights.

    Args:
        kind: "fp32" or "int8".
        size: Of both matrices' sides.

    Returns:
        onnx.ModelProto: y = x w, x and y float32.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, size=(size, size)).astype(np.int8)
    if kind == "fp32":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
        constants = [numpy_helper.from_array(weight.astype(np.float32) / 127, "w")]
    else:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["r"]),
            helper.make_node("DequantizeLinear", ["w", "scale", "none"], ["v"]),
            helper.make_node("MatMul", ["r", "v"], ["y"], name="product"),
        ]
        constants = [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.array(1 / 64, np.float32), "scale"),
            numpy_helper.from_array(np.array(128, np.uint8), "zero"),
            numpy_helper.from_array(np.array(0, np.int8), "none"),
        ]
    matrix = [size, size]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, matrix)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, matrix)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _peak(kind: str, name: str, threads: int) -> float:
    """Return billions of operations a second of a matrix product in one runtime."""
    runtime = plugins.runtime(name)
    plugins.require("runtimes", name, runtime.to_run)
    options: dict[str, Any] = {"threads": threads}
    if kind == "bf16":
        if not runtime.halves("cpu"):
            raise TersorError("has no bf16")
        options["precision"] = "bf16"
    x = np.random.default_rng(1).standard_normal((_SIZE, _SIZE)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        file = Path(folder) / "product.onnx"
        file.write_bytes(product("int8" if kind == "int8" else "fp32", _SIZE).SerializeToString())
        runner = runtime.load(file, Target(runtime=name, options=options))
        try:
            seconds = _fastest(runner.bind({"x": x}))
        finally:
            runner.close()
    return 2 * _SIZE**3 / seconds / 1e9


def _fastest(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest run: other programs only ever add."""
    call()
    times: list[float] = []
    until = time.perf_counter() + _BUDGET_S
    while len(times) < _REPEATS or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _large_bytes() -> int:
    machine = probe()
    cache = max(machine.caches.values(), default=0)
    free = machine.available_bytes or (1 << 31)
    threads = usable_cores()
    return min(max(_LEAST_BYTES, 4 * cache // threads), free // _MOST_SHARE // threads)


def _small_bytes() -> int:
    """A sixth of the second cache, for three arrays to fill half of it."""
    return max(1 << 14, probe().caches.get("L2", 1 << 20) // 6)


def _machine() -> str:
    """Hash what the roofs depend on."""
    about = environment()
    machine = about["machine"]
    parts = {
        "machine": {key: machine[key] for key in ("cpu", "flags", "caches", "usable")},
        "packages": {name: about["packages"].get(name) for name in ("numpy", *RUNTIMES)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _read(file: Path) -> Ceilings | None:
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain["schema"] != _SCHEMA:
            return None
        mistakes = Mistakes()
        found = from_plain(Ceilings, plain["ceilings"], (), mistakes)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found and found.gflops.get("fp32") else None
