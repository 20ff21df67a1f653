import contextlib
import io
from typing import Any

import numpy as np
import pytest

from tersor.benchmark import paired
from tersor.core.detection import overlaps
from tersor.core.errors import DataError
from tests.metrics.subjects import measured


def boxes(seed: int = 0, images: int = 12, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Make boxes wanted, and found ones of which some are near, some wrong, some twice."""
    rng = np.random.default_rng(seed)
    labels, outputs = np.full((images, 6, 5), -1.0), np.full((images, 20, 6), -1.0)
    for i in range(images):
        wanted, found = rng.integers(1, 7), rng.integers(0, 21)
        corner, extent = rng.uniform(0, 80, (wanted, 2)), rng.uniform(10, 40, (wanted, 2))
        labels[i, :wanted, 0] = rng.integers(0, classes, wanted)
        labels[i, :wanted, 1:] = np.hstack([corner, corner + extent])
        of = rng.integers(0, wanted, found)
        guessed = rng.integers(0, classes, found)
        outputs[i, :found, 0] = np.where(rng.random(found) < 0.8, labels[i, of, 0], guessed)
        outputs[i, :found, 1] = rng.random(found)
        outputs[i, :found, 2:] = labels[i, of, 1:] + rng.normal(0, 3, (found, 4))
    return outputs, labels


def by_hand(outputs: np.ndarray, labels: np.ndarray, least: float) -> float:
    """Average precision of one overlap, one box after the other."""
    classes = sorted({int(k) for k in labels[..., 0].ravel() if k >= 0})
    made = []
    for kind in classes:
        ranked = sorted(
            (
                (row[1], i, row[2:])
                for i, rows in enumerate(outputs)
                for row in rows
                if row[0] == kind
            ),
            key=lambda each: -each[0],
        )
        left = {i: [row[1:] for row in rows if row[0] == kind] for i, rows in enumerate(labels)}
        total = sum(len(rest) for rest in left.values())
        right, curve = 0, []
        for rank, (_, i, box) in enumerate(ranked, 1):
            shared = [float(overlaps(box[None], b[None])[0, 0]) for b in left[i]]
            if shared and max(shared) >= least:
                left[i].pop(shared.index(max(shared)))
                right += 1
            curve.append((right / total, right / rank))
        points = [
            max((p for r, p in curve if r >= at), default=0.0) for at in np.linspace(0, 1, 101)
        ]
        made.append(sum(points) / 101)
    return 100 * sum(made) / len(made)


def coco(outputs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Score with COCO's own code."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    wanted: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, (rows, truth) in enumerate(zip(outputs, labels, strict=True)):
        for kind, x, y, right, low in truth[truth[:, 0] >= 0]:
            box = [x, y, right - x, low - y]
            wanted.append(
                {
                    "id": len(wanted) + 1,
                    "image_id": i,
                    "category_id": int(kind),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        for kind, score, x, y, right, low in rows[rows[:, 0] >= 0]:
            box = [x, y, right - x, low - y]
            found.append({"image_id": i, "category_id": int(kind), "score": score, "bbox": box})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(outputs))],
            "annotations": wanted,
            "categories": [{"id": k} for k in sorted({w["category_id"] for w in wanted})],
        }
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return 100 * run.stats[0], 100 * run.stats[1]


def test_map_agrees_with_counting_one_box_after_the_other() -> None:
    outputs, labels = boxes()
    found = measured("mean_average_precision", outputs, labels)
    each = [by_hand(outputs, labels, least) for least in np.linspace(0.5, 0.95, 10)]
    assert found.value == pytest.approx(sum(each) / 10)
    assert found.conditions["at_overlap_50"] == pytest.approx(each[0], abs=1e-5)
    assert found.spread is not None
    assert found.spread[0] < found.value < found.spread[1]
    assert found.count == 12


def test_map_agrees_with_coco() -> None:
    pytest.importorskip("pycocotools")
    for seed in range(3):
        outputs, labels = boxes(seed)
        found = measured("mean_average_precision", outputs, labels)
        whole, half = coco(outputs, labels)
        assert found.value == pytest.approx(whole)
        assert found.conditions["at_overlap_50"] == pytest.approx(half, abs=1e-5)


def test_all_found_is_100_and_nothing_found_is_0() -> None:
    _, labels = boxes()
    every = np.insert(labels, 1, 0.5, axis=2)
    assert measured("mean_average_precision", every, labels).value == pytest.approx(100)
    nothing = np.full((12, 1, 6), -1.0)
    assert measured("mean_average_precision", nothing, labels).value == 0
    found = paired("mean_average_precision", every, nothing, labels)
    assert found is not None
    assert found.difference == pytest.approx(-100)
    assert found.verdict("higher") == "worse"


def test_what_is_no_box_is_refused() -> None:
    outputs, labels = boxes()
    with pytest.raises(
        DataError,
        match=r"outputs of shape \(12, 85, 22\) and labels of shape \(12, 6, 5\) are not boxes; give",
    ):
        measured("mean_average_precision", np.zeros((12, 85, 22)), labels)
    with pytest.raises(DataError, match="outputs are of 12 images but labels of 11"):
        measured("mean_average_precision", outputs, labels[1:])
    with pytest.raises(DataError, match="no boxes to find: the labels of all images are padding"):
        measured("mean_average_precision", outputs, np.full((12, 1, 5), -1.0))
    labels[0, 0, 1] = np.nan
    with pytest.raises(DataError, match="1 of 360 numbers of the labels are not finite"):
        measured("mean_average_precision", outputs, labels)
