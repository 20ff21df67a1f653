"""FPGAs: a Vitis HLS project (hls4ml), run here by its bit-accurate emulation.

For small networks of linear layers, convolutions, ReLU, max pooling and additions, of which every
multiplication becomes a circuit of its own. Quantized by `static: {symmetric: true, power_of_two:
true}` they are computed in fixed point without any further error: the emulation gives, bit for bit,
what ONNX Runtime gives for the same integers. Layers in float are computed in `ap_fixed<bits>`.

What is exported: `model.onnx`, from which the project is built again to emulate it, and
`project.zip`, the project. Unpacked, `vitis-run --tcl build_prj.tcl --mode hls` synthesizes it; its
images are channels last. The emulation is compiled by g++, takes some seconds to load, and runs in
one thread; what it takes to run says nothing about the FPGA, whose time is in the synthesis report.

Options: `part` (of the FPGA), `clock_ns` (its period, 5), `reuse_factor` (runs of a multiplier for
one output, 1; hls4ml takes the nearest that divides a layer), `bits` (total and integer bits of
what is not quantized, [24, 8]). All values are there at once (`io_parallel`), none is streamed.

Synthesis needs AMD's tools: not verified on hardware.
"""

import contextlib
import io
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import DependencyError, TargetError, named_lines
from tersor.core.model import Inputs
from tersor.core.runtime import Arrays, Runner, Runtime, Target

_PROJECT, _ARCHIVE, _SETTINGS = "network", "project.zip", "settings.json"
_PART = "xcvu13p-flga2577-2-e"  # hls4ml's own default
_CLEAR = ("hls4ml_config.yml", ".so", ".o")
"""What is not packed: paths of this machine, and what was compiled for it."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the options of a target say."""

    part: str = _PART
    clock_ns: float = 5
    reuse_factor: int = 1
    bits: tuple[int, int] = (24, 8)


def settings(options: Mapping[str, Any]) -> Settings:
    """Read and check options.

    Raises:
        TargetError: a value that cannot be.
    """
    part = options.get("part", _PART)
    # it is written into scripts
    if not isinstance(part, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", part):
        raise TargetError(f"part must be an FPGA's name, such as {_PART}; got {part!r}")
    clock = options.get("clock_ns", 5)
    if not isinstance(clock, (int, float)) or isinstance(clock, bool) or not 0.1 <= clock <= 1000:
        raise TargetError(f"clock_ns must be the clock's period, 0.1 to 1000; got {clock!r}")
    reuse = options.get("reuse_factor", 1)
    if not isinstance(reuse, int) or isinstance(reuse, bool) or reuse < 1:
        raise TargetError(f"reuse_factor must be a whole number from 1; got {reuse!r}")
    bits = options.get("bits", (24, 8))
    if (
        not isinstance(bits, (list, tuple))
        or [type(n) for n in bits] != [int, int]
        or not 1 <= bits[1] <= bits[0] <= 64
    ):
        raise TargetError(
            f"bits must be [TOTAL, INTEGER] with 1 <= INTEGER <= TOTAL <= 64; got {bits!r}"
        )
    return Settings(part=part, clock_ns=clock, reuse_factor=reuse, bits=(bits[0], bits[1]))


def export(net: Any, folder: Path, inputs: Inputs, target: Target | None = None) -> Sequence[Path]:
    """Write `model.onnx` and `project.zip`."""
    del inputs
    wanted = settings(target.options if target is not None else {})
    file, archive = folder / "model.onnx", folder / _ARCHIVE
    with tempfile.TemporaryDirectory(prefix="tersor-") as place:
        graph = _graph(net, Path(place), wanted)[0]
        _quietly(graph.write)
        (Path(place) / _SETTINGS).write_text(_settled(wanted), encoding="utf-8")
        _pack(Path(place), archive, str(graph.config.get_config_value("Stamp")))
    file.write_bytes(net.SerializeToString(deterministic=True))
    return [file, archive]


def load(path: Path, target: Target) -> Runner:
    """Build the project and compile its emulation."""
    import onnx

    wanted = settings(target.options)
    if target.threads > 1:
        raise TargetError(
            f"the emulation runs on one thread, not on {target.threads}; leave threads out"
        )
    if shutil.which("g++") is None:
        raise DependencyError(
            "runtime 'hls' emulates with the compiler g++, which is not there. Install it with "
            "the system's packages: apt install g++"
        )
    _check_project(path.with_name(_ARCHIVE), wanted)
    try:
        net = onnx.load(path)
    except Exception as error:
        raise TargetError(f"{path.name} is no ONNX file: {named_lines(error)}") from error
    with tempfile.TemporaryDirectory(prefix="tersor-") as place:
        graph, network = _graph(net, Path(place), wanted)
        _quietly(graph.compile)
        runner = _Runner(graph, network)
        # the first run reads the weights; after it the files may go
        runner.bind({n: np.zeros((1, *shape)) for n, shape in network.inputs.items()})()
    return runner


def _settled(wanted: Settings) -> str:
    return json.dumps(asdict(wanted), indent=1) + "\n"


def _check_project(archive: Path, wanted: Settings) -> None:
    """Refuse to emulate something else than the project that lies beside the file."""
    if not archive.is_file():
        return
    try:
        with zipfile.ZipFile(archive) as packed:
            written = json.loads(packed.read(_SETTINGS))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TargetError(f"{archive.name} is damaged: {named_lines(error)}") from error
    if written != json.loads(_settled(wanted)):
        raise TargetError(
            f"{archive.name} was written for {written}, not for {asdict(wanted)}; export it again "
            "with these options"
        )


def _graph(net: Any, place: Path, wanted: Settings) -> tuple[Any, Any]:
    """Build hls4ml's graph, and return it with the description that it was built from."""
    from tersor.ops.fixed_point import Fixed, read

    total, integer = wanted.bits
    default = Fixed(bits=total, fraction=total - integer)
    network = read(net, default)

    def build() -> Any:
        from hls4ml.model.graph import ModelGraph
        from hls4ml.utils.config import create_config

        config = create_config(
            output_dir=str(place),
            project_name=_PROJECT,
            backend="Vitis",
            part=wanted.part,
            clock_period=wanted.clock_ns,
            io_type="io_parallel",
        )
        config["InputData"] = config["OutputPredictions"] = None
        config["HLSConfig"] = {
            "Model": {
                "Precision": {"default": str(default)},
                "ReuseFactor": wanted.reuse_factor,
                "Strategy": "Latency" if wanted.reuse_factor == 1 else "Resource",
            },
            "LayerName": {name: {"Precision": kinds} for name, kinds in network.types.items()},
        }
        first = [e["name"] for e in network.layers if e["class_name"] == "InputLayer"]
        return ModelGraph.from_layer_list(config, network.layers, first, network.ends)

    return _quietly(build), network


def _quietly(do: Callable[[], Any]) -> Any:
    """Call hls4ml, which prints; what it raises becomes ours."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return do()
    except ImportError:
        raise
    except Exception as error:
        last = [line.strip() for line in said.getvalue().splitlines() if "error" in line]
        reason = f": {last[0][:300]}" if last else ""
        raise TargetError(
            f"hls4ml cannot build the network: {named_lines(error)}{reason}"
        ) from error


def _pack(place: Path, archive: Path, stamp: str) -> None:
    """Pack a project; the same network gives the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(p for p in place.rglob("*") if p.is_file()):
            if file.name.endswith(_CLEAR):
                continue
            about = zipfile.ZipInfo(str(file.relative_to(place)), _EPOCH)
            about.compress_type = zipfile.ZIP_DEFLATED
            about.external_attr = (0o755 if file.suffix == ".sh" else 0o644) << 16
            content = file.read_bytes().replace(stamp.encode(), b"emulation")
            packed.writestr(about, content)


class _Runner:
    """A compiled emulation."""

    def __init__(self, graph: Any, network: Any) -> None:
        self.graph, self.network = graph, network

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        """Lay the inputs out as the project reads them; doubles hold its numbers exactly."""
        laid = []
        for name, shape in self.network.inputs.items():
            array = inputs[name]
            if array.shape[1:] != shape:
                raise TargetError(
                    f"input {name!r} has the shape {array.shape[1:]}; hls was built for {shape}"
                )
            last = np.moveaxis(array, 1, -1) if array.ndim > 2 else array
            laid.append(np.ascontiguousarray(last, np.float64))
        count = len(laid[0])
        shapes = self.network.outputs

        def call() -> Arrays:
            made = self.graph.predict(laid[0] if len(laid) == 1 else laid)
            parts = made if len(shapes) > 1 else [made]
            return {
                name: _first(np.asarray(part), count, shape)
                for (name, shape), part in zip(shapes.items(), parts, strict=True)
            }

        return call

    def close(self) -> None:
        """Let go of the emulation."""
        del self.graph


def _first(flat: np.ndarray, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Shape an output, and put its channels first."""
    array = flat.reshape(count, *shape[1:], shape[0]).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if len(shape) > 1 else array


RUNTIME = Runtime(
    takes="onnx",
    devices=("cpu",),
    export=export,
    load=load,
    targeted=True,
    options=("threads", "part", "clock_ns", "reuse_factor", "bits"),
    check=lambda target: settings(target.options),
    to_export=("hls4ml", "onnx", "onnxscript"),
    to_run=("hls4ml", "onnx"),
)
