"""What a network is worth on a split, in memory: one number, higher is better, to decide by."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.context import Batch, Data
from tersor.core.errors import DataError
from tersor.core.scoring import class_axis, hits
from tersor.ops.losses import LABELS, call, first_output


class Judge:
    """Scores networks on the validation split, where labels are missing by a reference.

    The number is the data's own `quality` where there is one; else the accuracy in percent where
    labels are classes; else in percent how far the outputs agree with the reference's: the share of
    equal top-1 answers, or where outputs are numbers the cosine.

    Args:
        data: Holds the split, and `quality`.
        reference: The network that others are compared with, in eval mode.

    Raises:
        DataError: there is no validation split, or its batches do not fit the network.
    """

    kind: str
    """quality, accuracy or fidelity."""
    batches: Iterable[Batch]
    own: Callable[[Any, Any], float] | None
    labels: Tensor | None
    wanted: Tensor
    reference: float
    """Of the reference itself."""

    def __init__(self, data: Data, reference: nn.Module) -> None:
        if data.validation is None:
            raise DataError("there is no validation split to judge networks by")
        self.batches, self.own = data.validation, data.quality
        labels = [batch[LABELS] for batch in self.batches if LABELS in batch]
        self.labels = torch.cat(labels) if labels else None
        self.wanted = _outputs(reference, self.batches)
        if self.labels is not None and self.own is not None:
            self.kind = "quality"
        elif self.labels is not None and not self.labels.is_floating_point():
            self.kind = "accuracy"
        else:
            self.kind = "fidelity"
        self.reference = self._score(self.wanted)

    def score(self, net: nn.Module) -> float:
        """Run the split and return the number."""
        return self._score(_outputs(net, self.batches))

    def _score(self, outputs: Tensor) -> float:
        if not torch.isfinite(outputs).all():
            return -np.inf
        if self.kind == "quality":
            assert self.own is not None
            return float(self.own(outputs, self.labels))
        if self.kind == "accuracy":
            assert self.labels is not None
            return 100 * float(hits(outputs.numpy(), self.labels.numpy()).mean())
        classes = self.labels is None and self.wanted.dim() > 1
        return _agreement(outputs.numpy(), self.wanted.numpy(), classes)


def _outputs(net: nn.Module, batches: Iterable[Batch]) -> Tensor:
    with torch.no_grad():
        made = [first_output(call(net, batch)) for batch in batches]
    if not made:
        raise DataError("the validation split holds no batch")
    if len({tensor.shape[1:] for tensor in made}) > 1:
        raise DataError(
            "outputs of the validation batches have different shapes beyond the first axis; pad "
            "the samples to one shape"
        )
    return torch.cat(made).float()


def _agreement(outputs: np.ndarray, wanted: np.ndarray, classes: bool) -> float:
    if classes:
        axis = class_axis(wanted)
        if wanted.shape[axis] > 1:
            return 100 * float(hits(outputs, wanted.argmax(axis)).mean())
    ours, theirs = outputs.ravel().astype(np.float64), wanted.ravel().astype(np.float64)
    scale = float(np.sqrt((ours @ ours) * (theirs @ theirs)))
    return 100 * float(ours @ theirs) / scale if scale else 100.0
