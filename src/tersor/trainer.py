"""The default trainer: a schedule, mixed precision where it pays, checkpoints to resume from."""

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor import _trainer_checkpoint as checkpoints
from tersor._trainer_optimizer import (
    DEFAULTS,
    Average,
    choose_optimizer,
    make_optimizer,
    set_rate,
)
from tersor._trainer_processes import (
    Processes,
    num_rows,
    num_started,
    to_device,
    together,
    weights_of,
)
from tersor.core.context import Batch, Loss, Track, silent
from tersor.core.errors import DataError, StepError, TargetError
from tersor.core.hardware import usable_cores
from tersor.core.training import Device, Optimizer, Precision, Training
from tersor.ops.fake_quantize import late
from tersor.ops.losses import call, first_output
from tersor.ops.precision import channels_last, gains_from_bf16

_PROBES = 3
"""Steps that are timed with each number of threads."""
_LEAST_SCALE = 1.0
"""A loss that still overflows float16 with this factor is not finite in earnest."""


def fit(
    net: nn.Module,
    loss: Loss,
    *,
    batches: Iterable[Batch],
    epochs: float,
    lr: float | None = None,
    groups: Any = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    optimizer: Optimizer = "auto",
    decay: float | None = None,
    clip: float | None = None,
    warm_up: float = 0.05,
    ema: float = 0.0,
    accumulate: int = 1,
    precision: Precision = "auto",
    device: Device = "cpu",
    threads: int = 0,
    checkpoint_every_s: float = 60.0,
    display: Track = silent,
    should_stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train `net` to a lower `loss`; the learning rate warms up and falls along a cosine.

    The same seed and number of threads give the same bytes on a CPU, also when a run was stopped
    and resumed from its checkpoint. Where `batches` has an attribute `seed` it is set to seed +
    epoch for each pass, so that augmentation differs between passes, and restored at the end.

    Where several processes run it together (a torch.distributed group, or torchrun), each takes its
    rows of every batch, gradients are averaged, and the first one writes the checkpoints.

    Args:
        net: Trained in place; parameters that do not require a gradient stay.
        loss: (network, batch) -> scalar, the mean over the batch's samples.
        batches: Re-iterable.
        epochs: Passes over `batches`; 0.25 is a quarter of them.
        lr: Peak learning rate; by default 0.02 for SGD, 5e-4 for AdamW.
        groups: Parameter groups as torch.optim takes them; by default all of `net`, without weight
            decay on vectors (norms, biases).
        seed: Decides dropout and the order of batches.
        checkpoint: A file, written every epoch and every `checkpoint_every_s` seconds. If it holds
            a state of this very run, training goes on from there.
        on_step: Called after each step with the number of steps done, and of all.
        optimizer: This and the next seven as in `core.training.Training`, with which a recipe gives
            them. "auto": SGD where most parameters are convolutions', else AdamW.
        decay: Weight decay of matrices and kernels.
        clip: Largest norm of the gradient.
        warm_up: Share of the steps in which the learning rate rises.
        ema: Decay of a running average of the weights; 0: none.
        accumulate: Batches whose gradients are averaged for one step.
        precision: Of forward passes.
        device: Where training runs.
        threads: 0: all usable cores.
        checkpoint_every_s: Seconds between checkpoints inside an epoch.
        display: Progress, with the loss.
        should_stop: Asked after each step where there is a `checkpoint`.

    Returns:
        `net`, in eval mode, on the CPU; with `ema`, the average of its weights.

    Raises:
        DataError: no batches.
        TargetError: there is no such device.
        StepError: loss or gradient is not finite (`net` keeps the weights of the step before, and
            the checkpoint is that of an earlier step), or a checkpoint cannot be read or written.
        KeyboardInterrupt: `should_stop` said so; the checkpoint is that of this very step.
    """
    settings = Training(
        optimizer=optimizer,
        decay=decay,
        clip=clip,
        warm_up=warm_up,
        ema=ema,
        accumulate=accumulate,
        precision=precision,
        device=device,
    )
    if epochs < 0:
        raise StepError(f"epochs must not be negative, got {epochs}")
    place = _place(settings)
    per_epoch = _count(batches)
    num_batches = math.ceil(epochs * per_epoch - 1e-9)
    num_steps = math.ceil(num_batches / accumulate)
    kind = choose_optimizer(net) if optimizer == "auto" else optimizer
    low = _low_precision(net, settings)
    with (
        _threads(threads),
        _reproducible(seed, batches, place),
        channels_last(net, low == torch.bfloat16),
        together(place) as processes,
    ):
        net.to(place).train()
        made = make_optimizer(net, kind, settings, lr, groups)
        scaler = torch.amp.GradScaler(place.type, enabled=low == torch.float16)
        average = Average(net, ema) if ema else None
        moving = checkpoints.Moving(net=net, optimizer=made, scaler=scaler, average=average)
        decides = (kind, num_batches, seed, str(low), settings, processes.count)
        run = checkpoints.fingerprint(net, made, *decides)
        step = 0
        if checkpoint:
            step = checkpoints.restore(checkpoint, run, moving, processes.rank, place)
        processes.agree("a network, settings or a checkpoint", (run, step))
        job = _Job(
            loss=loss,
            moving=moving,
            clip=DEFAULTS[kind]["clip"] if clip is None else clip,
            low=low,
            processes=processes,
            place=place,
        )
        try:
            source = _batches(batches, per_epoch, step * accumulate, num_batches, seed)
            steps = _grouped(source, accumulate)
            last_saved = time.monotonic()
            for group in display(steps, job.told, num_steps - step):
                set_rate(made, step, num_steps, warm_up)
                waited = time.monotonic() - last_saved > checkpoint_every_s
                stop = checkpoint is not None and should_stop()
                late_now, stop_now = job.step(group, step, (waited, stop))
                step += 1
                if on_step:
                    on_step(step, num_steps)
                if average is not None:
                    average.update(net, step)
                before, done = ((s * accumulate) // per_epoch for s in (step - 1, step))
                due = step == num_steps or done > before or late_now or stop_now
                if checkpoint and due:
                    randoms = processes.gathered(checkpoints.random_state(place))
                    if processes.rank == 0:
                        checkpoints.write(checkpoint, run, moving, step, randoms)
                    last_saved = time.monotonic()
                if stop_now and step < num_steps:
                    raise KeyboardInterrupt
            if average is not None:
                average.put(net)
        finally:
            net.eval()
            made.zero_grad(set_to_none=True)
            net.to("cpu")
    return net


@dataclass(kw_only=True)
class _Job:
    """What every step of a training needs, and the loss it came to."""

    loss: Loss
    moving: checkpoints.Moving
    clip: float
    low: torch.dtype | None
    processes: Processes
    place: torch.device
    last: float = math.nan

    def told(self) -> str:
        """Say what is under way, for a display."""
        return "training" if math.isnan(self.last) else f"training, loss {self.last:.4g}"

    def step(
        self, batches: Sequence[Batch], step: int, asked: tuple[bool, bool]
    ) -> tuple[bool, bool]:
        """Descend once on the mean loss of some batches.

        Args:
            batches: Of this step.
            step: Its number.
            asked: Whether this process finds that a checkpoint is due, and that it is to stop.

        Returns:
            The same of all processes: whether any does.

        Raises:
            StepError: loss or gradient is not finite; the weights are those before.
        """
        optimizer, scaler = self.moving.optimizer, self.moving.scaler
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(3, device=self.place, dtype=torch.float64)
        for batch, weight in zip(batches, weights_of(batches), strict=True):
            own = self.processes.share(batch)
            if own is None:
                continue
            part = weight * num_rows(own) / num_rows(batch)
            with torch.autocast(self.place.type, self.low, enabled=self.low is not None):
                value = self.loss(self.moving.net, to_device(own, self.place)).float()
            total[0] += value.detach() * part
            if not torch.isfinite(value) and self.processes.alone:
                break
            torch.autograd.backward(scaler.scale(value if part == 1 else value * part))
        total[1], total[2] = map(float, asked)
        self.processes.add([total])
        self.last = total[0].item()
        if not math.isfinite(self.last):
            raise _not_finite("loss", self.last, step)
        self._descend(step)
        self.processes.average_buffers(self.moving.net)
        return total[1].item() > 0, total[2].item() > 0

    def _descend(self, step: int) -> None:
        """Move the weights along the gradient; with a scaled loss, skip a step that overflows."""
        optimizer, scaler = self.moving.optimizer, self.moving.scaler
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not self.processes.alone:
            for p in parameters:
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
            self.processes.add([p.grad for p in parameters if p.grad is not None])
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        if not torch.isfinite(norm) and scaler.get_scale() <= _LEAST_SCALE:
            raise _not_finite("gradient", norm.item(), step)
        scaler.step(optimizer)
        scaler.update()


def check_alone() -> None:
    """Refuse to decide by a stopwatch in several processes, which would each decide otherwise.

    Raises:
        TargetError: this is one of several processes.
    """
    count = num_started()
    if count > 1:
        raise TargetError(
            f"compress is one of {count} processes, and its verdicts are timings: run it alone. To "
            "train in several processes call tersor.trainer.fit in each, and compress the result"
        )


def choose_threads(net: nn.Module, batches: Iterable[Batch]) -> int:
    """Measure with how many threads a step of this network is fastest here.

    Cores that are halves of one, or shared with others, often make two threads slower than one.

    Args:
        net: The network to be trained; a copy is timed.
        batches: The first one is used.

    Returns:
        One of 1, half and all of the usable cores; what OMP_NUM_THREADS says, where it is set.
    """
    cores = _usable_cores()
    if cores == 1 or os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return cores
    batch = next(iter(batches))
    copied = copy.deepcopy(net)
    low = gains_from_bf16(copied)
    seconds: dict[int, float] = {}
    with torch.random.fork_rng(devices=[]), channels_last(copied, low):
        copied.train()
        for threads in sorted({1, max(1, cores // 2), cores}):
            with _threads(threads):
                times = [_seconds_a_step(copied, batch, low) for _ in range(_PROBES)]
            seconds[threads] = min(times[1:])
    return min(seconds, key=lambda threads: seconds[threads])


def _seconds_a_step(net: nn.Module, batch: Batch, low: bool) -> float:
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        value = first_output(call(net, batch)).float().square().mean()
    torch.autograd.backward(value)
    net.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def _not_finite(what: str, value: float, step: int) -> StepError:
    return StepError(
        f"the {what} is {value} at training step {step + 1}; the weights from before this step are "
        "kept. Lower the learning rate, or look for NaN in the data"
    )


# --- devices, precisions ------------------------------------------------------------------------


def _place(settings: Training) -> torch.device:
    """Return the device; of several processes on one machine, each has its own.

    Raises:
        TargetError: it is not there.
    """
    if settings.device == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if not found:
        raise TargetError(
            "training on 'cuda' was asked for, but PyTorch sees no such device here; use device: "
            "cpu, or a PyTorch that is built for CUDA"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % found)


def _low_precision(net: nn.Module, settings: Training) -> torch.dtype | None:
    """Return the format of forward passes; None: float32."""
    if settings.precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    if settings.device == "cuda":
        # not while rounding is trained: float16 has too few bits for the codes
        return torch.float16 if late(net) is None else None
    return torch.bfloat16 if gains_from_bf16(net) else None


# --- batches ------------------------------------------------------------------------------------


def _count(batches: Iterable[Batch]) -> int:
    try:
        count = len(batches)  # type: ignore[arg-type]  # many have a length; the others are counted
    except TypeError:
        count = sum(1 for _ in batches)
    if not count:
        raise DataError("there are no batches to train on")
    return count


def _batches(
    batches: Iterable[Batch], per_epoch: int, start: int, stop: int, seed: int
) -> Iterator[Batch]:
    """Yield the batches start .. stop, pass by pass."""
    at = start
    while at < stop:
        epoch, done = divmod(at, per_epoch)
        if hasattr(batches, "seed"):
            batches.seed = seed + epoch
        state = torch.get_rng_state()
        # batches that draw from torch's own generator must find it as it was when the pass began
        torch.manual_seed(seed + epoch)
        source = iter(batches)
        for _ in range(done):
            next(source, None)
        if done:
            torch.set_rng_state(state)
        before = at
        for batch in itertools.islice(source, min(per_epoch - done, stop - at)):
            yield batch
            at += 1
        if at == before:
            raise DataError(f"pass {epoch + 1} over the batches ended after {done} of {per_epoch}")


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield the batches of one step after another."""
    while group := list(itertools.islice(batches, size)):
        yield group


# --- threads, seeds ------------------------------------------------------------------------------


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or _usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _usable_cores() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return usable_cores()


@contextmanager
def _reproducible(seed: int, batches: Any, place: torch.device) -> Iterator[None]:
    """Seed torch inside; outside, its generators and `batches.seed` are as they were."""
    own_seed = getattr(batches, "seed", None)
    with torch.random.fork_rng(devices=[] if place.type == "cpu" else [place]):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if hasattr(batches, "seed"):
                batches.seed = own_seed
