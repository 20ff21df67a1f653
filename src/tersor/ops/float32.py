"""A layer that computes in float32 where PyTorch's autocast computes the network in 16 bits."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class InFloat32(nn.Module):
    """Takes what its layer takes, and computes in float32; what comes after is cast again.

    Args:
        device: Type of the device that autocast is for: cpu or cuda.
        layer: What computes; None: it is added later.
    """

    device: str
    nothing: Tensor

    def __init__(self, device: str = "cpu", layer: nn.Module | None = None) -> None:
        super().__init__()
        self.device = device
        self.register_buffer("nothing", torch.zeros(1))
        if layer is not None:
            self.layer: nn.Module = layer

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments; the layer is described by itself."""
        return {"device": self.device}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Apply the layer."""
        inputs, named = tree_map(self._widened, (inputs, named))
        with torch.autocast(self.device, enabled=False):
            return self.layer(*inputs, **named)

    def _widened(self, x: Any) -> Any:
        # torch.export leaves out a cast of what is float32 already, as it is without autocast
        return x + self.nothing if isinstance(x, Tensor) and x.is_floating_point() else x
