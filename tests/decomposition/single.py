"""Networks of one layer, and a context whose latencies are their weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.context import Context, Data
from tersor.core.model import Inputs
from tests import networks

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "stride": lambda: nn.Conv2d(8, 12, 3, (2, 1), padding=(1, 0), bias=False),
    "dilation": lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), dilation=(2, 1)),
    "kernel": lambda: nn.Conv2d(8, 12, (3, 5), (1, 2), padding=(1, 2)),
    "groups": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
    "same": lambda: nn.Conv2d(8, 12, (3, 5), padding="same"),
    "reflect": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Conv1d(8, 12, 5, 2, padding=2),
    "conv3d": lambda: nn.Conv3d(4, 6, (3, 1, 3), (1, 2, 1), padding=1),
}


class Single(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def single(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """Return a network of one layer, and inputs."""
    torch.manual_seed(0)
    layer = make()
    if isinstance(layer, nn.Linear):
        return Single(layer).eval(), torch.randn(6, 5, layer.in_features)
    size = (6, 7, 8)[-len(layer.kernel_size) :]  # type: ignore[arg-type, attr-defined]
    return Single(layer).eval(), torch.randn(6, layer.in_channels, *size)  # type: ignore[arg-type, attr-defined]


def weights(nets: Sequence[nn.Module]) -> list[float]:
    """Cost networks by their weights."""
    return [sum(p.numel() for p in net.parameters()) / 1000 for net in nets]


def slower(nets: Sequence[nn.Module]) -> list[float]:
    """Let every further layer cost more than its weights could save."""
    return [float(sum(1 for m in net.modules() if hasattr(m, "weight"))) for net in nets]


def context(net: nn.Module, x: Tensor, folder: Path, **changes: Any) -> Context:
    """A context around a network of one layer."""
    given = {
        "inputs": Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}}),
        "data": Data(calibration=[{"x": x}]),
        "latency": weights,
        **changes,
    }
    return networks.context(net, folder, **given)
