import numpy as np
import pytest

from tests.metrics.subjects import measured
from tests.metrics.test_mse import numbers


def test_rmse_is_the_root_of_the_mean_over_all_samples() -> None:
    outputs, labels = numbers()
    found = measured("rmse", outputs, labels)
    assert found.value == pytest.approx(float(np.sqrt(((outputs - labels) ** 2).mean())))
    squared = measured("mse", outputs, labels)
    assert found.spread is not None
    assert squared.spread is not None
    assert found.spread == pytest.approx(np.sqrt(squared.spread), rel=0.05)  # normal, bootstrap
