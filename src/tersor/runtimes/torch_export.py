"""PyTorch, from an exported program (`.pt2`).

Options, beside `threads` and `precision`: `channels_last` lays tensors out as convolutions often
run fastest. On CUDA devices `cudnn_autotune` has cuDNN time its algorithms, `cuda_graphs` replays
each bound call as one captured graph, and `stream` runs on a stream of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.core import plugins
from tersor.core.errors import ModelError, TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Runner, Runtime, Signature, Target
from tersor.ops.cuda_device import present


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.pt2`, without example inputs."""
    del inputs
    import torch

    file = folder / "model.pt2"
    net._example_inputs = None
    torch.export.save(net, file)
    return [file]


def inputs(path: Path) -> Mapping[str, Signature]:
    """Read names, shapes and types after our own check of the file.

    Raises:
        ModelError: it is damaged, or reading it would run code.
    """
    inputs = plugins.source("exported").load(str(path)).inputs
    assert inputs is not None
    return {
        name: Signature(
            shape=tuple(inputs.dynamic.get(name, {}).get(i, n) for i, n in enumerate(t.shape)),
            dtype=str(t.dtype).removeprefix("torch."),
            usual=tuple(t.shape),
        )
        for name, t in inputs.example.items()
    }


def load(path: Path, target: Target) -> Runner:
    """Read the program after our own check of the file."""
    from tersor.ops import pt2, torch_runner

    try:
        program = pt2.read(path)
    except ModelError as error:
        raise TargetError(str(error)) from error
    spec = program.call_spec.in_spec
    names = list(spec.child(1).context) if spec is not None else []
    return torch_runner.TorchRunner(program.module(), names, target)


RUNTIME = Runtime(
    takes="exported",
    devices=("cpu", "cuda"),
    export=export,
    load=load,
    present=present,
    inputs=inputs,
    suffixes=(".pt2",),
    native=False,
    options=(
        "threads",
        "precision",
        "channels_last",
        "cudnn_autotune",
        "cuda_graphs",
        "stream",
    ),
    autocasts=True,
    weights=("fp8_e4m3", "fp8_e5m2"),
    own_operators=True,
    to_export=("torch",),
    to_run=("torch",),
)
