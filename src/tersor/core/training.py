"""Training: how the steps of a recipe that train do it."""

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["auto", "sgd", "adamw"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the default trainer, the same for every step of a recipe."""

    optimizer: Optimizer = "auto"
    """auto: SGD where most parameters are convolutions', else AdamW."""
    decay: float | None = None
    """Weight decay of matrices and kernels; 5e-4 for SGD, 0.02 for AdamW where not given."""
    clip: float | None = None
    """Largest norm of the gradient; 5 for SGD, 1 for AdamW where not given."""
    warm_up: float = 0.05
    """Share of the steps in which the learning rate rises, in [0, 1]."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes, in [0, 1)."""
    ema: float = 0.0
    """Decay of a running average of the weights, which is the result; in [0, 1). 0: none."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step."""
    precision: Precision = "auto"
    """Of forward passes. auto: bf16 on processors that have it for networks that gain, fp16 with
    loss scaling on a GPU, else fp32."""
    device: Device = "cpu"
    """Where training runs."""

    def __post_init__(self) -> None:
        if self.decay is not None and self.decay < 0:
            raise ValueError(f"decay must not be negative, got {self.decay}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"warm_up must be in [0, 1], got {self.warm_up}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
