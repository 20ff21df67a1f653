import numpy as np
import pytest

from tersor.core.errors import DataError
from tersor.core.scoring import class_axis, hits, tasks_of


def test_hits_of_classes_agree_with_argmax() -> None:
    rng = np.random.default_rng(0)
    outputs, labels = rng.integers(0, 4, (200, 6)).astype(float), rng.integers(0, 6, 200)
    assert (hits(outputs, labels) == (outputs.argmax(1) == labels)).all()


def test_top_k_agrees_with_sorting() -> None:
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(100, 8)), rng.integers(0, 8, 100)
    for k in (1, 3, 8):
        wanted = [label in np.argsort(-row)[:k] for row, label in zip(outputs, labels, strict=True)]
        assert (hits(outputs, labels, k) == wanted).all()


def test_positions_and_pixels_are_averaged_by_sample_and_ignored_labels_left_out() -> None:
    outputs = np.zeros((2, 3, 4))  # two samples, three positions, four classes
    outputs[..., 1] = 1
    labels = np.array([[1, 1, -100], [0, 1, 2]])
    shares = hits(outputs, labels)
    assert shares.mean() == pytest.approx(3 / 5)  # three of five labels
    pixels = hits(outputs.transpose(0, 2, 1)[..., None], labels[..., None])
    assert pixels == pytest.approx(shares)


def test_ignored_classes_are_left_out() -> None:
    outputs = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert hits(outputs, np.array([0, -1, 0])).tolist() == [1.0, 0.0]


def test_class_axis_without_labels() -> None:
    assert class_axis(np.zeros((2, 5))) == 1
    assert class_axis(np.zeros((2, 7, 5))) == 2
    assert class_axis(np.zeros((2, 5, 3, 3))) == 1


def test_labels_that_do_not_fit_are_refused() -> None:
    outputs = np.zeros((4, 3))
    with pytest.raises(
        DataError,
        match=r"labels are float64, not classes; give integer labels, or your own measure as 'quality'",
    ):
        hits(outputs, np.zeros(4))
    with pytest.raises(
        DataError,
        match=r"outputs of shape \(4, 3\) do not fit labels of shape \(5,\); classes need",
    ):
        hits(outputs, np.zeros(5, int))
    with pytest.raises(
        DataError,
        match="label 3 is beyond the 3 classes of the outputs; check that labels start at 0",
    ):
        hits(outputs, np.array([0, 1, 2, 3]))
    with pytest.raises(DataError, match="no labels to score: all are negative"):
        hits(outputs, np.full(4, -1))


@pytest.mark.parametrize(
    ("outputs", "labels", "inputs", "wanted"),
    [
        ((4, 10), ((4,), int), float, {"classes"}),
        ((4, 10), ((4,), int), int, {"classes", "tokens"}),
        ((4, 7, 10), ((4, 7), int), int, {"positions"}),
        ((4, 10, 7), ((4, 7), int), float, {"positions"}),
        ((4, 10, 7, 7), ((4, 7, 7), int), float, {"pixels"}),
        ((4,), ((4,), int), float, {"scores", "numbers"}),
        ((4, 1), ((4,), int), float, {"scores", "numbers"}),
        ((4, 1), ((4,), float), float, {"numbers"}),
        ((4, 10), ((4, 10), float), float, {"numbers"}),
        ((4, 10), ((4,), float), float, set()),
        ((4, 9, 6), ((4, 5, 5), float), float, {"boxes"}),
    ],
)
def test_what_labels_are_is_told_by_shapes_and_types(outputs, labels, inputs, wanted) -> None:
    shape, kind = labels
    given = np.zeros((4, 3), inputs)
    assert tasks_of(np.zeros(outputs), np.zeros(shape, kind), [given]) == wanted
