"""Teachers: the network that is learnt from, and how a student imitates its answers."""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError, StepError
from tersor.ops.losses import LABELS, call, class_dimension, divergence


def teacher_of(context: Context, technique: str) -> nn.Module:
    """Copy the network to learn from: the one the user gives, else the untouched original.

    Raises:
        StepError: there is neither.
    """
    given = context.reference if context.teacher is None else context.teacher
    if given is None:
        raise StepError(f"{technique} needs the original network as its teacher")
    teacher: nn.Module = copy.deepcopy(given).eval().requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # not in the stubs


def ask(teacher: nn.Module, batch: Batch) -> Any:
    """Return what a teacher says of a batch, on the batch's device, without gradients."""
    place = next(iter(batch.values())).device
    own = next(itertools.chain(teacher.parameters(), teacher.buffers()), None)
    if own is not None and own.device != place:
        teacher.to(place)
    with torch.no_grad():
        return call(teacher, batch)


def imitate(
    outputs: Tensor,
    wanted: Tensor,
    *,
    student: nn.Module,
    batch: Batch,
    context: Context,
    hard: float,
    temperature: float,
    technique: str,
) -> Tensor:
    """Return hard * task loss + (1 - hard) * T^2 * KL(teacher || student), both softened by T.

    Where the outputs are numbers, the distance to the teacher is the mean squared error.

    Args:
        outputs: Of the student.
        wanted: Of the teacher.
        student: What `outputs` come from; called again only for a loss of the user's own.
        batch: What both were given; with labels where `hard` is above 0.
        context: Of the step.
        hard: Weight of the loss on the labels, in [0, 1].
        temperature: T.
        technique: Named in messages.

    Raises:
        StepError: outputs differ in shape.
        DataError: no labels though `hard` is above 0.

    Source:
        Hinton et al., arXiv:1503.02531, section 2.
    """
    if outputs.shape != wanted.shape:
        raise StepError(
            f"outputs have shape {tuple(outputs.shape)}, the original's {tuple(wanted.shape)}; "
            f"{technique} compares them and cannot follow a step that changes them"
        )
    labels = batch.get(LABELS)
    if hard and context.data.loss is None and labels is None:
        raise DataError(f"{technique}: batches have no labels; add them, or set hard: 0")
    dimension = class_dimension(outputs, None if context.data.loss else labels)
    soft = divergence(outputs, wanted, dimension, temperature)
    if not hard:
        return soft
    # the inferred loss only calls the network: it is given the answer that is there already
    net: Any = student if context.data.loss is not None else lambda *_, **__: outputs
    return hard * context.loss(net, batch) + (1 - hard) * soft
