"""Area under the ROC curve: how well scores rank a class before the others."""

import numpy as np

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score, mean_of
from tersor.core.scoring import are_probabilities, labeled
from tersor.metrics import _scored


def score(subject: Subject) -> Score:
    """Write the AUC as a mean over samples, by their placements among the others.

    Source:
        DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated
        receiver operating characteristic curves", 1988: the AUC's variance is that of the samples'
        placements, and two networks are compared by the differences of theirs. We write a class's
        AUC as a mean of one number a sample, so that several classes average.

    Raises:
        DataError: labels do not fit, or no class has samples both of it and of others.
    """
    assert subject.outputs is not None
    assert subject.labels is not None
    scores_NC, labels_N = _by_class(subject.outputs, subject.labels)
    binary = scores_NC.shape[1] == 1
    kinds = [1] if binary else range(scores_NC.shape[1])
    found = []
    for column, kind in zip(scores_NC.T, kinds, strict=True):
        true = labels_N == kind
        if 0 < true.sum() < true.size:
            found.append(_parts(column, true))
    if not found:
        raise DataError(
            f"the AUC needs labels of two classes at least; all {labels_N.size} are {labels_N[0]}"
        )
    return mean_of(np.mean(found, axis=0), percent=True, lowest=0.0)


@metric(
    unit="%", better="higher", needs=("outputs", "labels"), score=score, tasks=("classes", "scores")
)
def auc(subject: Subject) -> Measurement:
    """Take the chance that a sample of the class scores higher than one of another class.

    Of two classes, or one output for the class 1, it is the AUC; of more, the mean over classes of
    each against the rest, ranked by its probability (softmax, where outputs are not probabilities).
    Classes of which the split has no sample are left out.

    Raises:
        DataError: labels are not classes, do not fit, or are all equal.
    """
    assert subject.outputs is not None
    classes = 2 if subject.outputs.ndim == 1 else max(2, subject.outputs.shape[1])
    how = "AUC" if classes == 2 else "mean AUC of one class against the rest"
    return _scored.measured("auc", subject, score(subject), how)


def _by_class(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns to rank by and the labels, of the samples that have one."""
    if labels.ndim != 1:
        raise DataError(f"the AUC is of samples, with labels (N,); these have shape {labels.shape}")
    if outputs.ndim == 1 or outputs.shape[1:] == (1,):
        column = outputs.reshape(-1, 1)
        # the score of class 1, and of class 0 what is left
        _, wanted, counted = labeled(np.concatenate([-column, column], axis=1), labels)
        return column[counted], wanted[counted]
    scores, wanted, counted = labeled(outputs, labels)
    scores, wanted = scores[counted].astype(np.float64), wanted[counted]
    if scores.shape[1] == 2:
        return scores[:, 1:] - scores[:, :1], wanted
    if not are_probabilities(scores):
        scores = np.exp(scores - scores.max(1, keepdims=True))
        scores = scores / scores.sum(1, keepdims=True)
    return scores, wanted


def _parts(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return a number for each sample whose mean is the AUC and whose spread is that of DeLong."""
    below, above = true.sum(), (~true).sum()
    place = np.empty(scores.size)
    place[true] = _share_below(scores[~true], scores[true])
    place[~true] = 1 - _share_below(scores[true], scores[~true])
    area = place[true].mean()
    weight = np.where(true, scores.size / below, scores.size / above)
    return np.asarray(area + weight * (place - area))


def _share_below(others: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return for each score the share of the others below it; ties count half."""
    ordered = np.sort(others)
    low, high = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return np.asarray((low + high) / (2 * ordered.size))
