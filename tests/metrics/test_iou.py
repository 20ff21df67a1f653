from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from tersor.core.errors import DataError
from tests.metrics.subjects import measured, pixels


def by_hand(answered: np.ndarray, labels: np.ndarray) -> float:
    scores = []
    for kind in range(4):
        union = ((answered == kind) | (labels == kind)).sum()
        if union:
            scores.append(((answered == kind) & (labels == kind)).sum() / union)
    return 100 * float(np.mean(scores))


def test_iou_adds_pixels_up_over_the_split() -> None:
    outputs, labels = pixels()
    found = measured("iou", outputs, labels)
    assert found.value == pytest.approx(by_hand(outputs.argmax(1), labels))
    assert found.spread is not None
    assert found.spread[0] < found.value < found.spread[1]
    assert found.count == 12


def test_a_class_that_nobody_speaks_of_is_left_out() -> None:
    outputs, labels = pixels()
    outputs = np.concatenate([outputs, np.full((12, 1, 6, 6), -9.0)], axis=1)
    assert measured("iou", outputs, labels).value == pytest.approx(
        by_hand(outputs.argmax(1), labels)
    )


@pytest.mark.parametrize("ignored", [255, -100])
def test_ignored_pixels_are_left_out(ignored: int) -> None:
    outputs, labels = pixels()
    answered = outputs.argmax(1)
    kept = labels.copy()
    labels[:, :2] = ignored
    assert measured("iou", outputs, labels).value == pytest.approx(
        by_hand(answered[:, 2:], kept[:, 2:])
    )


@pytest.mark.slow  # its import takes seconds
def test_iou_agrees_with_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    import torch

    outputs, labels = pixels(classes=4)
    theirs = torchmetrics.functional.classification.multiclass_jaccard_index(
        torch.from_numpy(outputs), torch.from_numpy(labels), num_classes=4
    )
    assert measured("iou", outputs, labels).value == pytest.approx(100 * float(theirs), abs=1e-4)


def test_iou_is_what_a_users_script_computes(workload: Callable[[str], ModuleType]) -> None:
    import torch

    outputs, labels = pixels()
    theirs = workload("fashion").mean_iou(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert measured("iou", outputs, labels).value == pytest.approx(theirs)


def test_pixels_without_any_class_are_refused() -> None:
    with pytest.raises(
        DataError, match="no labels to score: all are negative or 255; check the 'labels'"
    ):
        measured("iou", np.zeros((2, 3, 4, 4)), np.full((2, 4, 4), 255))
    with pytest.raises(DataError, match="label 254 is beyond the 3 classes of the outputs"):
        measured("iou", np.zeros((2, 3, 4, 4)), np.full((2, 4, 4), 254))
