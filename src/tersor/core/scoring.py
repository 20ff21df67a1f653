"""What a network got right: outputs and labels of a split to figures of each sample."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tersor.core.errors import DataError
from tersor.core.metric import Task

IGNORED_PIXEL = 255
"""The label of pixels without a class in many data sets of segmentation."""


def class_axis(outputs: np.ndarray, labels: np.ndarray | None = None) -> int:
    """Find the axis of the outputs that holds classes.

    Args:
        outputs: (N, C), (N, T, C) or (N, C, H, W).
        labels: (N,), (N, T) or (N, H, W), where there are any.

    Raises:
        DataError: outputs and labels do not fit.
    """
    if labels is None:
        return 1 if outputs.ndim in (2, 4) else outputs.ndim - 1
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"labels are {labels.dtype}, not classes; give integer labels, or your own measure as "
            "'quality' in the data and ask for the metric 'quality'"
        )
    if outputs.ndim == labels.ndim + 1:
        if outputs.shape[:-1] == labels.shape:
            return outputs.ndim - 1
        if (outputs.shape[0], *outputs.shape[2:]) == labels.shape:
            return 1
    raise DataError(
        f"outputs of shape {outputs.shape} do not fit labels of shape {labels.shape}; classes need "
        "(N, C) with (N,), positions (N, T, C) with (N, T), pixels (N, C, H, W) with (N, H, W)"
    )


def tasks_of(
    outputs: np.ndarray, labels: np.ndarray, inputs: Iterable[np.ndarray]
) -> frozenset[Task]:
    """Tell what the labels of a network may be, by shapes and types.

    Args:
        outputs: Of a batch.
        labels: Of that batch.
        inputs: What the network took.

    Returns:
        "classes" of samples, and "tokens" where the inputs are such, too; classes of "positions" or
        "pixels"; "scores" of the class 1; "numbers"; "boxes". Nothing where they are none of these.
    """
    found: set[Task] = set()
    try:
        axis = class_axis(outputs, labels)
    except DataError:
        axis = None
    if axis is not None and outputs.shape[axis] > 1:
        kinds: dict[int, Task] = {1: "classes", 3: "pixels"}
        found.add(kinds.get(labels.ndim, "positions"))
        if labels.ndim == 1 and all(x.dtype.kind in "iu" for x in inputs):
            found.add("tokens")
    column = outputs.ndim == 1 or outputs.shape[1:] == (1,)
    if column and labels.ndim == 1 and labels.dtype.kind in "iub":
        found.add("scores")
    if _are_numbers(outputs, labels):
        found.add("numbers")
    if outputs.ndim == labels.ndim == 3 and (outputs.shape[2], labels.shape[2]) == (6, 5):
        found.add("boxes")
    return frozenset(found)


def _are_numbers(outputs: np.ndarray, labels: np.ndarray) -> bool:
    """Tell whether there is a label for each output; an axis of one may be missing."""
    return labels.shape == outputs.shape or (
        outputs.shape[-1] == 1 and labels.shape == outputs.shape[:-1]
    )


def labeled(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring outputs and labels into one order, and tell which labels count.

    Args:
        outputs: Scores by class, samples first.
        labels: True classes. Negative ones are ignored, as in padding, and so is 255 of pixels
            where there are not as many classes.

    Returns:
        Scores with the classes last, labels as int64, and which of them count, of labels' shape.

    Raises:
        DataError: labels are not classes, do not fit, or none is left.
    """
    scores = np.moveaxis(outputs, class_axis(outputs, labels), -1)
    wanted = labels.astype(np.int64)
    counted = wanted >= 0
    if wanted.ndim == 3 and scores.shape[-1] <= IGNORED_PIXEL:
        counted &= wanted != IGNORED_PIXEL
    if counted.any() and wanted[counted].max() >= scores.shape[-1]:
        raise DataError(
            f"label {wanted[counted].max()} is beyond the {scores.shape[-1]} classes of the "
            "outputs; check that labels start at 0 and belong to this network"
        )
    if not counted.any():
        ignored = "negative" if (wanted < 0).all() else f"negative or {IGNORED_PIXEL}"
        raise DataError(f"no labels to score: all are {ignored}; check the 'labels' of the batches")
    return scores, np.where(counted, wanted, 0), counted


def hits(outputs: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Score each sample by the labels that are among the k highest outputs.

    Args:
        outputs: Scores by class, samples first.
        labels: True classes; which are ignored says `labeled`.
        k: Guesses allowed. Of equal scores the class of the lower number comes first.

    Returns:
        Shape (N,): 0 or 1 where a sample has one label; else its correct labels divided by the mean
        number of labels a sample, so that the mean is the share of all labels.

    Raises:
        DataError: labels are not classes, do not fit, or none is left.
    """
    scores, wanted, counted = labeled(outputs, labels)
    true = np.take_along_axis(scores, wanted[..., None], -1)
    earlier = np.arange(scores.shape[-1]) < wanted[..., None]
    rank = ((scores > true) | ((scores == true) & earlier)).sum(-1)
    right = ((rank < k) & counted).reshape(len(wanted), -1).sum(1).astype(np.float64)
    return np.asarray(right * len(wanted) / counted.sum() if wanted.ndim > 1 else right[counted])


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How often each class occurs in each sample: (sample, class, times), zeros left out."""

    sample: np.ndarray
    kind: np.ndarray
    times: np.ndarray
    classes: int

    def sums(self, draws: np.ndarray) -> np.ndarray:
        """Add up what samples that count so often hold: (draws, samples) to (draws, classes)."""
        weights = draws[:, self.sample] * self.times
        return np.array([np.bincount(self.kind, row, self.classes) for row in weights])


def tallies(outputs: np.ndarray, labels: np.ndarray) -> tuple[Tally, Tally, Tally]:
    """Count by class what was answered rightly, what was answered, and what is true.

    Raises:
        DataError: labels are not classes, do not fit, or none is left.
    """
    scores, wanted, counted = labeled(outputs, labels)
    classes = scores.shape[-1]
    sample = np.broadcast_to(
        np.arange(len(wanted)).reshape(-1, *[1] * (wanted.ndim - 1)), wanted.shape
    )[counted]
    answered, true = scores.argmax(-1)[counted], wanted[counted]

    def tally(chosen: np.ndarray, kind: np.ndarray) -> Tally:
        keys, times = np.unique(chosen * classes + kind, return_counts=True)
        return Tally(sample=keys // classes, kind=keys % classes, times=times, classes=classes)

    right = answered == true
    return tally(sample[right], true[right]), tally(sample, answered), tally(sample, true)


def macro(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Average part / whole over the classes that occur, (draws, classes) to (draws,)."""
    occurs = whole > 0
    ratios = np.where(occurs, part / np.where(occurs, whole, 1), 0.0)
    return np.asarray(ratios.sum(1) / np.maximum(occurs.sum(1), 1))


def losses(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return minus the logarithm of the true classes' probabilities, added up by sample.

    Args:
        outputs: Logits or logarithms of probabilities; probabilities, where all are in [0, 1] and
            those of every label add up to 1.
        labels: True classes; which are ignored says `labeled`.

    Returns:
        The sums in nats, and the number of labels behind each; both of shape (samples,), float64.

    Raises:
        DataError: labels are not classes, do not fit, or none is left.
    """
    scores, wanted, counted = labeled(outputs, labels)
    certain = are_probabilities(scores)
    sums, counts = np.zeros(len(scores)), np.zeros(len(scores))
    for i, (logits, true, keep) in enumerate(zip(scores, wanted, counted, strict=True)):
        each = logits.reshape(-1, scores.shape[-1]).astype(np.float64)
        given = np.take_along_axis(each, true.reshape(-1, 1), 1)[:, 0]
        with np.errstate(divide="ignore"):
            nats = -np.log(given) if certain else _log_sum(each) - given
        sums[i], counts[i] = nats[keep.ravel()].sum(), keep.sum()
    return sums, counts


def are_probabilities(scores: np.ndarray) -> bool:
    """Tell whether scores, classes last, are probabilities already."""
    within = scores.min() >= 0 and scores.max() <= 1
    return bool(within and np.allclose(scores.sum(-1, dtype=np.float64), 1, atol=1e-3))


def _log_sum(logits: np.ndarray) -> np.ndarray:
    top = logits.max(1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(1)))


def squared_errors(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each sample's mean squared error, shape (samples,), float64.

    Args:
        outputs: Numbers, samples first.
        labels: The numbers wanted, of the same shape; an axis of one may be missing.

    Raises:
        DataError: labels do not fit, or are not finite.
    """
    if not _are_numbers(outputs, labels):
        raise DataError(
            f"outputs of shape {outputs.shape} do not fit labels of shape {labels.shape}; a "
            "squared error needs a number for each output"
        )
    wanted = labels.reshape(outputs.shape).astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(wanted)))
    if bad:
        raise DataError(f"{bad} of {wanted.size} labels are not finite (NaN or infinite)")
    return np.asarray(((outputs - wanted) ** 2).reshape(len(outputs), -1).mean(1))
