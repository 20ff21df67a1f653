"""Subjects of metrics that look at outputs and labels only."""

import numpy as np

from tersor.core import plugins
from tersor.core.metric import Measurement, Subject
from tersor.core.runtime import Target

TARGET = Target(runtime="x")


def measured(name: str, outputs: np.ndarray, labels: np.ndarray) -> Measurement:
    """Measure one metric."""
    subject = Subject(target=TARGET, outputs=outputs, labels=labels, split="test")
    return plugins.metric(name).measure(subject)


def answers(count: int = 300, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make logits that are often right, and labels of classes of unequal frequency."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.4, count) - 1, classes - 1)
    return 2 * np.eye(classes)[labels] + rng.normal(size=(count, classes)), labels


def pixels(count: int = 12, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make maps of logits (N, C, 6, 6) and labels (N, 6, 6)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (count, 6, 6))
    outputs = 2 * np.eye(classes)[labels] + rng.normal(size=(count, 6, 6, classes))
    return outputs.transpose(0, 3, 1, 2), labels
