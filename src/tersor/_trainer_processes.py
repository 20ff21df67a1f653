"""Training in several processes, one for each device: batches are sharded, gradients averaged.

Every process runs the same program on the same batches and takes its share of the rows of each;
what they compute together is the step of the whole batch. `torchrun` starts them:

    torchrun --nproc-per-node 2 train.py
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tersor.core.context import Batch
from tersor.core.errors import StepError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Those that train together; one process alone does nothing here."""

    rank: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.count == 1

    def share(self, batch: Batch) -> Batch | None:
        """Return this process's rows of a batch; None where there are too few for it."""
        if self.alone:
            return batch
        rows = num_rows(batch)
        start, stop = (rows * at // self.count for at in (self.rank, self.rank + 1))
        if start == stop:
            return None
        return {
            name: value[start:stop] if value.dim() and len(value) == rows else value
            for name, value in batch.items()
        }

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place, with one message for each type."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in () if self.alone else tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor.detach())
        for own in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in own])
            for tensor, part in zip(own, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def average_buffers(self, net: nn.Module) -> None:
        """Make statistics that each process took from its own rows those of all."""
        if self.alone:
            return
        buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
        self.add(buffers)
        for buffer in buffers:
            buffer.div_(self.count)

    def agree(self, what: str, mine: object) -> None:
        """Make sure that all processes hold the same.

        Raises:
            StepError: they do not; in every process.
        """
        if self.alone:
            return
        found: list[object] = [None] * self.count
        dist.all_gather_object(found, mine)
        differing = [rank for rank, other in enumerate(found) if other != found[0]]
        if differing:
            raise StepError(
                f"process {differing[0]} of {self.count} has {what} other than process 0; all must "
                "be given the same network, batches, settings and checkpoint"
            )

    def gathered(self, mine: Tensor) -> list[Tensor]:
        """Return a tensor of every process, by rank."""
        if self.alone:
            return [mine]
        found: list[Tensor] = [torch.empty(0)] * self.count
        dist.all_gather_object(found, mine)
        return found


def num_rows(batch: Batch) -> int:
    """Count the samples of a batch."""
    return next((len(value) for value in batch.values() if value.dim()), 1)


def num_started() -> int:
    """Count the processes that were started together, this one included."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def together(device: torch.device) -> Iterator[Processes]:
    """Join the processes that were started together: a group of the user's own, or torchrun's."""
    if dist.is_available() and dist.is_initialized():
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size())
        return
    if num_started() == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch whose tensors are where the network is."""
    if device.type == "cpu":
        return batch
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def weights_of(batches: Iterable[Batch]) -> list[float]:
    """Return each batch's share of all samples."""
    sizes = [num_rows(batch) for batch in batches]
    return [size / sum(sizes) for size in sizes]
