"""ONNX Runtime on the CPU (and CUDA where its provider is installed)."""

import json
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

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.onnx`, weights of few bits packed."""
    del inputs
    from tersor.ops.onnx_packing import pack_weights

    file = folder / "model.onnx"
    file.write_bytes(pack_weights(net).SerializeToString(deterministic=True))
    return [file]


def load(path: Path, target: Target) -> Runner:
    """Start a session with all graph optimizations, computing in the precision of the file."""
    return _Runner(_session(path, target), target.device)


def inputs(path: Path) -> Mapping[str, Signature]:
    """Read names, shapes and types without optimizing.

    Raises:
        ModelError: it is no model that this version reads.
    """
    import onnxruntime

    names = {"float": "float32", "double": "float64"}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot load {path.name}: {_plain(error)}") from error
    found = {}
    for each in session.get_inputs():
        kind = each.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(
            n if isinstance(n, int) else str(n or f"axis {i}") for i, n in enumerate(each.shape)
        )
        found[each.name] = Signature(shape=shape, dtype=names.get(kind, kind))
    return found


def profile(path: Path, target: Target, batches: Sequence[Arrays]) -> Sequence[OperatorTime]:
    """Run the batches with ONNX Runtime's profiler on; it counts whole microseconds."""
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        session = _session(path, target, profile_to=Path(folder) / "profile")
        runner = _Runner(session, target.device)
        for batch in batches:
            runner.bind(batch)()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        runner.close()
    taken: dict[str, list[float]] = {}
    about: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            taken.setdefault(event["name"], []).append(event["dur"] / 1e3)
            about[event["name"]] = event["args"]
    return [
        OperatorTime(
            name=name.removesuffix("_kernel_time"),
            kind=about[name]["op_name"],
            ms=middle_mean(times) * len(times) / len(batches),
            weight=_weight(about[name]),
        )
        for name, times in taken.items()
    ]


def fused(path: Path, target: Target) -> Sequence[RanOperator]:
    """Let ONNX Runtime write its optimized graph, and follow the tensors in it."""
    import onnx

    from tersor.ops.onnx_cover import covered

    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        written = Path(folder) / "optimized.onnx"
        _session(path, target, write_to=written)
        return covered(onnx.load(path), onnx.load(written))


def _weight(about: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = [tuple(next(iter(shape.values()))) for shape in about.get("input_type_shape", ())]
    at = 3 if about["op_name"].startswith("QLinear") else 1
    return shapes[at] if len(shapes) > at else ()


def _session(
    path: Path, target: Target, profile_to: Path | None = None, write_to: Path | None = None
) -> Any:
    import onnxruntime

    provider = _PROVIDERS[target.device]
    if provider not in onnxruntime.get_available_providers():
        raise TargetError(
            f"ONNX Runtime has no {provider} here. "
            "Install a build that has it: pip install onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    if write_to is not None:
        options.optimized_model_filepath = str(write_to)
    # idle threads that spin would disturb whatever is measured beside this session
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # 4-bit weights: compute in fp32, not in int8 with activations quantized on the fly
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise TargetError(f"ONNX Runtime cannot load {path.name}: {_plain(error)}") from error


class _Runner:
    """A session whose inputs and outputs are bound to memory of their own."""

    def __init__(self, session: Any, device: str) -> None:
        self.session, self.device = session, device
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.outputs = [o.name for o in session.get_outputs()]

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import onnxruntime

        binding = self.session.io_binding()
        for name in self.inputs:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(inputs[name]), self.device
            )
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.device)

        def call() -> Arrays:
            try:
                self.session.run_with_iobinding(binding)
            except Exception as error:
                raise TargetError(f"ONNX Runtime failed while running: {_plain(error)}") from error
            return dict(zip(self.outputs, binding.copy_outputs_to_cpu(), strict=True))

        return call

    def close(self) -> None:
        del self.session


def _plain(error: Exception) -> str:
    """Keep the last part of ONNX Runtime's message, which says what is wrong."""
    return str(error).strip().splitlines()[0].split(" : ")[-1][:300]


RUNTIME = Runtime(
    takes="onnx",
    devices=("cpu", "cuda"),
    export=export,
    load=load,
    profile=profile,
    fused=fused,
    inputs=inputs,
    suffixes=(".onnx",),
    weights=("fp8_e4m3", "fp8_e5m2"),
    to_export=("onnx", "onnxscript"),
    to_run=("onnxruntime",),
)
