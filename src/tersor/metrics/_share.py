"""A share of correct answers as a measurement in percent."""

import numpy as np

from tersor.core.metric import Measurement, Subject
from tersor.core.statistics import mean_interval, wilson


def in_percent(
    name: str, subject: Subject, shares: np.ndarray, how: str, *, single: bool, **conditions: int
) -> Measurement:
    """Measure the mean of per-sample shares.

    Args:
        name: The metric.
        subject: Gives the split.
        shares: Shape (samples,).
        how: What is counted.
        single: Every sample is one trial, so that Wilson's interval holds; else the interval is
            that of the mean over samples: pixels or positions of one sample go together.
        conditions: Further conditions.
    """
    value = float(shares.mean())
    low, high = wilson(float(shares.sum()), shares.size) if single else mean_interval(shares)
    on = f" on {subject.split}" if subject.split else ""
    return Measurement(
        metric=name,
        value=100 * value,
        unit="%",
        better="higher",
        spread=(100 * max(0.0, low), 100 * min(1.0, high)),
        conditions={**({"split": subject.split} if subject.split else {}), **conditions},
        count=shares.size,
        how=f"{how} over {shares.size} samples{on}",
    )
