"""The default trainer: a schedule, mixed precision where it pays, checkpoints to resume from."""

import copy
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.context import Batch, Loss, Track, silent
from tersor.core.errors import DataError, StepError
from tersor.core.hardware import usable_cores
from tersor.ops.losses import call, first_output
from tersor.ops.precision import channels_last, gains_from_bf16

_log = logging.getLogger("tersor")
_DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.02, "decay": 5e-4, "clip": 5.0},
    "adamw": {"lr": 5e-4, "decay": 0.02, "clip": 1.0},
}
"""Settings that recover trained networks; `decay` acts on matrices and kernels only."""
_WARM_UP = 0.05
_PROBES = 3
"""Share of the steps in which the learning rate rises."""


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
    optimizer: Literal["auto", "sgd", "adamw"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    threads: int = 0,
    checkpoint_every_s: float = 60.0,
    display: Track = silent,
) -> nn.Module:
    """Train `net` to a lower `loss`; the learning rate warms up and falls along a cosine.

    The same seed and number of threads give the same bytes, also when a run was stopped and resumed
    from its checkpoint. Where `batches` has an attribute `seed` it is set to seed + epoch for each
    pass, so that augmentation differs between passes, and restored at the end.

    Args:
        net: Trained in place; parameters that do not require a gradient stay.
        loss: (network, batch) -> scalar.
        batches: Re-iterable.
        epochs: Passes over `batches`; 0.25 is a quarter of them.
        lr: Peak learning rate; by default 0.02 for SGD, 5e-4 for AdamW.
        groups: Parameter groups as torch.optim takes them; by default all of `net`, without weight
            decay on vectors (norms, biases).
        seed: Decides dropout and the order of batches.
        checkpoint: A file, written every epoch and every `checkpoint_every_s` seconds. If it holds
            a state of this very run, training goes on from there.
        on_step: Called after each step with the number of steps done, and of all.
        optimizer: "auto": SGD where most parameters are convolutions', else AdamW.
        precision: Of forward passes; "auto": bfloat16 where this processor computes with it and the
            network is one that gains.
        threads: 0: all usable cores.
        checkpoint_every_s: Seconds between checkpoints inside an epoch.
        display: Progress.

    Returns:
        `net`, in eval mode.

    Raises:
        DataError: no batches.
        StepError: loss or gradient is not finite (`net` keeps the weights of the step before), or
            the checkpoint cannot be read.
    """
    if epochs < 0:
        raise StepError(f"epochs must not be negative, got {epochs}")
    per_epoch = _count(batches)
    num_steps = math.ceil(epochs * per_epoch - 1e-9)
    kind = _choose_optimizer(net) if optimizer == "auto" else optimizer
    low = precision == "bf16" or (precision == "auto" and gains_from_bf16(net))
    with _threads(threads), _reproducible(seed, batches), channels_last(net, low):
        net.train()
        made = _make_optimizer(net, kind, lr, groups)
        run = _fingerprint(net, kind, made, num_steps, seed, low)
        step = _restore(checkpoint, run, net, made) if checkpoint else 0
        try:
            steps = _batches(batches, per_epoch, step, num_steps, seed)
            last_saved = time.monotonic()
            for batch in display(steps, "training", num_steps - step):
                _set_rate(made, step, num_steps)
                _step(net, loss, batch, made, kind, low, step)
                step += 1
                if on_step:
                    on_step(step, num_steps)
                late = time.monotonic() - last_saved > checkpoint_every_s
                if checkpoint and (step == num_steps or step % per_epoch == 0 or late):
                    _save(checkpoint, run, net, made, step)
                    last_saved = time.monotonic()
        finally:
            net.eval()
            made.zero_grad(set_to_none=True)
    return net


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


def _step(
    net: nn.Module,
    loss: Loss,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    kind: str,
    low: bool,
    step: int,
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        value = loss(net, batch)
    optimizer.zero_grad(set_to_none=True)
    if not torch.isfinite(value):
        raise _not_finite("loss", value.item(), step)
    torch.autograd.backward(value.float())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, _DEFAULTS[kind]["clip"])
    if not torch.isfinite(norm):
        raise _not_finite("gradient", norm.item(), step)
    optimizer.step()


def _not_finite(what: str, value: float, step: int) -> StepError:
    return StepError(
        f"the {what} is {value} at training step {step + 1}; the weights from before this step are "
        "kept. Lower the learning rate, or look for NaN in the data"
    )


def _choose_optimizer(net: nn.Module) -> Literal["sgd", "adamw"]:
    total = sum(p.numel() for p in net.parameters())
    inside = sum(p.numel() for m in net.modules() if isinstance(m, _ConvNd) for p in m.parameters())
    return "sgd" if 2 * inside > total else "adamw"


def _make_optimizer(
    net: nn.Module, kind: str, lr: float | None, groups: Any
) -> torch.optim.Optimizer:
    defaults = _DEFAULTS[kind]
    rate = defaults["lr"] if lr is None else lr
    if groups is None:
        trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": defaults["decay"]},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
    made: torch.optim.Optimizer
    if kind == "sgd":
        made = torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)
    else:
        made = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98))
    for group in made.param_groups:
        group["peak"] = group["lr"]
    return made


def _set_rate(optimizer: torch.optim.Optimizer, step: int, num_steps: int) -> None:
    warm_up = max(1, int(_WARM_UP * num_steps))
    share = min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


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
    """Yield the batches of steps start .. stop, pass by pass."""
    step = start
    while step < stop:
        epoch, done = divmod(step, per_epoch)
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
        before = step
        for batch in itertools.islice(source, min(per_epoch - done, stop - step)):
            yield batch
            step += 1
        if step == before:
            raise DataError(f"pass {epoch + 1} over the batches ended after {done} of {per_epoch}")


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
def _reproducible(seed: int, batches: Any) -> Iterator[None]:
    """Seed torch inside; outside, its generator and `batches.seed` are as they were."""
    own_seed = getattr(batches, "seed", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if hasattr(batches, "seed"):
                batches.seed = own_seed


# --- checkpoints ---------------------------------------------------------------------------------


def _fingerprint(
    net: nn.Module, kind: str, optimizer: torch.optim.Optimizer, steps: int, seed: int, low: bool
) -> str:
    """Hash what decides a run, with every starting weight."""
    digest = hashlib.sha256()
    rates = [(g["peak"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    digest.update(repr((kind, rates, steps, seed, low, torch.__version__)).encode())
    for name, tensor in net.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _save(
    path: Path, run: str, net: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write the state aside and rename it, so that the file is whole or the one before."""
    tensors = {f"net.{k}": v for k, v in _state(net).items()}
    tensors["rng"] = torch.get_rng_state()
    numbers: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    about = {"run": run, "step": str(step), "numbers": json.dumps(numbers)}
    raw = save({k: v.detach().contiguous().clone() for k, v in tensors.items()}, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _state(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those outside the state dict, too; shared ones once."""
    return dict([*net.named_parameters(), *net.named_buffers()])


def _restore(path: Path, run: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the state of the same run, if `path` holds one; return the steps done."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, str] = file.metadata() or {}
            if about.get("run") != run:
                _log.info("%s belongs to another run; training starts anew", path.name)
                return 0
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise StepError(
            f"checkpoint {path.name!r} cannot be read ({error}); delete it to start anew"
        ) from error
    with torch.no_grad():
        for name, tensor in _state(net).items():
            tensor.copy_(tensors[f"net.{name}"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, field = key.split(".", 2)
            state.setdefault(int(index), {})[field] = value
    for key, number in json.loads(about["numbers"]).items():
        index, field = key.split(".", 1)
        state.setdefault(int(index), {})[field] = number
    plain = optimizer.state_dict()
    optimizer.load_state_dict({**plain, "state": state})
    torch.set_rng_state(tensors["rng"])
    return int(about["step"])
