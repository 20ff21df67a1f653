"""What to train on: losses told from the labels, and how far a student is from its teacher."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.context import Batch, Data, Loss
from tersor.core.errors import DataError

LABELS = "labels"
Criterion = Callable[[Tensor, Tensor], Tensor]
"""(outputs, labels or the teacher's outputs) -> scalar."""


def first_output(outputs: Any) -> Tensor:
    """Return the tensor that counts: the output, `logits` of a mapping, or the first of several."""
    if isinstance(outputs, Mapping):
        outputs = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
    while isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        raise DataError(f"the network returns {type(outputs).__name__}, not a tensor; give a loss")
    return outputs


def call(net: nn.Module, batch: Batch) -> Any:
    """Call the network with every entry of a batch but its labels."""
    return net(**{key: value for key, value in batch.items() if key != LABELS})


def class_dimension(outputs: Tensor, labels: Tensor | None) -> int | None:
    """Tell which dimension of `outputs` holds classes; None: the outputs are numbers.

    Without labels the shape decides: (N,C) and (N,T,C) the last one, (N,C,H,W) the second; one
    output is a number.

    Raises:
        DataError: labels and outputs do not fit.
    """
    shape = tuple(outputs.shape)
    if labels is not None:
        return _labelled(shape, labels)
    if not 2 <= len(shape) <= 5:
        return None
    dimension = 1 if len(shape) >= 4 else len(shape) - 1
    return dimension if shape[dimension] > 1 else None


def _labelled(shape: tuple[int, ...], labels: Tensor) -> int | None:
    given = tuple(labels.shape)
    if labels.is_floating_point():
        if given == shape or (*given, 1) == shape:
            return None
    elif labels.dtype != torch.bool and len(shape) == len(given) + 1:
        if given == (shape[0], *shape[2:]):
            return 1
        if given == shape[:-1]:
            return len(shape) - 1
    raise DataError(
        f"labels of shape {given} and type {labels.dtype} do not fit outputs of shape {shape}; "
        "labels are integers (N,) for outputs (N,C), (N,T) for (N,T,C), (N,H,W) for (N,C,H,W), or "
        "numbers of the outputs' own shape; for anything else give a loss with the data"
    )


def infer_loss(outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Criterion:
    """Choose the loss that fits: cross-entropy for classes, mean squared error for numbers.

    Args:
        outputs: What the network returned: (N,C), (N,T,C), (N,C,H,W), or numbers.
        labels: int (N,), (N,T), (N,H,W); or numbers of the outputs' shape. -100 is left out.
        smoothing: Share of each label that is spread over all classes; numbers have none.

    Returns:
        (outputs, labels) -> scalar, in float32.

    Raises:
        DataError: labels and outputs do not fit.
    """
    dimension = class_dimension(outputs, labels)
    if dimension is None:
        return _squared_error
    return functools.partial(_CROSS_ENTROPY[dimension == 1], smoothing=smoothing)


def _squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs.float(), labels.float().reshape(outputs.shape))


def _cross_entropy(outputs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Classes in dimension 1."""
    try:
        return F.cross_entropy(outputs.float(), labels.long(), label_smoothing=smoothing)
    except IndexError as error:
        raise DataError(
            f"labels reach from {labels.min().item()} to {labels.max().item()}, but the network "
            f"has {outputs.shape[1]} classes"
        ) from error


def _cross_entropy_last(outputs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Classes in the last dimension."""
    return _cross_entropy(outputs.flatten(0, -2), labels.flatten(), smoothing)


_CROSS_ENTROPY: dict[bool, Callable[..., Tensor]] = {
    True: _cross_entropy,
    False: _cross_entropy_last,
}


def task_loss(data: Data, smoothing: float = 0.0) -> Loss:
    """Return the user's own loss, or one that is told from each batch's labels.

    Raises:
        DataError: labels are to be smoothed, but the loss is the user's.

    Raises (the returned loss, when called):
        DataError: a batch has no labels, or they do not fit.
    """
    if not smoothing:
        return data.loss if data.loss is not None else labelled_loss
    if data.loss is not None:
        raise DataError(
            f"label_smoothing {smoothing} is for the loss that tersor tells from the labels, but "
            "the data bring a loss of their own; smooth inside it, or leave label_smoothing out"
        )
    return functools.partial(labelled_loss, smoothing=smoothing)


def labelled_loss(net: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Run the network on a batch and compare with its labels."""
    if LABELS not in batch:
        raise DataError(f"a batch holds {sorted(batch)} but no 'labels'; add them, or give a loss")
    outputs = first_output(call(net, batch))
    return infer_loss(outputs, batch[LABELS], smoothing)(outputs, batch[LABELS])


def divergence(
    student: Float[Tensor, "..."],
    teacher: Float[Tensor, "..."],
    dimension: int | None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Measure how far a student's outputs are from its teacher's.

    Args:
        student: Logits, or numbers.
        teacher: Same shape.
        dimension: The dimension of the classes; None: numbers, compared by mean squared error.
        temperature: Both logits are divided by it.

    Returns:
        temperature^2 * KL(teacher || student), mean over samples and positions, in float32.

    Source:
        Hinton et al., arXiv:1503.02531, section 2: the square keeps the gradient's size.
    """
    if dimension is None:
        return F.mse_loss(student.float(), teacher.float())
    log_p = F.log_softmax(student.float() / temperature, dimension)
    log_q = F.log_softmax(teacher.float() / temperature, dimension)
    each = (log_q.exp() * (log_q - log_p)).sum(dimension)
    return each.mean() * temperature**2
