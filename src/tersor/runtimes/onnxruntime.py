"""ONNX Runtime on the CPU (and CUDA where its provider is installed)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs
from tersor.core.runtime import Arrays, Runner, Runtime, Target

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
    # idle threads that spin would disturb whatever is measured beside this session
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # 4-bit weights: compute in fp32, not in int8 with activations quantized on the fly
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise TargetError(f"ONNX Runtime cannot load {path.name}: {_plain(error)}") from error
    return _Runner(session, target.device)


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
    to_export=("onnx", "onnxscript"),
    to_run=("onnxruntime",),
)
