"""Distill logits: train the network to answer as the untouched original, or a teacher, does."""

from dataclasses import dataclass

from torch import Tensor, nn

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError
from tersor.core.technique import technique
from tersor.ops.fake_quantize import late
from tersor.ops.losses import call, first_output
from tersor.ops.teachers import ask, imitate, teacher_of


@dataclass(frozen=True, kw_only=True)
class DistillLogits:
    """Settings of distillation."""

    epochs: float = 1.0
    """Passes over the training data; 0.25 is a quarter of it."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""
    temperature: float = 4.0
    """Softens both answers, so that the small probabilities count, too."""
    hard: float = 0.1
    """Weight of the loss on the labels, in [0, 1]; the teacher has the rest. 0 needs no labels."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.hard <= 1:
            raise ValueError(f"hard must be in [0, 1], got {self.hard}")


@technique(needs=("train", "teacher"), paper="arXiv:1503.02531")
def distill_logits(net: nn.Module, config: DistillLogits, context: Context) -> nn.Module:
    """Train on hard * task loss + (1 - hard) * T^2 * KL(teacher || student), both softened by T.

    Where the outputs are numbers, the distance to the teacher is the mean squared error.

    Raises:
        DataError: no training data, or no labels though `hard` is above 0.
        StepError: no teacher; outputs differ in shape; loss or gradient is not finite.

    Source:
        Hinton et al., arXiv:1503.02531, section 2.
    """
    if context.data.train is None:
        raise DataError("distill_logits needs training data; give `train` batches")
    teacher = teacher_of(context, "distill_logits")

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        wanted = first_output(ask(teacher, batch))
        return imitate(
            first_output(call(student, batch)),
            wanted,
            student=student,
            batch=batch,
            context=context,
            hard=config.hard,
            temperature=config.temperature,
            technique="distill_logits",
        )

    context.record(epochs=config.epochs, temperature=config.temperature, hard=config.hard)
    return context.fit(
        net,
        loss,
        batches=context.data.train,
        epochs=config.epochs,
        lr=config.lr,
        seed=context.seed,
        checkpoint=context.work_dir / "distill_logits.safetensors",
        on_step=late(net),
    )
