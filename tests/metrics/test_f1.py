import numpy as np
import pytest

from tersor.core.errors import DataError
from tests.metrics.subjects import answers, measured, pixels


def by_hand(answered: np.ndarray, labels: np.ndarray) -> float:
    scores = []
    for kind in sorted({*answered.tolist(), *labels.tolist()}):
        right = sum(a == y == kind for a, y in zip(answered, labels, strict=True))
        precision = right / max(1, sum(a == kind for a in answered))
        recall = right / max(1, sum(y == kind for y in labels))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return 100 * sum(scores) / len(scores)


def test_f1_is_the_mean_over_classes_of_precision_and_recall() -> None:
    outputs, labels = answers()
    found = measured("f1", outputs, labels)
    assert found.value == pytest.approx(by_hand(outputs.argmax(1), labels))
    assert found.how == "macro F1 over 300 samples on test"
    assert found.spread is not None
    low, high = found.spread
    assert found.value - 10 < low < found.value < high < found.value + 10


@pytest.mark.slow  # its import takes seconds
def test_f1_agrees_with_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    import torch

    outputs, labels = answers(classes=6)
    for count in (300, 20):  # of 20 samples some classes are in neither
        theirs = torchmetrics.functional.classification.multiclass_f1_score(
            torch.from_numpy(outputs[:count]), torch.from_numpy(labels[:count]), num_classes=6
        )
        ours = measured("f1", outputs[:count], labels[:count]).value
        assert ours == pytest.approx(100 * float(theirs), abs=1e-4)  # theirs is in float32


def test_f1_of_pixels_leaves_ignored_ones_out() -> None:
    outputs, labels = pixels()
    labels[:, 0] = -100
    answered = outputs.argmax(1)[labels >= 0]
    found = measured("f1", outputs, labels)
    assert found.value == pytest.approx(by_hand(answered, labels[labels >= 0]))
    assert found.count == 12


def test_the_interval_covers_what_other_samples_show() -> None:
    outputs, labels = answers(50_000)
    whole = by_hand(outputs.argmax(1), labels)
    inside = 0
    for seed in range(40):
        spread = measured("f1", *answers(100, seed=seed + 1)).spread
        assert spread is not None
        inside += spread[0] <= whole <= spread[1]
    assert inside >= 34


def test_too_few_samples_have_no_interval() -> None:
    outputs, labels = answers(4)
    assert measured("f1", outputs, labels).spread is None


def test_classes_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="label 7 is beyond the 5 classes of the outputs"):
        measured("f1", np.zeros((2, 5)), np.array([0, 7]))
