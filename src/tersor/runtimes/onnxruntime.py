"""ONNX Runtime: on the CPU, or through another of its execution providers.

Devices are execution providers: `cpu`, `cuda`, `tensorrt`, `openvino`, `coreml`, `xnnpack`,
`directml`. Each needs a build of ONNX Runtime that has it; what is missing is said, and the CPU
never takes over unasked: neither for a provider that does not start, nor, without `fallback: true`,
for operators that it lacks (those that only compute shapes may stay there).

Options: `optimization` (`disable`, `basic`, `extended` or `all`, the default); `format: ort` writes
the format of ONNX Runtime's builds for phones, with the list of operators that such a build needs;
`format: vitis_ai` an ONNX file by the rules of AMD's Vitis AI, biases in int8, too;
`saved_optimized: true` (cpu) keeps the optimized graph beside the file, so that loading it with the
same version on the same kind of machine is quick; `precision` (`fp32`, `fp16`, `bf16`; cuda,
tensorrt) turns weights and activations to 16 bits, inputs and outputs staying as they are;
`cuda_graphs: true` (cuda, tensorrt) replays a captured graph in place of launching each operator.

tensorrt, coreml, xnnpack and directml: not verified on hardware. openvino was run on a CPU.
"""

import contextlib
import functools
import io
import itertools
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import ModelError, TargetError, suggest
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
from tersor.ops.onnx_profiler import NOTHING, Cost, kernel_events, measure_cost
from tersor.ops.onnx_providers import PROVIDERS, available, check_placement, provider_options

_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_FORMATS = ("onnx", "ort", "vitis_ai")
_PRECISIONS = ("fp32", "fp16", "bf16")
_SWITCHES = ("saved_optimized", "cuda_graphs", "fallback")
_OPTIMIZED, _MACHINE, _FORMAT = "optimized.onnx", "tersor.machine", "tersor.format"
_PRECISION = "tersor.precision"


def check(target: Target) -> None:
    """Check the options of a target.

    Raises:
        TargetError: a value that cannot be; the nearest one is suggested.
    """
    options = target.options
    known_values = {
        "optimization": tuple(_LEVELS),
        "format": _FORMATS,
        "precision": _PRECISIONS,
    }
    for name, known in known_values.items():
        given = options.get(name, known[0])
        if given not in known:
            raise TargetError(
                f"{name} must be one of {', '.join(known)}; got {given!r}."
                f"{suggest(str(given), known)}"
            )
    for name in _SWITCHES:
        if not isinstance(options.get(name, False), bool):
            raise TargetError(f"{name} must be true or false; got {options[name]!r}")
    if PROVIDERS[target.device].memory != "cuda":
        if options.get("cuda_graphs"):
            raise TargetError(
                f"cuda_graphs needs the device cuda or tensorrt; the target is {target}"
            )
        if _halved(target):
            raise TargetError(
                f"precision {options['precision']} needs the device cuda or tensorrt; {target} "
                "has no kernels for it"
            )
    if _halved(target) and options.get("format", "onnx") != "onnx":
        raise TargetError(f"precision is of no use with format: {options['format']}; leave one out")
    if options.get("saved_optimized") and target.device != "cpu":
        raise TargetError(
            f"saved_optimized needs the device cpu; the target is {target}, which compiles anew"
        )
    if options.get("format") == "ort" and options.get("saved_optimized"):
        raise TargetError("format: ort holds an optimized graph already; leave saved_optimized out")


def export(net: Any, folder: Path, inputs: Inputs, target: Target | None = None) -> Sequence[Path]:
    """Write `model.onnx`, weights of few bits packed; or `model.ort`.

    For processors, layers of integer weights and float activations multiply by the integers.
    """
    del inputs
    from tersor.ops.onnx_nbits import multiply_codes
    from tersor.ops.onnx_packing import pack_weights

    target = target or Target(runtime="onnxruntime")
    check(target)
    if target.device == "cpu" and target.options.get("format") != "vitis_ai":
        net = multiply_codes(net)
    if target.options.get("format") == "ort":
        return _export_ort(net, folder)
    file = folder / "model.onnx"
    if target.options.get("format") == "vitis_ai":
        return [_export_vitis_ai(net, file)]
    packed = pack_weights(net)
    if _halved(target):
        packed = _to_half(packed, target)
    file.write_bytes(packed.SerializeToString(deterministic=True))
    if not target.options.get("saved_optimized"):
        return [file]
    return [file, _save_optimized(file, target)]


def _halved(target: Target) -> bool:
    return bool(target.options.get("precision", "fp32") != "fp32")


def _to_half(net: Any, target: Target) -> Any:
    """Turn the network to 16 bits, and note that on it."""
    from onnx import helper

    from tersor.ops.onnx_half import to_half

    precision = str(target.options["precision"])
    made = to_half(net, precision)
    held = {each.key: each.value for each in made.metadata_props}
    helper.set_model_props(made, {**held, _PRECISION: precision})
    return made


def _content(path: Path, target: Target) -> str | bytes:
    """Return what a session starts from: the file, or what it holds turned to 16 bits."""
    if not _halved(target):
        return str(path)
    import onnx

    try:
        net = onnx.load(path)
    except Exception as error:
        raise TargetError(f"ONNX cannot read {path.name}: {_plain(error)}") from error
    if any(each.key == _PRECISION for each in net.metadata_props):
        return str(path)
    made: bytes = _to_half(net, target).SerializeToString()
    return made


def _export_vitis_ai(net: Any, file: Path) -> Path:
    from onnx import helper

    from tersor.ops.vitis_ai import to_vitis_ai

    made = to_vitis_ai(net)
    helper.set_model_props(made, {_FORMAT: "vitis_ai"})
    file.write_bytes(made.SerializeToString(deterministic=True))
    return file


def _export_ort(net: Any, folder: Path) -> Sequence[Path]:
    """Convert to ONNX Runtime's own format, without what only this kind of processor has."""
    from onnxruntime.tools import convert_onnx_models_to_ort as converter

    file, needed = folder / "model.ort", folder / "model.required_operators.config"
    with tempfile.TemporaryDirectory(prefix="tersor-") as aside:
        source = Path(aside) / "model.onnx"
        source.write_bytes(net.SerializeToString(deterministic=True))
        logging.getLogger("ort_format_model.utils").setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # it leaves a file open
                converter.convert_onnx_models_to_ort(
                    source, optimization_styles=[converter.OptimizationStyle.Fixed]
                )
        except Exception as error:
            raise TargetError(
                f"the network cannot be written in ONNX Runtime's format: {_plain(error)}"
            ) from error
        shutil.move(source.with_suffix(".ort"), file)
        shutil.move(source.with_suffix(".required_operators.config"), needed)
    return [file, needed]


def _save_optimized(file: Path, target: Target) -> Path:
    """Write the optimized graph, marked with what it was optimized for."""
    import onnx

    written = file.with_name(_OPTIMIZED)
    _session(file, target, write_to=written)
    graph = onnx.load(written)
    onnx.helper.set_model_props(graph, {_MACHINE: _machine(target)})
    written.write_bytes(graph.SerializeToString(deterministic=True))
    return written


def _machine(target: Target) -> str:
    """Say what an optimized graph depends on."""
    import onnxruntime

    here = probe()
    level = target.options.get("optimization", "all")
    words = (onnxruntime.__version__, target.device, level, here.architecture, *here.flags)
    return " ".join(str(word) for word in words)


def load(path: Path, target: Target) -> Runner:
    """Start a session, computing in the precision of the file."""
    return _Runner(_start(path, target), target)


def _start(path: Path, target: Target) -> Any:
    """Start the optimized graph where one was saved for this machine; else optimize."""
    check(target)
    wanted = target.options.get("format")
    if wanted is not None and (path.suffix == ".ort") != (wanted == "ort"):
        raise TargetError(f"{path.name} is not in the format {wanted!r}; export it again")
    if target.options.get("saved_optimized"):
        saved = path.with_name(_OPTIMIZED)
        if not saved.is_file():
            raise TargetError(
                f"there is no {_OPTIMIZED} beside {path.name}; export again with saved_optimized"
            )
        session = _session(saved, target, optimize=False)
        if session.get_modelmeta().custom_metadata_map.get(_MACHINE) == _machine(target):
            return session
    session = _session(path, target)
    if wanted == "vitis_ai" and wanted != session.get_modelmeta().custom_metadata_map.get(_FORMAT):
        raise TargetError(f"{path.name} is not in the format {wanted!r}; export it again")
    return session


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
    """Run the batches with ONNX Runtime's profiler on; on the CPU, what it costs is taken off."""
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        session = _session(path, target, profile_to=Path(folder) / "profile")
        runner = _Runner(session, target)
        for batch in batches:
            runner.bind(batch)()
        events = kernel_events(Path(session.end_profiling()))
        runner.close()
    cost = _profiler_cost(target.threads) if target.device == "cpu" else NOTHING
    taken: dict[str, list[float]] = {}
    about: dict[str, Mapping[str, Any]] = {}
    for event in events:
        taken.setdefault(event["name"], []).append(event["dur"] / 1e3)
        about[event["name"]] = event
    return [
        OperatorTime(
            name=name.removesuffix("_kernel_time"),
            kind=about[name]["args"]["op_name"],
            ms=max(0.0, middle_mean(times) - cost.of(about[name])) * len(times) / len(batches),
            weight=_weight(about[name]["args"]),
        )
        for name, times in taken.items()
    ]


@functools.cache
def _profiler_cost(threads: int) -> Cost:
    target = Target(runtime="onnxruntime", options={"threads": threads})
    return measure_cost(lambda file, profile_to: _session(file, target, profile_to=profile_to))


def fused(path: Path, target: Target) -> Sequence[RanOperator]:
    """Let ONNX Runtime write its optimized graph, and follow the tensors in it."""
    import onnx

    from tersor.ops.onnx_cover import covered

    if path.suffix == ".ort":
        raise TargetError("ONNX Runtime's own format does not tell what its operators were made of")
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        written = Path(folder) / "optimized.onnx"
        _session(path, target, write_to=written)
        # only operators are read; weights beside the file are not beside what was written
        graphs = (onnx.load(file, load_external_data=False) for file in (path, written))
        return covered(*graphs)


def _weight(about: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = [tuple(next(iter(shape.values()))) for shape in about.get("input_type_shape", ())]
    at = 3 if about["op_name"].startswith("QLinear") else 1
    return shapes[at] if len(shapes) > at else ()


def _session(
    path: Path,
    target: Target,
    profile_to: Path | None = None,
    write_to: Path | None = None,
    optimize: bool = True,
) -> Any:
    import onnxruntime

    check(target)
    provider = available(target)
    level = target.options.get("optimization", "all") if optimize else "disable"
    threads = target.threads or usable_cores()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, _LEVELS[str(level)]
    )
    # XNNPACK has threads of its own, which those of the session would compete with
    options.intra_op_num_threads = 1 if target.device == "xnnpack" else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    if write_to is not None:
        options.optimized_model_filepath = str(write_to)
    # idle threads that spin would disturb whatever is measured beside this session
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # 4-bit weights, which the session fuses: in fp32, not with activations rounded on the fly
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if target.device != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            _content(path, target),
            options,
            providers=[(provider.name, provider_options(target, threads))],
        )
    except Exception as error:
        raise TargetError(f"ONNX Runtime cannot load {path.name}: {_plain(error)}") from error
    session.disable_fallback()
    check_placement(session, target)
    return session


class _Runner:
    """A session whose inputs and outputs are bound to memory of their own, on its device."""

    def __init__(self, session: Any, target: Target) -> None:
        self.session, self.memory = session, PROVIDERS[target.device].memory
        self.captures = bool(target.options.get("cuda_graphs"))
        self.graphs = itertools.count(1)
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.outputs = [o.name for o in session.get_outputs()]

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import onnxruntime

        binding = self.session.io_binding()
        # on the CPU a value only points to the memory of its array, and the binding to that
        kept = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.array(inputs[name], order="C"), self.memory
            )
            for name in self.inputs
        }
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.memory)
        run = None if not self.captures else self._capturable(binding)

        def call() -> Arrays:
            assert kept
            self._run(binding, run)
            return dict(zip(self.outputs, binding.copy_outputs_to_cpu(), strict=True))

        return call

    def _capturable(self, binding: Any) -> Any:
        """Give outputs fixed addresses, which a captured graph writes to; return how to run it.

        Each binding has a graph of its own. The first run, which tells the shapes, captures none.
        """
        import onnxruntime

        plain = onnxruntime.RunOptions()
        plain.add_run_config_entry("gpu_graph_id", "-1")
        self._run(binding, plain)
        for name, made in zip(self.outputs, binding.get_outputs(), strict=True):
            kept = onnxruntime.OrtValue.ortvalue_from_numpy(made.numpy(), self.memory)
            binding.bind_ortvalue_output(name, kept)
        own = onnxruntime.RunOptions()
        own.add_run_config_entry("gpu_graph_id", str(next(self.graphs)))
        return own

    def _run(self, binding: Any, options: Any) -> None:
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise TargetError(f"ONNX Runtime failed while running: {_plain(error)}") from error

    def close(self) -> None:
        del self.session


def _plain(error: Exception) -> str:
    """Keep the last part of ONNX Runtime's message, which says what is wrong."""
    return str(error).strip().splitlines()[0].split(" : ")[-1][:300]


RUNTIME = Runtime(
    takes="onnx",
    devices=tuple(PROVIDERS),
    export=export,
    load=load,
    profile=profile,
    fused=fused,
    inputs=inputs,
    suffixes=(".onnx", ".ort"),
    targeted=True,
    options=("threads", "optimization", "format", "precision", *_SWITCHES),
    check=check,
    present=available,
    half_on=tuple(name for name, each in PROVIDERS.items() if each.memory == "cuda"),
    weights=("fp8_e4m3", "fp8_e5m2"),
    to_export=("onnx", "onnxscript"),
    to_run=("onnxruntime",),
)
