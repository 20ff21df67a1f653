"""The user's own quality, given next to the data."""

import math
import sys
import time
from typing import Any

import numpy as np

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score
from tersor.metrics import _scored

RESAMPLES = 200
AFFORDABLE_S = 2.0
"""Time that the interval may take; a slower quality gets none."""


def score(subject: Subject) -> Score:
    """Call the quality on the split, and on draws of its samples where there is time for that."""
    outputs, labels = subject.outputs, subject.labels
    assert outputs is not None
    assert labels is not None
    began = time.perf_counter()
    value = _call(subject, outputs, labels)
    affordable = (time.perf_counter() - began) * RESAMPLES < AFFORDABLE_S

    def of(draws: np.ndarray) -> np.ndarray:
        if len(draws) == 1 and (draws == 1).all():
            return np.array([value])
        rows = (np.repeat(np.arange(len(draw)), draw.astype(int)) for draw in draws)
        return np.array([_call(subject, outputs[row], labels[row]) for row in rows])

    resamples = RESAMPLES if affordable else 0
    return Score(count=len(outputs), of=of, bounds=(-math.inf, math.inf), resamples=resamples)


@metric(unit="1", better="higher", needs=("outputs", "labels", "quality"), score=score)
def quality(subject: Subject) -> Measurement:
    """Call the data's `quality` on outputs and labels of the whole split.

    It is given tensors where PyTorch is loaded, as its batches were, else arrays.

    Raises:
        DataError: it fails, or returns no finite number.
    """
    return _scored.measured("quality", subject, score(subject), "the data's own quality")


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
