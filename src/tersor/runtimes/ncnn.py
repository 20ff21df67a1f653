"""ncnn, for phones and small computers; its networks are made by pnnx.

pnnx converts the ONNX network to `model.param` (text) and `model.bin` (weights in 32-bit floats).
ncnn has no batch axis, so a network takes one sample, and a batch is run sample by sample.
It computes in 32-bit floats here; its 16-bit modes are off.

A network of 8-bit integers computes what it is rounded to, but in float: roundings become
arithmetic, and weights are written as floats. ncnn's own integer layers need scales of another
form, which this file does not make. Expect the same outputs, and neither smaller files nor speed.
"""

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs
from tersor.core.pieces import InPieces
from tersor.core.runtime import Arrays, Runner, Runtime, Target

_SECONDS = 600
"""pnnx is stopped after."""


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.param`, `model.bin` and `model.json`, which holds the names and shapes.

    Raises:
        TargetError: more than one sample, or an operator that ncnn does not have.
    """
    from tersor.ops.onnx_plain import described, plain

    fed, made = described(net.graph.input, net), described(net.graph.output, net)
    for each in fed:
        if not each["shape"] or each["shape"][0] != 1:
            raise TargetError(
                f"ncnn takes one sample at a time, and input {each['name']!r} has the shape "
                f"{tuple(each['shape'])}; export the network with a batch of 1"
            )
    with tempfile.TemporaryDirectory(prefix="tersor-") as aside:
        source = Path(aside) / "model.onnx"
        source.write_bytes(plain(net).SerializeToString(deterministic=True))
        log = _converted(source)
        text, weights = source.with_name("model.ncnn.param"), source.with_name("model.ncnn.bin")
        if not text.is_file() or not weights.is_file():
            raise TargetError(f"pnnx cannot convert the network: {log}")
        _refuse_unknown(text.read_text(encoding="utf-8"))
        files = [folder / "model.param", folder / "model.bin", folder / "model.json"]
        files[0].write_bytes(text.read_bytes())
        files[1].write_bytes(weights.read_bytes())
    about = {"inputs": fed, "outputs": made}
    files[2].write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    del inputs
    return files


def load(path: Path, target: Target) -> Runner:
    """Load the network.

    Raises:
        TargetError: a file is damaged.
    """
    import ncnn

    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        inputs = {str(each["name"]): np.dtype(each["dtype"]) for each in about["inputs"]}
        outputs = {str(each["name"]): tuple(each["shape"]) for each in about["outputs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{path.with_suffix('.json').name} is damaged: {error}") from error
    net = ncnn.Net()
    net.opt.num_threads = target.threads or usable_cores()
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise TargetError(f"ncnn cannot load {path.name}; export the network again")
    return InPieces(_Runner(net, inputs, outputs), 1)


class _Runner:
    """A loaded network; pnnx calls its inputs in0, in1 ... and its outputs out0, out1 ..."""

    def __init__(
        self, net: Any, inputs: dict[str, np.dtype[Any]], outputs: dict[str, tuple[int, ...]]
    ) -> None:
        self.net, self.inputs, self.outputs = net, inputs, outputs

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import ncnn

        bound = []
        for name, kind in self.inputs.items():
            # ncnn has 32-bit numbers only
            array = np.asarray(inputs[name][0], np.int32 if kind.kind in "iub" else np.float32)
            bound.append(ncnn.Mat(np.ascontiguousarray(array)).clone())

        def call() -> Arrays:
            runs = self.net.create_extractor()
            for i, each in enumerate(bound):
                runs.input(f"in{i}", each)
            made = {}
            for i, (name, shape) in enumerate(self.outputs.items()):
                failed, out = runs.extract(f"out{i}")
                if failed:
                    raise TargetError(f"ncnn failed to compute {name!r} (code {failed})")
                made[name] = np.array(out).reshape(shape)
            return made

        return call

    def close(self) -> None:
        self.net.clear()


def _converted(source: Path) -> str:
    """Run pnnx beside the file; return the last line that it printed."""
    spec = importlib.util.find_spec("pnnx")
    assert spec is not None
    assert spec.origin is not None
    program = Path(spec.origin).with_name("pnnx")
    try:
        done = subprocess.run(
            [str(program), source.name, "fp16=0"],
            cwd=source.parent,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetError(f"pnnx cannot be run: {error}") from error
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"it ended with exit code {done.returncode}"


def _refuse_unknown(text: str) -> None:
    """Refuse what pnnx left as it was because ncnn has no layer for it."""
    import ncnn

    for line in text.splitlines()[2:]:
        kind, name = line.split()[:2]
        if ncnn.layer_to_index(kind) < 0:
            raise TargetError(
                f"ncnn has no operator {kind!r} (layer {name!r}); choose another target, or change "
                "that part of the network"
            )


RUNTIME = Runtime(
    takes="onnx",
    devices=("cpu",),
    export=export,
    load=load,
    fixed_batch=True,
    to_export=("ncnn", "pnnx", "onnx", "onnxscript"),
    to_run=("ncnn",),
)
