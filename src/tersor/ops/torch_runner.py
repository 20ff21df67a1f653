"""A runner over a network in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.errors import TargetError
from tersor.core.hardware import usable_cores
from tersor.core.runtime import Arrays, Target

_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRunner:
    """Calls a network under inference mode with its own number of threads and its precision."""

    threads: int
    device: torch.device
    net: nn.Module
    names: list[str]
    autocast: torch.dtype | None

    def __init__(self, net: nn.Module, names: Sequence[str], target: Target) -> None:
        self.threads = target.threads or usable_cores()
        self.device = torch.device(target.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TargetError("this PyTorch finds no CUDA device; use :cpu")
        self.net = net.to(self.device)
        self.names = list(names)
        precision = str(target.options.get("precision", "fp32"))
        if precision not in _TYPES:
            raise TargetError(
                f"torch has no precision {precision!r}; use one of {', '.join(_TYPES)}"
            )
        self.autocast = _TYPES[precision]

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        """Copy `inputs` to the device."""
        bound = {
            n: torch.from_numpy(np.array(inputs[n])).to(self.device)
            for n in self.names
            if n in inputs
        }

        def call() -> Arrays:
            before = torch.get_num_threads()
            if before != self.threads:
                torch.set_num_threads(self.threads)
            try:
                with torch.inference_mode(), self._precision():
                    made = self.net(**bound)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
            finally:
                if before != self.threads:
                    torch.set_num_threads(before)
            return _arrays(made)

        return call

    def close(self) -> None:
        """Free the network."""
        del self.net

    def _precision(self) -> Any:
        return torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )


def _arrays(made: Any) -> dict[str, np.ndarray]:
    """Name the outputs: the keys of a mapping, else output, output_1 ..."""
    if isinstance(made, Tensor):
        return {
            "output": made.float().cpu().numpy() if made.is_floating_point() else made.cpu().numpy()
        }
    if isinstance(made, Mapping):
        return {key: _arrays(value)["output"] for key, value in made.items()}
    return {f"output_{i}" if i else "output": _arrays(v)["output"] for i, v in enumerate(made)}
