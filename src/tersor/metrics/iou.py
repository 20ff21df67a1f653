"""Intersection over union of each class's pixels, averaged over classes (mIoU)."""

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
        common = right.sums(draws)
        return 100 * macro(common, answered.sums(draws) + true.sums(draws) - common)

    return Score(count=len(subject.labels), of=of, bounds=(0, 100))


@metric(
    unit="%",
    better="higher",
    needs=("outputs", "labels"),
    score=score,
    tasks=("positions", "pixels"),
)
def iou(subject: Subject) -> Measurement:
    """Add up pixels over the whole split, and average the classes that were answered or are true.

    The background is a class as others. Labels that are negative or 255 are ignored. Its interval
    is that of a bootstrap over samples, since the pixels of one go together.

    Raises:
        DataError: labels are not classes, or do not fit the outputs.
    """
    return _scored.measured("iou", subject, score(subject), "mean IoU")
