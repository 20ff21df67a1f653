"""The user's own quality, given next to the data."""

import math
import sys
import time
from typing import Any

import numpy as np

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.statistics import bootstrap

RESAMPLES = 200
AFFORDABLE_S = 2.0
"""Time that the interval may take; a slower quality gets none."""


@metric(unit="1", better="higher", needs=("outputs", "labels", "quality"))
def quality(subject: Subject) -> Measurement:
    """Call the data's `quality` on outputs and labels of the whole split.

    It is given tensors where PyTorch is loaded, as its batches were, else arrays.

    Raises:
        DataError: it fails, or returns no finite number.
    """
    outputs, labels = subject.outputs, subject.labels
    assert outputs is not None
    assert labels is not None
    began = time.perf_counter()
    value = _call(subject, outputs, labels)
    spent_s = time.perf_counter() - began
    spread = None
    if spent_s * RESAMPLES < AFFORDABLE_S and len(outputs) > 1:
        rows = bootstrap(len(outputs), RESAMPLES)
        values = [_call(subject, outputs[row], labels[row]) for row in rows]
        low, high = (float(x) for x in np.quantile(values, [0.025, 0.975]))
        spread = (min(low, value), max(high, value))
    on = f" on {subject.split}" if subject.split else ""
    return Measurement(
        metric="quality",
        value=value,
        unit="1",
        better="higher",
        spread=spread,
        conditions={"split": subject.split} if subject.split else {},
        count=len(outputs),
        how=f"the data's own quality over {len(outputs)} samples{on}",
    )


def _call(subject: Subject, outputs: np.ndarray, labels: np.ndarray) -> float:
    assert subject.quality is not None
    try:
        value = float(subject.quality(_native(outputs), _native(labels)))
    except Exception as error:
        raise DataError(
            f"the data's quality failed on outputs {outputs.shape} and labels {labels.shape}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not math.isfinite(value):
        raise DataError(f"the data's quality is {value}; it must return a finite number")
    return value


def _native(array: np.ndarray) -> Any:
    torch = sys.modules.get("torch")
    return array if torch is None else torch.from_numpy(np.ascontiguousarray(array))
