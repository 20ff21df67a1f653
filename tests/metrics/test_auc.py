import numpy as np
import pytest

from tersor.benchmark import paired
from tersor.core.errors import DataError
from tersor.core.statistics import Z
from tests.metrics.subjects import answers, measured


def by_hand(scores: np.ndarray, true: np.ndarray) -> float:
    wins = [1.0 if s > o else 0.5 if s == o else 0.0 for s in scores[true] for o in scores[~true]]
    return 100 * sum(wins) / len(wins)


def binary(seed: int = 0, count: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return (labels + rng.normal(size=count)).round(1), labels  # rounded: some are equal


def shares(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return DeLong's placements of the positive and of the negative samples."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    return wins.mean(1), wins.mean(0)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores, labels = binary()
    wanted = by_hand(scores, labels == 1)
    for outputs in (scores, scores[:, None], np.stack([0 * scores, scores], axis=1)):
        found = measured("auc", outputs, labels)
        assert found.value == pytest.approx(wanted)
        assert found.how == "AUC over 80 samples on test"


def test_auc_of_classes_is_the_mean_of_each_against_the_rest() -> None:
    outputs, labels = answers(count=120, classes=4)
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    wanted = np.mean([by_hand(shares[:, k], labels == k) for k in range(4)])
    assert measured("auc", outputs, labels).value == pytest.approx(wanted)
    assert measured("auc", shares, labels).value == pytest.approx(wanted)


@pytest.mark.slow  # its import takes seconds
def test_auc_agrees_with_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    import torch

    outputs, labels = answers(classes=4)
    theirs = torchmetrics.functional.classification.multiclass_auroc(
        torch.from_numpy(outputs), torch.from_numpy(labels), num_classes=4
    )
    assert measured("auc", outputs, labels).value == pytest.approx(100 * float(theirs), abs=1e-3)


def test_the_interval_is_that_of_delong() -> None:
    scores, labels = binary()
    variance = sum(each.var(ddof=1) / each.size for each in shares(scores, labels))
    spread = measured("auc", scores, labels).spread
    assert spread is not None
    wanted = 100 * Z * np.sqrt(variance)
    # they divide by n - 1 in each class, we by N - 1 in all
    assert (spread[1] - spread[0]) / 2 == pytest.approx(wanted, rel=0.02)


def test_two_networks_are_compared_by_the_same_samples() -> None:
    scores, labels = binary(count=400)
    noise = 2 * np.random.default_rng(1).normal(size=400)
    found = paired("auc", scores, scores + noise, labels)
    assert found is not None
    after = measured("auc", scores + noise, labels)
    assert found.difference == pytest.approx(after.value - measured("auc", scores, labels).value)
    moved = [
        b - a for a, b in zip(shares(scores, labels), shares(scores + noise, labels), strict=True)
    ]
    variance = sum(each.var(ddof=1) / each.size for each in moved)
    assert (found.high - found.low) / 2 == pytest.approx(100 * Z * np.sqrt(variance), rel=0.02)
    assert found.verdict("higher") == "worse"
    assert found.p < 0.01


def test_classes_without_samples_are_left_out_and_one_class_alone_is_refused() -> None:
    outputs, labels = answers(classes=4)
    kept = labels != 3
    assert measured("auc", outputs[kept], labels[kept]).value > 50
    with pytest.raises(
        DataError, match="the AUC needs labels of two classes at least; all 5 are 2"
    ):
        measured("auc", outputs[:5], np.full(5, 2))
    with pytest.raises(
        DataError, match=r"the AUC is of samples, with labels \(N,\); these have shape \(2, 3\)"
    ):
        measured("auc", np.zeros((2, 3, 4)), np.zeros((2, 3), int))
    with pytest.raises(DataError, match="label 2 is beyond the 2 classes of the outputs"):
        measured("auc", np.zeros(3), np.arange(3))
