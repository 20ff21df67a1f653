"""PyTorch, one operator at a time, from data: graph and weights, no class, no pickle.

Options, beside `threads` and `precision`: `channels_last` lays tensors out as convolutions often
run fastest. On CUDA devices `cudnn_autotune` has cuDNN time its algorithms, `cuda_graphs` replays
each bound call as one captured graph, and `stream` runs on a stream of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersor.core.model import Inputs
from tersor.core.runtime import Runner, Runtime, Target
from tersor.ops.cuda_device import present


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `network.json` and `weights.safetensors`."""
    from torch import nn

    from tersor.ops import capture, edits

    captured = capture.capture(net, inputs)
    edits.store(captured, nn.Module(), folder)
    return [folder / "network.json", folder / "weights.safetensors"]


def load(path: Path, target: Target) -> Runner:
    """Build the graph again."""
    from torch.fx import GraphModule

    from tersor.ops import edits, torch_runner

    net = edits.replay(path.parent, None)
    assert isinstance(net, GraphModule)
    names = [str(node.target) for node in net.graph.nodes if node.op == "placeholder"]
    return torch_runner.TorchRunner(net, names, target)


RUNTIME = Runtime(
    takes="module",
    devices=("cpu", "cuda"),
    export=export,
    load=load,
    present=present,
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
    to_export=("torch", "safetensors"),
    to_run=("torch", "safetensors"),
)
