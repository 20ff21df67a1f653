"""A SavedModel for TensorFlow Serving: OUT/NAME/1, with the signature serving_default.

The artifact's ONNX file is rebuilt of TensorFlow's operators; names, types and layout of inputs and
outputs stay, and so do quantized weights and the rounding of activations. Computed is in float:
what integers save in time, TensorFlow does not. The SavedModel is loaded again and its outputs are
compared with the artifact's; where they differ by more than `tolerance`, nothing is written.

TensorFlow has an environment of its own: `tersor doctor --create tensorflow_serving`.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core import environments, remote
from tersor.core.artifact import Artifact
from tersor.core.deployment import Deployment
from tersor.core.errors import DependencyError, TargetError
from tersor.deployments._interface import Interface, Port, interface
from tersor.deployments._model_files import copy_model

NAME = "tensorflow_serving"


@dataclass(frozen=True, kw_only=True)
class TensorflowServing:
    """Settings of `tensorflow_serving`."""

    name: str = "net"
    """What clients call the model."""
    version: int = 1
    """Of the model; the server takes the highest one."""
    tolerance: float = 1e-3
    """Largest difference to the artifact's outputs, as a part of the largest of them."""

    def __post_init__(self) -> None:
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"name must be letters, digits, '_' and '-', got {self.name!r}")
        if self.version < 1:
            raise ValueError(f"version must be at least 1, got {self.version}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance:g}")


def write(artifact: Artifact, folder: Path, options: TensorflowServing) -> None:
    """Write the SavedModel, load it, and compare."""
    python = environments.python(NAME)
    if python is None:
        raise DependencyError(
            f"deployment {NAME!r} needs TensorFlow in an environment of its own. Make it with: "
            f"tersor doctor --create {NAME}"
        )
    found = interface(artifact)
    with tempfile.TemporaryDirectory(prefix="tersor-") as aside:
        work = Path(aside)
        (work / "model").mkdir()
        copy_model(artifact, work / "model").rename(work / "network.onnx")
        for other in (work / "model").iterdir():
            other.rename(work / other.name)
        _ask(work, found, python)
        _compare(found, work / "answer.npz", options.tolerance)
        shutil.copytree(work / "saved_model", folder / options.name / str(options.version))


def _ask(work: Path, found: Interface, python: Path) -> None:
    """Let the environment write saved_model/ and answer.npz."""
    np.savez(work / "example.npz", **found.example)  # type: ignore[arg-type]  # names, no options
    request = {
        "inputs": {port.name: _plain(port) for port in found.inputs},
        "outputs": [port.name for port in found.outputs],
    }
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    done = subprocess.run(
        remote.command(python, "saved_model", str(work)),
        capture_output=True,
        text=True,
        check=False,
    )
    if (work / "answer.npz").exists():
        return
    if (work / "answer.json").exists():
        reason = json.loads((work / "answer.json").read_text(encoding="utf-8"))["refused"]
    else:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
    raise TargetError(f"the network cannot be written as a SavedModel: {reason}")


def _plain(port: Port) -> Mapping[str, Any]:
    sizes = [None if isinstance(size, str) else size for size in port.shape]
    return {"dtype": port.dtype, "shape": sizes}


def _compare(found: Interface, answer: Path, tolerance: float) -> None:
    with np.load(answer, allow_pickle=False) as arrays:
        for name, wanted in found.made.items():
            made = arrays[name].astype("float64")
            largest = max(1.0, float(np.abs(wanted).max(initial=0.0)))
            worst = float(np.abs(made - wanted).max(initial=0.0))
            if made.shape != wanted.shape or not worst <= tolerance * largest:
                raise TargetError(
                    f"the SavedModel computes something else: output {name!r} differs by "
                    f"{worst:.3g}, more than tolerance {tolerance:g} of its largest value, "
                    f"{largest:.3g}"
                )


DEPLOYMENT = Deployment(
    runtimes=("onnxruntime",),
    options=TensorflowServing,
    write=write,
    check='tensorflow_model_server --model_name={name} --model_base_path="$PWD/{name}"',
    environment=NAME,
)
