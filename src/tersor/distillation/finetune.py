"""Fine-tune: train on the labels to win back what a lossy step before it lost."""

from dataclasses import dataclass

from torch import nn

from tersor.core.context import Context
from tersor.core.errors import DataError
from tersor.core.technique import technique
from tersor.ops.fake_quantize import late


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Settings of fine-tuning."""

    epochs: float = 1.0
    """Passes over the training data; 0.25 is a quarter of it."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@technique(needs=("train", "labels"))
def finetune(net: nn.Module, config: Finetune, context: Context) -> nn.Module:
    """Train every weight on the task's loss.

    Raises:
        DataError: there is no training data.
        StepError: loss or gradient is not finite.
    """
    if context.data.train is None:
        raise DataError("finetune needs training data; give `train` batches with labels")
    context.record(epochs=config.epochs)
    return context.fit(
        net,
        context.loss,
        batches=context.data.train,
        epochs=config.epochs,
        lr=config.lr,
        seed=context.seed,
        checkpoint=context.work_dir / "finetune.safetensors",
        on_step=late(net),
    )
