"""OpenVINO on the CPU."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import ModelError, TargetError
from tersor.core.hardware import usable_cores
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

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


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
            raise TargetError(f"OpenVINO cannot read the network: {_plain(error)}") from error
        file = folder / "model.xml"
        openvino.save_model(model, file, compress_to_fp16=False)
    return [file, file.with_suffix(".bin")]


def load(path: Path, target: Target) -> Runner:
    """Compile for latency, in fp32 unless a step chose another precision."""
    return _Runner(_compiled(path, target))


def inputs(path: Path) -> Mapping[str, Signature]:
    """Read names, shapes and types.

    Raises:
        ModelError: it is no model that this version reads.
    """
    import openvino

    try:
        model = openvino.Core().read_model(path)
    except Exception as error:
        raise ModelError(f"OpenVINO cannot read {path.name}: {_plain(error)}") from error
    return {
        port.get_any_name(): Signature(
            shape=tuple(
                n.get_length() if n.is_static else f"axis {i}"
                for i, n in enumerate(port.get_partial_shape())
            ),
            dtype=str(port.get_element_type().to_dtype()),
        )
        for port in model.inputs
    }


def profile(path: Path, target: Target, batches: Sequence[Arrays]) -> Sequence[OperatorTime]:
    """Run the batches with OpenVINO's counters on."""
    runner = _Runner(_compiled(path, target, counting=True))
    taken: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    request = runner.compiled.create_infer_request()
    for batch in batches:
        request.infer({name: np.ascontiguousarray(batch[name]) for name in runner.names})
        for info in request.profiling_info:
            if info.status == info.Status.EXECUTED:
                taken.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e3)
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


def _compiled(path: Path, target: Target, counting: bool = False) -> Any:
    import openvino

    precision = str(target.options.get("precision", "fp32"))
    if precision not in _HINTS:
        raise TargetError(
            f"openvino has no precision {precision!r}; use one of {', '.join(_HINTS)}"
        )
    core = openvino.Core()
    if precision != "fp32":
        able = [str(x).lower() for x in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
        if precision not in able:
            raise TargetError(
                f"this processor does not compute in {precision}; OpenVINO has: {', '.join(able)}"
            )
    settings = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": target.threads or usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "PERF_COUNT": counting,
        # compressed weights: no quantization of activations on the fly
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    try:
        return core.compile_model(str(path), "CPU", settings)
    except Exception as error:
        raise TargetError(f"OpenVINO cannot load {path.name}: {_plain(error)}") from error


class _Runner:
    """A compiled model with one inference request for each binding."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.names = [port.get_any_name() for port in compiled.inputs]
        self.outputs = [port.get_any_name() for port in compiled.outputs]

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import openvino

        request = self.compiled.create_infer_request()
        kept = {name: np.ascontiguousarray(inputs[name]) for name in self.names}
        for name, array in kept.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def call() -> Arrays:
            assert kept  # the request reads their memory
            try:
                request.infer()
            except Exception as error:
                raise TargetError(f"OpenVINO failed while running: {_plain(error)}") from error
            return {n: np.array(request.get_tensor(n).data) for n in self.outputs}

        return call

    def close(self) -> None:
        del self.compiled


def _plain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


RUNTIME = Runtime(
    takes="onnx",
    devices=("cpu",),
    export=export,
    load=load,
    profile=profile,
    fused=fused,
    inputs=inputs,
    suffixes=(".xml",),
    options=("threads", "precision"),
    weights=("fp8_e4m3", "fp8_e5m2"),
    to_export=("openvino", "onnx", "onnxscript"),
    to_run=("openvino",),
)
