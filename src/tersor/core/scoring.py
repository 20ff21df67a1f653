"""What a network got right: outputs and labels of a split to shares of correct answers."""

import numpy as np

from tersor.core.errors import DataError


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


def hits(outputs: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Score each sample by the labels that are among the k highest outputs.

    Args:
        outputs: Scores by class, samples first.
        labels: True classes; negative ones are ignored, as in padding.
        k: Guesses allowed. Of equal scores the class of the lower number comes first.

    Returns:
        Shape (N,): 0 or 1 where a sample has one label; else its correct labels divided by the mean
        number of labels a sample, so that the mean is the share of all labels.

    Raises:
        DataError: labels are not classes, do not fit, or none is left.
    """
    axis = class_axis(outputs, labels)
    scores = np.moveaxis(outputs, axis, -1)
    wanted = labels.astype(np.int64)
    if wanted.size and wanted.max() >= scores.shape[-1]:
        raise DataError(
            f"label {wanted.max()} is beyond the {scores.shape[-1]} classes of the outputs; "
            "check that labels start at 0 and belong to this network"
        )
    counted = wanted >= 0
    if not counted.any():
        raise DataError("no labels to score: all are negative; check the 'labels' of the batches")
    true = np.take_along_axis(scores, np.maximum(wanted, 0)[..., None], -1)
    earlier = np.arange(scores.shape[-1]) < wanted[..., None]
    rank = ((scores > true) | ((scores == true) & earlier)).sum(-1)
    right = ((rank < k) & counted).reshape(len(wanted), -1).sum(1).astype(np.float64)
    return np.asarray(right * len(wanted) / counted.sum() if wanted.ndim > 1 else right[counted])
