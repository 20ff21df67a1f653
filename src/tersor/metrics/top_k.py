"""Share of labels among the five highest outputs."""

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score, mean_of
from tersor.core.scoring import class_axis, hits
from tersor.metrics import _scored

K = 5


def score(subject: Subject) -> Score:
    """Score each sample by its share of labels among the highest outputs."""
    assert subject.outputs is not None
    assert subject.labels is not None
    shares = hits(subject.outputs, subject.labels, _guesses(subject))
    return mean_of(shares, single=subject.labels.ndim == 1, percent=True)


@metric(unit="%", better="higher", needs=("outputs", "labels"), score=score, tasks=_scored.CLASSES)
def top_k(subject: Subject) -> Measurement:
    """Count labels among the five highest outputs; with five classes or fewer, all but the lowest.

    Raises:
        DataError: labels are not classes, or do not fit the outputs.
    """
    k = _guesses(subject)
    return _scored.measured("top_k", subject, score(subject), f"top-{k}", k=k)


def _guesses(subject: Subject) -> int:
    assert subject.outputs is not None
    classes = int(subject.outputs.shape[class_axis(subject.outputs, subject.labels)])
    return min(K, max(1, classes - 1))
