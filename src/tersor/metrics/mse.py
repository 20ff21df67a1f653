"""Mean squared error of outputs that are numbers."""

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score, mean_of
from tersor.core.scoring import squared_errors
from tersor.metrics import _scored


def score(subject: Subject) -> Score:
    """Score each sample by the mean of its squared errors."""
    assert subject.outputs is not None
    assert subject.labels is not None
    return mean_of(squared_errors(subject.outputs, subject.labels))


@metric(unit="1", better="lower", needs=("outputs", "labels"), score=score, tasks=("numbers",))
def mse(subject: Subject) -> Measurement:
    """Average the squared differences of outputs and labels.

    Raises:
        DataError: labels are not numbers of the outputs' shape.
    """
    return _scored.measured("mse", subject, score(subject), "mean squared error")
