import time
from typing import Any

import numpy as np
import pytest
import torch

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject
from tersor.core.runtime import Target
from tersor.metrics.quality import quality


def _measure(own: Any) -> Measurement:
    rng = np.random.default_rng(0)
    return quality(
        Subject(
            target=Target(runtime="x"),
            outputs=rng.normal(size=(200, 3)).astype(np.float32),
            labels=rng.integers(0, 3, 200),
            split="test",
            quality=own,
        )
    )


def test_the_users_function_decides_and_gets_an_interval() -> None:
    def top_1(outputs: torch.Tensor, labels: torch.Tensor) -> float:
        return (outputs.argmax(1) == labels).double().mean().item()

    found = _measure(top_1)
    assert found.spread is not None
    low, high = found.spread
    assert low < found.value < high
    # the normal approximation of a share of 200
    assert high - low == pytest.approx(
        2 * 1.96 * np.sqrt(found.value * (1 - found.value) / 200), rel=0.25
    )
    assert found.count == 200
    assert found.how == "the data's own quality over 200 samples on test"


def test_a_slow_function_is_called_once() -> None:
    calls = []

    def slow(outputs: Any, labels: Any) -> float:
        calls.append(len(labels))
        time.sleep(0.05)
        return 1.0

    assert _measure(slow).spread is None
    assert calls == [200]


def test_a_function_that_fails_is_named() -> None:
    with pytest.raises(
        DataError,
        match=r"the data's quality failed on outputs \(200, 3\) and labels \(200,\): ZeroDivisionError: division by zero",
    ):
        _measure(lambda outputs, labels: 1 / 0)
    with pytest.raises(
        DataError, match="the data's quality is nan; it must return a finite number"
    ):
        _measure(lambda outputs, labels: float("nan"))
