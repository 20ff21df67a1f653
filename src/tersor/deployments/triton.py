"""A model repository for the Triton Inference Server.

OUT is the repository: OUT/NAME/config.pbtxt, and OUT/NAME/1 with the model. Names, types and sizes
are those that the artifact was seen to take and give; where the batch is free, Triton puts requests
together. Artifacts of `onnxruntime` and `openvino` are run by Triton's back ends of these names,
those of `torchscript` by its PyTorch one, which wants outputs to be called NAME__0, NAME__1 ...;
with `backend: python` those of `onnxruntime` are run by a short program in Triton's Python back
end, for servers that have no other; numpy and onnxruntime must be installed there. Weights of 4
bits are computed as ONNX Runtime does by default in its own back end, which may round activations;
the Python one computes as tersor measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tersor.core.artifact import Artifact
from tersor.core.deployment import Deployment
from tersor.core.errors import TargetError
from tersor.deployments._triton_repository import NAME, Serving, write_repository

_BACKENDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torchscript": "pytorch"}


@dataclass(frozen=True, kw_only=True)
class Triton:
    """Settings of `triton`."""

    name: str = "net"
    """What clients call the model."""
    backend: Literal["auto", "python"] = "auto"
    """What runs it: the back end of the artifact's runtime, or the Python one."""
    max_batch: int = 8
    """Most samples computed together, where the batch is free; 0: requests stay alone."""
    instances: int = 1
    """How many copies run beside each other."""
    delay_us: int = 100
    """Microseconds that a request may wait for others; 0: requests are not put together."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {self.name!r}")
        for field in ("max_batch", "delay_us"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        if self.instances < 1:
            raise ValueError(f"instances must be at least 1, got {self.instances}")


def write(artifact: Artifact, folder: Path, options: Triton) -> None:
    """Write the model repository."""
    runtime = artifact.target.runtime
    if options.backend == "python" and runtime != "onnxruntime":
        raise TargetError(
            f"backend 'python' runs artifacts of onnxruntime, not of {runtime}; leave it out or "
            "compress with --target onnxruntime"
        )
    serving = Serving(
        name=options.name,
        backend=_BACKENDS[runtime] if options.backend == "auto" else options.backend,
        max_batch=options.max_batch,
        instances=options.instances,
        delay_us=options.delay_us,
    )
    write_repository(artifact, folder, serving)


DEPLOYMENT = Deployment(
    runtimes=tuple(_BACKENDS),
    options=Triton,
    write=write,
    check="tritonserver --model-repository=$PWD",
)
