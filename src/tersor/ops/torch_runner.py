"""A runner over a network in PyTorch."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.errors import TargetError
from tersor.core.hardware import usable_cores
from tersor.core.runtime import Arrays, Target
from tersor.ops.cuda_device import present

_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SWITCHES = ("channels_last", "cudnn_autotune", "cuda_graphs", "stream")
"""Options that are on or off; all but the first need a CUDA device."""
_WARM_UP = 3
"""Calls before a graph is captured, as PyTorch's documentation of CUDA graphs has it: libraries
make their workspaces then."""


class TorchRunner:
    """Calls a network under inference mode with its own number of threads and its precision."""

    threads: int
    device: torch.device
    net: nn.Module
    names: list[str]
    autocast: torch.dtype | None
    switches: frozenset[str]
    """Those of `SWITCHES` that are on."""
    stream: "torch.cuda.Stream | None"

    def __init__(self, net: nn.Module, names: Sequence[str], target: Target) -> None:
        self.threads = target.threads or usable_cores()
        self.switches = _switches(target)
        self.device = torch.device(target.device)
        present(target)
        self.net = net.to(self.device)
        if "channels_last" in self.switches:
            _to_channels_last(self.net)
        self.stream = torch.cuda.Stream() if "stream" in self.switches else None  # type: ignore[no-untyped-call]  # not in the stubs
        self.names = list(names)
        precision = str(target.options.get("precision", "fp32"))
        if precision not in _TYPES:
            raise TargetError(
                f"torch has no precision {precision!r}; use one of {', '.join(_TYPES)}"
            )
        self.autocast = _TYPES[precision]

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        """Copy `inputs` to the device."""
        bound = {n: self._placed(inputs[n]) for n in self.names if n in inputs}
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the copies are there, whichever stream reads them
        compute: Callable[[], Any] = partial(self.net, **bound)
        if "cuda_graphs" in self.switches:
            compute = self._captured(compute)

        def call() -> Arrays:
            before = torch.get_num_threads()
            if before != self.threads:
                torch.set_num_threads(self.threads)
            try:
                with self._around():
                    made = compute()
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
            except RuntimeError as error:
                if "channels_last" in self.switches and "view" in str(error):
                    raise TargetError(
                        "the network reshapes with view(), which tensors with their channels last "
                        "do not allow; leave out the option channels_last, or write reshape()"
                    ) from error
                raise
            finally:
                if before != self.threads:
                    torch.set_num_threads(before)
            return _arrays(made)

        return call

    def close(self) -> None:
        """Free the network."""
        del self.net

    def _placed(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(array)).to(self.device)
        if "channels_last" in self.switches and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        """Compute as the options say."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(
                torch.autocast(
                    self.device.type,
                    self.autocast or torch.bfloat16,
                    enabled=self.autocast is not None,
                    # what a graph captured would read casts that are freed after it
                    cache_enabled="cuda_graphs" not in self.switches,
                )
            )
            if "cudnn_autotune" in self.switches:
                stack.enter_context(_autotuned())
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            yield

    def _captured(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a call's kernels into a graph, which is replayed on the bound inputs."""
        side = self.stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]  # as above
        graph = torch.cuda.CUDAGraph()
        try:
            with self._around():
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP):
                        compute()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, stream=side):
                    made = compute()
        except RuntimeError as error:
            raise TargetError(
                f"the network cannot be captured as a CUDA graph: {str(error).splitlines()[0]}; "
                "leave out the option cuda_graphs"
            ) from error

        def replay() -> Any:
            assert compute is not None  # it holds the inputs that the graph reads
            graph.replay()
            return made

        return replay


@contextlib.contextmanager
def _autotuned() -> Iterator[None]:
    """Let cuDNN time its algorithms for each new shape, and take the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _switches(target: Target) -> frozenset[str]:
    """Read the options that are on or off.

    Raises:
        TargetError: another value, or one that the device cannot honour.
    """
    on = set()
    for name in SWITCHES:
        value = target.options.get(name, False)
        if not isinstance(value, bool):
            raise TargetError(f"option {name} must be true or false, got {value!r}")
        if value and name != "channels_last" and target.device != "cuda":
            raise TargetError(
                f"option {name} needs a CUDA device, this target is {target}; use "
                f"{target.runtime}:cuda or leave it out"
            )
        if value:
            on.add(name)
    return frozenset(on)


def _to_channels_last(net: nn.Module) -> None:
    """Lay out 4-dimensional weights with their channels last."""
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _arrays(made: Any) -> dict[str, np.ndarray]:
    """Name the outputs: the keys of a mapping, else output, output_1 ..."""
    if isinstance(made, Tensor):
        return {
            "output": made.float().cpu().numpy() if made.is_floating_point() else made.cpu().numpy()
        }
    if isinstance(made, Mapping):
        return {key: _arrays(value)["output"] for key, value in made.items()}
    return {f"output_{i}" if i else "output": _arrays(v)["output"] for i, v in enumerate(made)}
