"""Harmonic mean of precision and recall, averaged over classes (macro F1)."""

import numpy as np

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score
from tersor.core.scoring import macro, tallies
from tersor.metrics import _scored


def score(subject: Subject) -> Score:
    """Count right answers, answers and labels of each class, sample by sample."""
    assert subject.outputs is not None
    assert subject.labels is not None
    right, answered, true = tallies(subject.outputs, subject.labels)

    def of(draws: np.ndarray) -> np.ndarray:
        return 100 * macro(2 * right.sums(draws), answered.sums(draws) + true.sums(draws))

    return Score(count=len(subject.labels), of=of, bounds=(0, 100))


@metric(unit="%", better="higher", needs=("outputs", "labels"), score=score, tasks=_scored.CLASSES)
def f1(subject: Subject) -> Measurement:
    """Average 2 * right / (answered + true) over the classes that were answered or are true.

    Of samples, positions or pixels; classes count alike, however frequent. Its interval is that of
    a bootstrap over samples.

    Raises:
        DataError: labels are not classes, or do not fit the outputs.
    """
    return _scored.measured("f1", subject, score(subject), "macro F1")
