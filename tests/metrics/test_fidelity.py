import numpy as np
import pytest

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject
from tersor.core.runtime import Target
from tersor.metrics.fidelity import fidelity


def _measure(
    outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray | None = None
) -> Measurement:
    return fidelity(
        Subject(
            target=Target(runtime="x"),
            outputs=outputs,
            reference=reference,
            labels=labels,
            split="test",
        )
    )


def test_agreement_of_top_1_needs_no_labels() -> None:
    reference = np.eye(5)[[0, 1, 2, 3]]
    outputs = np.eye(5)[[0, 1, 2, 4]] * 0.1
    found = _measure(outputs, reference)
    assert found.value == 75.0
    assert found.spread is not None
    assert found.spread[0] < 75 < found.spread[1]
    assert found.how == "equal top-1 answers over 4 samples on test"
    assert _measure(reference, reference).value == 100.0


def test_agreement_of_positions_finds_the_axis_of_the_classes() -> None:
    reference = np.zeros((2, 3, 4))
    reference[..., 1] = 1
    outputs = reference.copy()
    outputs[0, 0] = [1, 0, 0, 0]
    assert _measure(outputs, reference).value == pytest.approx(100 * 5 / 6)
    assert _measure(
        outputs.transpose(0, 2, 1)[..., None], reference.transpose(0, 2, 1)[..., None]
    ).value == pytest.approx(100 * 5 / 6)


def test_numbers_are_compared_by_cosine() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(500, 1))
    outputs = reference + 0.1 * rng.normal(size=(500, 1))
    found = _measure(outputs, reference)
    wanted = (outputs * reference).sum() / np.sqrt((outputs**2).sum() * (reference**2).sum())
    assert found.value == pytest.approx(100 * wanted)
    assert found.spread is not None
    assert 99 < found.spread[0] < found.value < found.spread[1] < 100
    several = _measure(
        np.hstack([outputs, outputs]), np.hstack([reference, reference]), labels=np.zeros((500, 2))
    )
    assert several.value == pytest.approx(found.value)
    assert several.how.startswith("cosine of the outputs over 500 samples")


def test_zeros_agree_with_zeros_and_not_with_others() -> None:
    assert _measure(np.zeros((4, 1)), np.zeros((4, 1))).value == 100.0
    assert _measure(np.zeros((4, 1)), np.ones((4, 1))).value == 0.0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"outputs have shape \(3, 2\) but those of the original \(4, 2\); measure both on the same split",
    ):
        _measure(np.zeros((3, 2)), np.zeros((4, 2)))
