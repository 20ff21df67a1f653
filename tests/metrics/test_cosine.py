import math

import numpy as np
import pytest

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject
from tersor.metrics.cosine import cosine
from tests.metrics.subjects import TARGET, answers


def _measure(outputs: np.ndarray, reference: np.ndarray) -> Measurement:
    return cosine(Subject(target=TARGET, outputs=outputs, reference=reference))


def test_cosine_is_the_mean_of_the_samples() -> None:
    reference, _ = answers(40)
    outputs = reference + 0.3 * np.random.default_rng(1).normal(size=reference.shape)
    each = [
        sum(a * b for a, b in zip(x, y, strict=True))
        / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
        for x, y in zip(outputs, reference, strict=True)
    ]
    found = _measure(outputs, reference)
    assert found.value == pytest.approx(100 * sum(each) / 40)
    assert found.spread is not None
    assert found.spread[0] < found.value < found.spread[1] <= 100


def test_length_does_not_count_and_direction_does() -> None:
    reference, _ = answers(40)
    assert _measure(3 * reference, reference).value == pytest.approx(100)
    assert _measure(-reference, reference).value == pytest.approx(-100)
    zero = np.zeros_like(reference)
    assert _measure(zero, zero).value == 100
    assert _measure(zero, reference).value == 0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"outputs have shape \(3, 2\) but those of the original \(4, 2\)"
    ):
        _measure(np.zeros((3, 2)), np.zeros((4, 2)))
