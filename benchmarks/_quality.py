"""Quality of a network on a test split, with intervals: top-1 accuracy, or mean IoU of scenes.

What an interval is made from is called samples: hits of shape (N,), or for scenes each one's
confusion counts (N, C, C), true classes first.
"""

from typing import Any

import numpy as np

from tersor.core.scoring import hits
from tersor.core.statistics import paired_difference, wilson


def scored(outputs: np.ndarray, labels: np.ndarray, metric: Any) -> np.ndarray:
    """Return what the interval of the metric is made from, checked against the metric itself."""
    import torch

    if labels.ndim == 1:
        samples = hits(outputs, labels)
    else:
        classes = outputs.shape[1]
        pairs = (labels * classes + outputs.argmax(1)).reshape(len(labels), -1)
        counts = [np.bincount(row, minlength=classes**2) for row in pairs]
        samples = np.array(counts).reshape(-1, classes, classes)
    expected = metric(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert abs(value(samples) - expected) < 1e-6, (value(samples), expected)
    return samples


def value(samples: np.ndarray) -> float:
    """Accuracy, or mean intersection over union, in percent."""
    if samples.ndim == 1:
        return 100 * float(samples.mean())
    return float(mean_iou(samples.sum(0)))


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Mean over classes, in percent, of confusion counts (..., C, C)."""
    both = np.diagonal(counts, axis1=-2, axis2=-1)
    return 100 * (both / (counts.sum(-1) + counts.sum(-2) - both)).mean(-1)


def resampled(samples: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """Return the mean IoU of scenes drawn with replacement; the same draws for every network."""
    count = len(samples)
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=resamples)
    return mean_iou(np.tensordot(draws.astype(np.float64), samples, 1))


def spread(samples: np.ndarray) -> list[float]:
    if samples.ndim == 1:
        return [100 * x for x in wilson(float(samples.sum()), samples.size)]
    return [float(x) for x in np.quantile(resampled(samples), [0.025, 0.975])]


def minus(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Return after - before in points, with its paired interval."""
    if before.ndim == 1:
        points, (low, high) = paired_difference(before, after)
        return {"points": 100 * points, "low": 100 * low, "high": 100 * high}
    low, high = np.quantile(resampled(after) - resampled(before), [0.025, 0.975])
    return {"points": value(after) - value(before), "low": float(low), "high": float(high)}
