"""What the trainer descends with: the optimizer, its schedule, and an average of the weights."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.training import Training

DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.02, "decay": 5e-4, "clip": 5.0},
    "adamw": {"lr": 5e-4, "decay": 0.02, "clip": 1.0},
}
"""Settings that recover trained networks; `decay` acts on matrices and kernels only."""


def choose_optimizer(net: nn.Module) -> Literal["sgd", "adamw"]:
    """Choose SGD where most parameters are convolutions', else AdamW."""
    total = sum(p.numel() for p in net.parameters())
    inside = sum(p.numel() for m in net.modules() if isinstance(m, _ConvNd) for p in m.parameters())
    return "sgd" if 2 * inside > total else "adamw"


def make_optimizer(
    net: nn.Module, kind: str, settings: Training, lr: float | None, groups: Any
) -> torch.optim.Optimizer:
    """Make the optimizer; each group remembers its own peak learning rate."""
    defaults = DEFAULTS[kind]
    rate = defaults["lr"] if lr is None else lr
    if groups is None:
        decay = defaults["decay"] if settings.decay is None else settings.decay
        trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": decay},
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


def set_rate(optimizer: torch.optim.Optimizer, step: int, num_steps: int, warm_up: float) -> None:
    """Let the learning rate rise in a line, then fall along a cosine."""
    rising = max(1, int(warm_up * num_steps))
    share = min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def state(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those outside the state dict, too; shared ones once."""
    return dict([*net.named_parameters(), *net.named_buffers()])


class Average:
    """A running average of everything in a network that is a floating-point number.

    Source:
        Polyak and Juditsky (1992), with exponential weights; the decay starts low and rises to what
        was asked for, min(decay, (1 + step) / (10 + step)), so that short trainings gain, too.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {
            name: tensor.detach().clone()
            for name, tensor in state(net).items()
            if tensor.is_floating_point()
        }

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights after a step; steps count from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, tensor in state(net).items():
            if name in self.tensors:
                self.tensors[name].lerp_(tensor.detach(), weight)

    @torch.no_grad()
    def put(self, net: nn.Module) -> None:
        """Give the network the average; weights that are exactly zero were pruned and stay so."""
        for name, tensor in state(net).items():
            if name in self.tensors:
                pruned = (tensor == 0) & torch.tensor(tensor.dim() > 1, device=tensor.device)
                tensor.copy_(self.tensors[name].masked_fill(pruned, 0.0))
