"""Share of labels among the five highest outputs."""

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.scoring import class_axis, hits
from tersor.metrics import _share

K = 5


@metric(unit="%", better="higher", needs=("outputs", "labels"))
def top_k(subject: Subject) -> Measurement:
    """Count labels among the five highest outputs; with five classes or fewer, all but the lowest.

    Raises:
        DataError: labels are not classes, or do not fit the outputs.
    """
    assert subject.outputs is not None
    assert subject.labels is not None
    classes = subject.outputs.shape[class_axis(subject.outputs, subject.labels)]
    k = min(K, max(1, classes - 1))
    shares = hits(subject.outputs, subject.labels, k)
    return _share.in_percent(
        "top_k", subject, shares, f"top-{k}", single=subject.labels.ndim == 1, k=k
    )
