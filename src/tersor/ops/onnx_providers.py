"""Execution providers of ONNX Runtime: the devices it runs on, and what each of them needs."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

from tersor.core.errors import DependencyError, TargetError
from tersor.core.runtime import Target


@dataclass(frozen=True)
class Provider:
    """A way for ONNX Runtime to execute operators."""

    name: str
    brings: str
    """What has it."""
    memory: str = "cpu"
    """Where its tensors lie."""


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "pip install onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", "pip install onnxruntime-gpu", "cuda"),
    "tensorrt": Provider(
        "TensorrtExecutionProvider", "pip install onnxruntime-gpu tensorrt", "cuda"
    ),
    "openvino": Provider("OpenVINOExecutionProvider", "pip install onnxruntime-openvino"),
    "coreml": Provider("CoreMLExecutionProvider", "pip install onnxruntime, on macOS"),
    "xnnpack": Provider(
        "XnnpackExecutionProvider", "ONNX Runtime for Android, or a build with --use_xnnpack"
    ),
    "directml": Provider("DmlExecutionProvider", "pip install onnxruntime-directml, on Windows"),
}
_SHAPES = frozenset(
    (
        "Shape",
        "Size",
        "Gather",
        "Concat",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Cast",
        "Reshape",
        "Range",
    )
)
"""Operators on sizes, which providers leave to the CPU on purpose."""


def available(target: Target) -> Provider:
    """Return the provider that a target's device is.

    Raises:
        DependencyError: this build of ONNX Runtime lacks it; what has it is said.
    """
    import onnxruntime

    provider = PROVIDERS[target.device]
    if provider.name not in onnxruntime.get_available_providers():
        raise DependencyError(
            f"this build of ONNX Runtime {onnxruntime.__version__} has no {provider.name}, which "
            f"the device {target.device!r} is. What has it: {provider.brings}"
        )
    if provider.memory == "cuda":
        # CUDA's libraries, where pip installed them; what is missing shows as the session starts
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    return provider


def provider_options(target: Target, threads: int) -> dict[str, str]:
    """Return the options that a provider is given."""
    if target.device == "xnnpack":
        return {"intra_op_num_threads": str(threads)}
    if target.device == "openvino":
        return {"device_type": "CPU", "num_of_threads": str(threads)}
    if target.options.get("cuda_graphs"):
        cuda = target.device == "cuda"
        return {"enable_cuda_graph" if cuda else "trt_cuda_graph_enable": "1"}
    return {}


def check_placement(session: Any, target: Target) -> None:
    """Refuse a session in which the CPU does what another device was asked to do.

    Args:
        session: Started with `session.record_ep_graph_assignment_info`.
        target: Its options may allow it (`fallback`).

    Raises:
        TargetError: the provider did not start, or lacks operators; they are named.
    """
    if target.device == "cpu":
        return
    wanted = PROVIDERS[target.device]
    if session.get_providers()[0] != wanted.name:
        raise TargetError(
            f"ONNX Runtime could not start {wanted.name} and fell back to "
            f"{session.get_providers()[0]}: its driver or libraries are missing, or do not fit. "
            f"What has it: {wanted.brings}"
        )
    left = [
        node
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"].name
        for node in part.get_nodes()
        if node.op_type not in _SHAPES
    ]
    if left and not target.options.get("fallback"):
        kinds = sorted({node.op_type for node in left})
        raise TargetError(
            f"{len(left)} operators would run on the CPU, such as {left[0].name!r}; "
            f"{target.device} has no {', '.join(kinds[:5])}{' ...' * (len(kinds) > 5)}. Allow it "
            "with the option fallback: true, or choose another device"
        )
