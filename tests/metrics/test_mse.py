import numpy as np
import pytest

from tersor.benchmark import paired
from tersor.core.errors import DataError
from tersor.core.statistics import mean_interval
from tests.metrics.subjects import measured


def numbers(count: int = 50) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(count, 3)).astype(np.float32)
    return labels + 0.1 * rng.normal(size=(count, 3)).astype(np.float32), labels


def test_mse_is_the_mean_of_squares_with_its_interval() -> None:
    outputs, labels = numbers()
    found = measured("mse", outputs, labels)
    each = [
        sum((float(o) - float(y)) ** 2 for o, y in zip(row, wanted, strict=True)) / 3
        for row, wanted in zip(outputs, labels, strict=True)
    ]
    assert found.value == pytest.approx(sum(each) / 50)
    assert found.spread == pytest.approx(mean_interval(np.array(each)))
    assert (found.unit, found.better) == ("1", "lower")


def test_an_axis_of_one_may_be_missing() -> None:
    outputs, labels = numbers()
    assert (
        measured("mse", outputs[:, :1], labels[:, 0]).value
        == measured("mse", outputs[:, 0], labels[:, 0]).value
    )


def test_two_networks_are_compared_by_the_same_samples() -> None:
    outputs, labels = numbers()
    found = paired("mse", outputs, outputs + 0.05, labels)
    assert found is not None
    wanted = ((outputs + 0.05 - labels) ** 2).mean() - ((outputs - labels) ** 2).mean()
    assert found.difference == pytest.approx(wanted, rel=1e-4)
    assert found.test == "normal test of the samples' differences"
    reach = (found.high - found.low) / 2
    assert (found.p < 0.05) == (abs(found.difference) > reach)


def test_one_sample_has_no_interval() -> None:
    outputs, labels = numbers(1)
    assert measured("mse", outputs, labels).spread is None
    assert paired("mse", outputs, outputs, labels) is None


def test_labels_that_do_not_fit_are_refused() -> None:
    outputs, labels = numbers()
    with pytest.raises(
        DataError,
        match=r"outputs of shape \(50, 3\) do not fit labels of shape \(50,\); a squared error needs",
    ):
        measured("mse", outputs, labels[:, 0])
    labels[3] = np.nan
    with pytest.raises(DataError, match="3 of 150 labels are not finite"):
        measured("mse", outputs, labels)
