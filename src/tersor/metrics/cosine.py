"""Cosine of each sample's outputs with the original's, averaged."""

import numpy as np

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import mean_of
from tersor.metrics import _scored


@metric(unit="%", better="higher", needs=("outputs", "reference"))
def cosine(subject: Subject) -> Measurement:
    """Compare directions of outputs, 100 * mean cosine; labels are not needed.

    Finer than `fidelity`, which counts equal answers. Two samples that are zero throughout agree.

    Raises:
        DataError: the outputs do not have the original's shape.
    """
    outputs, reference = subject.outputs, subject.reference
    assert outputs is not None
    assert reference is not None
    if outputs.shape != reference.shape:
        raise DataError(
            f"outputs have shape {outputs.shape} but those of the original {reference.shape}; "
            "measure both on the same split"
        )
    ours, theirs = (x.reshape(len(x), -1).astype(np.float64) for x in (outputs, reference))
    lengths = [np.sqrt((x**2).sum(1)) for x in (ours, theirs)]
    scale = lengths[0] * lengths[1]
    both_zero = (lengths[0] == 0) & (lengths[1] == 0)
    each = np.where(both_zero, 1.0, (ours * theirs).sum(1) / np.where(scale == 0, 1.0, scale))
    score = mean_of(np.clip(each, -1, 1), percent=True, lowest=-1.0)
    return _scored.measured("cosine", subject, score, "mean cosine with the original's outputs")
