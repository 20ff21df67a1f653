"""Checkpoints of a training: everything that decides the steps to come, in one file.

A checkpoint holds the network, the optimizer, the average of the weights, the scale of the loss and
the state of the random generators of every process, so that a resumed run ends with the same bytes.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tersor._trainer_optimizer import Average, state
from tersor.core import files
from tersor.core.errors import StepError

_log = logging.getLogger("tersor")


@dataclass(frozen=True, kw_only=True)
class Moving:
    """What changes while training."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None


def fingerprint(net: nn.Module, optimizer: torch.optim.Optimizer, *decides: object) -> str:
    """Hash what decides a run, with every starting weight."""
    digest = hashlib.sha256()
    rates = [(g["peak"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    digest.update(repr((rates, decides, torch.__version__)).encode())
    for name, tensor in net.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_state(device: torch.device) -> Tensor:
    """Return the state of the generators that a training draws from, as bytes."""
    own = torch.get_rng_state()
    return own if device.type == "cpu" else torch.cat([own, torch.cuda.get_rng_state(device)])


def _set_random_state(found: Tensor, device: torch.device) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(found[:size])
    if device.type != "cpu":
        torch.cuda.set_rng_state(found[size:], device)


def write(path: Path, run: str, moving: Moving, step: int, randoms: Sequence[Tensor]) -> None:
    """Write the state aside and rename it, so that the file is whole or the one before.

    Raises:
        StepError: it cannot be written; the checkpoint before stays.
    """
    tensors = {f"net.{k}": v for k, v in state(moving.net).items()}
    tensors |= {f"random.{rank}": each for rank, each in enumerate(randoms)}
    if moving.average is not None:
        tensors |= {f"average.{k}": v for k, v in moving.average.tensors.items()}
    numbers: dict[str, Any] = {}
    for index, entries in moving.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    about = {
        "run": run,
        "step": str(step),
        "numbers": json.dumps(numbers),
        "scaler": json.dumps(moving.scaler.state_dict()),
    }
    raw = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in files.left_beside(path, "tmp"):  # by a kill in the middle of writing
            files.unlink(left)
        files.replace_file(path, raw)
    except OSError as error:
        kept = _step_of(path)
        stays = "there is none before it" if kept is None else f"the one of step {kept} stays"
        raise StepError(
            f"the checkpoint of step {step} ({len(raw) / 1e6:.1f} MB) cannot be written to "
            f"{path.name!r}: {error.strerror or error}; {stays}. Make room, then resume"
        ) from error


def _step_of(path: Path) -> int | None:
    """Return the step of the checkpoint that is there, or None."""
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def restore(path: Path, run: str, moving: Moving, rank: int, device: torch.device) -> int:
    """Load the state of the same run, if `path` holds one; return the steps done.

    Raises:
        StepError: the file cannot be read.
    """
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
        for name, tensor in state(moving.net).items():
            tensor.copy_(tensors[f"net.{name}"])
        if moving.average is not None:
            for name, tensor in moving.average.tensors.items():
                tensor.copy_(tensors[f"average.{name}"])
    entries: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, field = key.split(".", 2)
            entries.setdefault(int(index), {})[field] = value
    for key, number in json.loads(about["numbers"]).items():
        index, field = key.split(".", 1)
        entries.setdefault(int(index), {})[field] = number
    plain = moving.optimizer.state_dict()
    moving.optimizer.load_state_dict({**plain, "state": entries})
    moving.scaler.load_state_dict(json.loads(about["scaler"]))
    _set_random_state(tensors[f"random.{rank}"], device)
    return int(about["step"])
