"""OpenVINO on the CPU.

Options: `precision` (fp32, bf16, fp16); `hint` (`latency`, the default, or `throughput`: a batch is
shared among requests that run at once, each with threads of its own); `streams` (how many, by
default one, or for throughput as many as OpenVINO thinks best); `shapes` (`free`, the default, or
`fixed`: compiled once for each shape of inputs that is met, which saves what free sizes cost in
every run, and takes the time and the memory of a compilation for each shape); `sparse_rate` (0 to
1: matrices of int8 weights with at least that share of zeros stay packed in memory, which OpenVINO
does only on processors with AMX, for channels that are multiples of 64; not verified on hardware).
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import ModelError, TargetError, last_line, suggest
from tersor.core.hardware import probe, usable_cores
from tersor.core.model import Inputs
from tersor.core.runtime import (
    Arrays,
    OperatorTime,
    RanOperator,
    Runner,
    Runtime,
    Signature,
    Target,
)
from tersor.core.timing import middle_mean

_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_HINTS = ("latency", "throughput")
_SHAPES = ("free", "fixed")
_KEPT = 8
"""Compilations for fixed shapes that are kept, the last used ones."""
_DROPPED_MS = 0.0005
"""Of a time in whole microseconds, on average."""


def settings(target: Target, flags: Collection[str]) -> dict[str, Any]:
    """Return what OpenVINO is told to compile for.

    Args:
        target: Whose options are read.
        flags: Instruction sets of the processor.

    Raises:
        TargetError: a value that cannot be; the nearest one is suggested.
    """
    options = target.options
    precision, hint = options.get("precision", "fp32"), options.get("hint", "latency")
    shapes = options.get("shapes", "free")
    for name, given, known in (
        ("precision", precision, tuple(_PRECISIONS)),
        ("hint", hint, _HINTS),
        ("shapes", shapes, _SHAPES),
    ):
        if given not in known:
            raise TargetError(
                f"{name} must be one of {', '.join(known)}; got {given!r}."
                f"{suggest(str(given), known)}"
            )
    made = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": target.threads or usable_cores(),
        "PERFORMANCE_HINT": hint.upper(),
        # compressed weights: no quantization of activations on the fly
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    streams = options.get("streams", 1 if hint == "latency" else None)
    if streams is not None:
        if not isinstance(streams, int) or isinstance(streams, bool) or streams < 1:
            raise TargetError(f"streams must be a whole number from 1; got {streams!r}")
        made["NUM_STREAMS"] = streams
    if shapes == "fixed" and made.get("NUM_STREAMS") != 1:
        raise TargetError(
            "shapes: fixed runs a batch whole, as one request; leave out streams and hint, or "
            "leave the shapes free"
        )
    rate = options.get("sparse_rate")
    if rate is not None:
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate <= 1:
            raise TargetError(f"sparse_rate must be a share of zeros, 0 to 1; got {rate!r}")
        if not any(flag.startswith("amx") for flag in flags):
            raise TargetError(
                "sparse_rate needs a processor with AMX, which this one lacks; OpenVINO would "
                "keep every weight. Leave the option out"
            )
        made["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = float(rate)
    return made


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.xml` and `model.bin`, keeping every number format as it is."""
    del inputs
    import openvino

    with tempfile.TemporaryDirectory() as aside:
        source = Path(aside) / "model.onnx"
        source.write_bytes(net.SerializeToString(deterministic=True))
        try:
            model = openvino.convert_model(source)
        except Exception as error:
            raise TargetError(f"OpenVINO cannot read the network: {last_line(error)}") from error
        file = folder / "model.xml"
        openvino.save_model(model, file, compress_to_fp16=False)
    return [file, file.with_suffix(".bin")]


def load(path: Path, target: Target) -> Runner:
    """Compile, in fp32 unless a step chose another precision."""
    return _Runner(path, target)


def inputs(path: Path) -> Mapping[str, Signature]:
    """Read names, shapes and types.

    Raises:
        ModelError: it is no model that this version reads.
    """
    try:
        model = _core().read_model(path)
    except Exception as error:
        raise ModelError(f"OpenVINO cannot read {path.name}: {last_line(error)}") from error
    return {
        name_of(port): Signature(
            shape=tuple(
                n.get_length() if n.is_static else f"axis {i}"
                for i, n in enumerate(port.get_partial_shape())
            ),
            dtype=str(port.get_element_type().to_dtype()),
        )
        for port in model.inputs
    }


def name_of(port: Any) -> str:
    """Return the name of an input or output that the network was exported with.

    A tensor that OpenVINO merged with others, as a flatten that changes nothing merges its output
    with its input, has all their names; the node of the port keeps its own.
    """
    names = port.get_names()
    own: str = port.get_node().get_friendly_name().partition("/sink_port_")[0]
    return own if own in names or not names else min(names)


def profile(path: Path, target: Target, batches: Sequence[Arrays]) -> Sequence[OperatorTime]:
    """Run the batches with OpenVINO's counters on, which drop what is below a microsecond."""
    runner = _Runner(path, target, counting=True)
    taken: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    compiled: Any = None
    request: Any = None
    for batch in batches:
        arrays = {name: np.ascontiguousarray(batch[name]) for name in runner.names}
        found = runner.compiled_for(arrays)
        if found is not compiled:
            compiled, request = found, found.create_infer_request()
        request.infer(arrays)
        for info in request.profiling_info:
            if info.status == info.Status.EXECUTED:
                ms = info.real_time.total_seconds() * 1e3 + _DROPPED_MS
                taken.setdefault(info.node_name, []).append(ms)
                kinds[info.node_name] = info.node_type
    return [
        OperatorTime(name=name, kind=kinds[name], ms=middle_mean(times) * len(times) / len(batches))
        for name, times in taken.items()
    ]


def fused(path: Path, target: Target) -> Sequence[RanOperator]:
    """Read which layers went into each operator from the compiled model's own graph."""
    found = []
    for operator in _compiled(path, target).get_runtime_model().get_ordered_ops():
        about = operator.get_rt_info()
        kind, names = (str(about[k].astype(str)) for k in ("layerType", "originalLayersNames"))
        # what OpenVINO takes apart, such as a bias, is called NAME/PART
        bases = {name.partition("/")[0] for name in names.split(",") if name}
        found.append(
            RanOperator(kind=kind, covers=tuple(sorted(bases)), name=operator.get_friendly_name())
        )
    return found


@cache
def _core() -> Any:
    """Return the one core of this process.

    Each core gives the thread a stack for signals, and takes it away when it goes: of two that go
    in the order in which they came, the first one's stays in use, and the next Ctrl-C is a crash.
    """
    import openvino

    return openvino.Core()


def _compiled(network: Any, target: Target, counting: bool = False) -> Any:
    """Compile a file, or a network that was read."""
    told = settings(target, probe().flags) | {"PERF_COUNT": counting}
    precision = str(target.options.get("precision", "fp32"))
    core = _core()
    if precision != "fp32":
        able = [str(x).lower() for x in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
        if precision not in able:
            raise TargetError(
                f"this processor does not compute in {precision}; OpenVINO has: {', '.join(able)}"
            )
    with _loading(network):
        return core.compile_model(network, "CPU", told)


@contextmanager
def _loading(network: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        name = network.name if isinstance(network, Path) else "the network"
        raise TargetError(f"OpenVINO cannot load {name}: {last_line(error)}") from error


class _Runner:
    """A network; each binding has requests of its own, as many as run at once."""

    def __init__(self, path: Path, target: Target, counting: bool = False) -> None:
        self.fixed = target.options.get("shapes") == "fixed"
        with _loading(path):
            self.network: Any = _core().read_model(path) if self.fixed else path
        self.target, self.counting = target, counting
        self.kept = lru_cache(_KEPT)(self._compile)
        first: Any = self.network if self.fixed else self.kept(())
        self.names = [name_of(port) for port in first.inputs]
        self.outputs = [name_of(port) for port in first.outputs]
        ports = [*first.inputs, *first.outputs]
        free = not self.fixed and all(_has_free_batch(port.partial_shape) for port in ports)
        self.most = int(first.get_property("NUM_STREAMS")) if free else 1

    def compiled_for(self, inputs: Arrays) -> Any:
        """Return the network compiled for these shapes, or for all where they are free."""
        shapes = tuple(inputs[name].shape for name in self.names) if self.fixed else ()
        return self.kept(shapes)

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        network: Any = self.network
        if shapes:
            network = network.clone()
            try:
                network.reshape(dict(zip(self.names, shapes, strict=True)))
            except Exception as error:
                raise TargetError(
                    f"OpenVINO cannot fix the shapes of this network: {last_line(error)}; leave "
                    "them free"
                ) from error
        return _compiled(network, self.target, self.counting)

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import openvino

        kept = {name: np.array(inputs[name], order="C") for name in self.names}
        compiled = self.compiled_for(kept)
        count = min(len(array) for array in kept.values()) if self.most > 1 else 1
        cuts = np.array_split(np.arange(count), min(self.most, count))
        requests = []
        for cut in cuts:
            request = compiled.create_infer_request()
            for name, array in kept.items():
                part = array if len(cuts) == 1 else array[cut[0] : cut[-1] + 1]
                request.set_tensor(name, openvino.Tensor(part, shared_memory=True))
            requests.append(request)

        def call() -> Arrays:
            assert kept  # the requests read their memory
            try:
                if len(requests) == 1:
                    requests[0].infer()
                else:
                    for request in requests:
                        request.start_async()
                    for request in requests:
                        request.wait()
            except Exception as error:
                raise TargetError(f"OpenVINO failed while running: {last_line(error)}") from error
            made = {n: [np.array(r.get_tensor(n).data) for r in requests] for n in self.outputs}
            return {n: p[0] if len(p) == 1 else np.concatenate(p) for n, p in made.items()}

        return call

    def close(self) -> None:
        self.kept.cache_clear()


def _has_free_batch(shape: Any) -> bool:
    return shape.rank.is_static and len(shape) > 0 and shape[0].is_dynamic


RUNTIME = Runtime(
    takes="onnx",
    devices=("cpu",),
    export=export,
    load=load,
    profile=profile,
    fused=fused,
    inputs=inputs,
    suffixes=(".xml", ".onnx", ".tflite"),
    options=("threads", "precision", "hint", "streams", "shapes", "sparse_rate"),
    check=lambda target: settings(target, ("amx",)),
    weights=("fp8_e4m3", "fp8_e5m2"),
    to_export=("openvino", "onnx", "onnxscript"),
    to_run=("openvino",),
)
