"""A score as a measurement, with its interval."""

from tersor.core import plugins
from tersor.core.metric import Measurement, Subject, Task
from tersor.core.resampling import Score, interval

CLASSES: tuple[Task, ...] = ("classes", "positions", "pixels")
"""Labels that a prediction is right or wrong about."""


def measured(
    name: str, subject: Subject, score: Score, how: str, **conditions: str | int | float
) -> Measurement:
    """Measure a score.

    Args:
        name: The metric.
        subject: Gives the split.
        score: Of its outputs.
        how: What is counted.
        conditions: Further conditions.
    """
    known = plugins.metric(name)
    on = f" on {subject.split}" if subject.split else ""
    return Measurement(
        metric=name,
        value=score.value,
        unit=known.unit,
        better=known.better,
        spread=interval(score),
        conditions={**({"split": subject.split} if subject.split else {}), **conditions},
        count=score.count,
        how=f"{how} over {score.count} samples{on}",
    )
