"""Agreement with the original network: equal top-1 answers, or the cosine of the outputs."""

import numpy as np

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import mean_of
from tersor.core.scoring import class_axis
from tersor.core.statistics import bootstrap
from tersor.metrics import _scored


@metric(unit="%", better="higher", needs=("outputs", "reference"))
def fidelity(subject: Subject) -> Measurement:
    """Compare with the original's outputs on the same samples; labels are not needed.

    For outputs by class, the share of equal answers. For numbers (one output a sample, or float
    labels), 100 * cosine of the two networks' outputs over the split.

    Raises:
        DataError: the outputs do not have the original's shape.
    """
    outputs, reference, labels = subject.outputs, subject.reference, subject.labels
    assert outputs is not None
    assert reference is not None
    if outputs.shape != reference.shape:
        raise DataError(
            f"outputs have shape {outputs.shape} but those of the original {reference.shape}; "
            "measure both on the same split"
        )
    numbers = outputs.ndim < 2 or (labels is not None and labels.dtype.kind == "f")
    if not numbers:
        axis = class_axis(outputs, labels)
        if outputs.shape[axis] > 1:
            same = outputs.argmax(axis) == reference.argmax(axis)
            shares = same.reshape(len(same), -1).mean(1)
            score = mean_of(shares, single=same.ndim == 1, percent=True)
            return _scored.measured("fidelity", subject, score, "equal top-1 answers")
    return _cosine(subject, outputs.reshape(len(outputs), -1), reference.reshape(len(outputs), -1))


def _cosine(subject: Subject, ours: np.ndarray, theirs: np.ndarray) -> Measurement:
    """Measure 100 * cosine, its interval by a bootstrap over samples."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    products = np.stack([(ours * theirs).sum(1), (ours**2).sum(1), (theirs**2).sum(1)], axis=1)
    sums = products[bootstrap(len(ours), 1000)].sum(1)
    low, high = np.quantile(_ratio(sums), [0.025, 0.975])
    value = float(_ratio(products.sum(0)[None])[0])
    on = f" on {subject.split}" if subject.split else ""
    return Measurement(
        metric="fidelity",
        value=100 * value,
        unit="%",
        better="higher",
        spread=(100 * min(float(low), value), 100 * max(float(high), value)),
        conditions={"split": subject.split} if subject.split else {},
        count=len(ours),
        how=f"cosine of the outputs over {len(ours)} samples{on}",
    )


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Divide; two outputs that are zero throughout agree."""
    scale = np.sqrt(sums[:, 1] * sums[:, 2])
    equal = (sums[:, 1] == 0) & (sums[:, 2] == 0)
    return np.where(equal, 1.0, sums[:, 0] / np.where(scale == 0, 1.0, scale))
