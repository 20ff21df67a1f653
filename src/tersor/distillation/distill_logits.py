"""Distill logits: train the network to answer as the untouched original does."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError, StepError
from tersor.core.technique import technique
from tersor.ops.fake_quantize import late
from tersor.ops.losses import LABELS, call, class_dimension, divergence, first_output, infer_loss


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


@technique(needs=("train", "reference"), paper="arXiv:1503.02531")
def distill_logits(net: nn.Module, config: DistillLogits, context: Context) -> nn.Module:
    """Train on hard * task loss + (1 - hard) * T^2 * KL(teacher || student), both softened by T.

    Where the outputs are numbers, the distance to the teacher is the mean squared error.

    Raises:
        DataError: no training data, or no labels though `hard` is above 0.
        StepError: no reference; outputs differ in shape; loss or gradient is not finite.

    Source:
        Hinton et al., arXiv:1503.02531, section 2.
    """
    if context.data.train is None:
        raise DataError("distill_logits needs training data; give `train` batches")
    if context.reference is None:
        raise StepError("distill_logits needs the original network as its teacher")
    teacher = copy.deepcopy(context.reference).eval().to(memory_format=torch.channels_last)

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = first_output(call(teacher, batch))
        outputs = first_output(call(student, batch))
        if outputs.shape != wanted.shape:
            raise StepError(
                f"outputs have shape {tuple(outputs.shape)}, the original's {tuple(wanted.shape)}; "
                "distill_logits compares them and cannot follow a step that changes them"
            )
        labels = batch.get(LABELS)
        dimension = class_dimension(outputs, None if context.data.loss else labels)
        soft = divergence(outputs, wanted, dimension, config.temperature)
        if not config.hard:
            return soft
        if context.data.loss is not None:
            hard = context.loss(student, batch)
        elif labels is None:
            raise DataError("distill_logits: batches have no labels; add them, or set hard: 0")
        else:
            hard = infer_loss(outputs, labels)(outputs, labels)
        return config.hard * hard + (1 - config.hard) * soft

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
