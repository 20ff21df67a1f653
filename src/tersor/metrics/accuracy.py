"""Share of labels that have the highest output (top-1)."""

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score, mean_of
from tersor.core.scoring import hits
from tersor.metrics import _scored


def score(subject: Subject) -> Score:
    """Score each sample by its share of right answers."""
    assert subject.outputs is not None
    assert subject.labels is not None
    shares = hits(subject.outputs, subject.labels)
    return mean_of(shares, single=subject.labels.ndim == 1, percent=True)


@metric(unit="%", better="higher", needs=("outputs", "labels"), score=score, tasks=_scored.CLASSES)
def accuracy(subject: Subject) -> Measurement:
    """Compare the highest output with the label: of samples, positions or pixels.

    Raises:
        DataError: labels are not classes, or do not fit the outputs.
    """
    return _scored.measured("accuracy", subject, score(subject), "top-1")
