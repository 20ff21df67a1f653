"""Root of the mean squared error, in the labels' own unit."""

import numpy as np

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score
from tersor.core.scoring import squared_errors
from tersor.metrics import _scored


def score(subject: Subject) -> Score:
    """Score each sample by the mean of its squared errors."""
    assert subject.outputs is not None
    assert subject.labels is not None
    errors = squared_errors(subject.outputs, subject.labels)

    def of(draws: np.ndarray) -> np.ndarray:
        return np.asarray(np.sqrt(draws @ errors / draws.sum(1)))

    return Score(count=errors.size, of=of)


@metric(unit="1", better="lower", needs=("outputs", "labels"), score=score, tasks=("numbers",))
def rmse(subject: Subject) -> Measurement:
    """Take the root of the mean squared difference of outputs and labels.

    Raises:
        DataError: labels are not numbers of the outputs' shape.
    """
    return _scored.measured("rmse", subject, score(subject), "root mean squared error")
