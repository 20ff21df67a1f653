import numpy as np
import pytest

from tersor.core import plugins
from tersor.core.errors import DataError
from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.core.statistics import wilson
from tersor.metrics.accuracy import accuracy

TARGET = Target(runtime="onnxruntime")


def test_accuracy_of_classes_with_wilson_interval() -> None:
    outputs = np.eye(4)[[0, 1, 2, 3, 0, 0, 0, 0]]
    labels = np.array([0, 1, 2, 3, 0, 0, 1, 1])
    found = accuracy(Subject(target=TARGET, outputs=outputs, labels=labels, split="test"))
    assert found.value == 75.0
    assert found.unit == "%"
    assert found.better == "higher"
    low, high = wilson(6, 8)
    assert found.spread == (100 * low, 100 * high)
    assert found.count == 8
    assert found.conditions == {"split": "test"}
    assert found.how == "top-1 over 8 samples on test"


def test_accuracy_of_pixels_is_judged_by_whole_samples() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (40, 6, 6))
    outputs = np.eye(3)[labels].transpose(0, 3, 1, 2).copy()
    outputs[:10] = np.roll(outputs[:10], 1, axis=1)  # ten samples are wrong throughout
    found = accuracy(Subject(target=TARGET, outputs=outputs, labels=labels))
    assert found.value == pytest.approx(75.0)
    assert found.spread is not None
    low, high = found.spread
    as_if_independent = wilson(0.75 * 1440, 1440)
    assert high - low > 3 * 100 * (as_if_independent[1] - as_if_independent[0])


def test_accuracy_of_numbers_is_refused() -> None:
    with pytest.raises(
        DataError, match="labels are float32, not classes; give integer labels, or your own measure"
    ):
        accuracy(Subject(target=TARGET, outputs=np.zeros((3, 1)), labels=np.zeros(3, np.float32)))


def test_accuracy_is_found_by_its_file_name() -> None:
    found = plugins.metric("accuracy")
    assert found.needs == ("outputs", "labels")
    assert found.unit == "%"
    assert found.measure is accuracy
