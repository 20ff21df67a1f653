"""Mean average precision of detected boxes, as COCO counts it (mAP)."""

import numpy as np

from tersor.core.detection import Found, found_by_class
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score
from tersor.metrics import _scored

RESAMPLES = 200


def score(subject: Subject) -> Score:
    """Match boxes once; draws then only weigh images."""
    return _score(_found(subject))


@metric(unit="%", better="higher", needs=("outputs", "labels"), score=score, tasks=("boxes",))
def mean_average_precision(subject: Subject) -> Measurement:
    """Average the precision over recalls, ten overlaps from 0.5 to 0.95, and classes.

    Outputs are (N, D, 6): class, score, x1, y1, x2, y2; labels (N, G, 5): class, x1, y1, x2, y2;
    rows of a negative class are padding. A network whose outputs are raw maps is measured by the
    data's own `quality`, which decodes them. Its interval is that of a bootstrap over images; the
    conditions hold the value at the overlap 0.5 alone.

    Raises:
        DataError: arrays of other shapes, or labels without a box.
    """
    found = _found(subject)
    every = np.ones((1, len(found[0].wanted)))
    return _scored.measured(
        "mean_average_precision",
        subject,
        _score(found),
        f"mean average precision at overlaps 0.5 to 0.95 of {len(found)} classes",
        at_overlap_50=round(float(_average(found, every)[0, 0]), 6),
    )


def _found(subject: Subject) -> list[Found]:
    assert subject.outputs is not None
    assert subject.labels is not None
    return found_by_class(subject.outputs, subject.labels)


def _score(found: list[Found]) -> Score:
    def of(draws: np.ndarray) -> np.ndarray:
        return np.asarray(_average(found, draws).mean(1))

    return Score(count=len(found[0].wanted), of=of, bounds=(0, 100), resamples=RESAMPLES)


def _average(found: list[Found], draws: np.ndarray) -> np.ndarray:
    """Average the classes that a draw has boxes of, in percent at each overlap, (draws, 10)."""
    each = np.array([kind.precision(draws) for kind in found])
    there = ~np.isnan(each)
    return np.asarray(100 * np.where(there, each, 0).sum(0) / np.maximum(there.sum(0), 1))
