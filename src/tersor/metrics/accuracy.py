"""Share of labels that have the highest output (top-1)."""

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.scoring import hits
from tersor.metrics import _share


@metric(unit="%", better="higher", needs=("outputs", "labels"))
def accuracy(subject: Subject) -> Measurement:
    """Compare the highest output with the label: of samples, positions or pixels.

    Raises:
        DataError: labels are not classes, or do not fit the outputs.
    """
    assert subject.outputs is not None
    assert subject.labels is not None
    shares = hits(subject.outputs, subject.labels)
    return _share.in_percent("accuracy", subject, shares, "top-1", single=subject.labels.ndim == 1)
