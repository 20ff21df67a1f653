"""Average precision of boxes, as COCO counts it, as a function of how often each image counts.

Legend: N images, D boxes found, G boxes wanted, T thresholds of overlap, R draws of images.
"""

from dataclasses import dataclass

import numpy as np

from tersor.core.errors import DataError

OVERLAPS = np.linspace(0.5, 0.95, 10)
"""Intersection over union from which on a box counts as found: COCO's ten."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is read off."""
MOST = 100
"""Boxes of a class and image that count: the best."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """All boxes of one class that a network found, best first."""

    image: np.ndarray
    """The image of each, (D,)."""
    right: np.ndarray
    """Whether each is a box wanted that none before it was, at each threshold, (T, D)."""
    wanted: np.ndarray
    """Boxes of the class that each image holds, (N,)."""

    def precision(self, draws_RN: np.ndarray) -> np.ndarray:
        """Return the average precision at each threshold, (R, T); NaN where none is wanted."""
        wanted_R = draws_RN @ self.wanted
        weight_RD = draws_RN[:, self.image]
        answers_RD = np.maximum(weight_RD.cumsum(1), 1)
        made_RT = np.full((len(draws_RN), len(self.right)), np.nan)
        for t, right_D in enumerate(self.right):
            right_RD = (weight_RD * right_D).cumsum(1)
            best_RD = np.maximum.accumulate((right_RD / answers_RD)[:, ::-1], 1)[:, ::-1]
            for r in np.flatnonzero(wanted_R):
                place = np.searchsorted(right_RD[r] / wanted_R[r], RECALLS)
                made_RT[r, t] = np.append(best_RD[r], 0.0)[place].mean()
        return made_RT


def found_by_class(outputs: np.ndarray, labels: np.ndarray) -> list[Found]:
    """Match the boxes found with those wanted.

    Args:
        outputs: (N, D, 6), rows of class, score, x1, y1, x2, y2; a negative class is padding.
        labels: (N, G, 5), rows of class, x1, y1, x2, y2; a negative class is padding.

    Returns:
        One entry for each class in the labels.

    Source:
        Lin et al., "Microsoft COCO", 2014, as its evaluation code does it: in the order of their
        scores, each box takes the wanted box of its class that it overlaps most, of those left.

    Raises:
        DataError: arrays of other shapes, or labels without a box.
    """
    if outputs.ndim != 3 or outputs.shape[2] != 6 or labels.ndim != 3 or labels.shape[2] != 5:
        raise DataError(
            f"outputs of shape {outputs.shape} and labels of shape {labels.shape} are not boxes; "
            "give outputs (N, D, 6) with rows of class, score, x1, y1, x2, y2 and labels (N, G, 5) "
            "with rows of class, x1, y1, x2, y2; rows of a negative class are padding"
        )
    if len(outputs) != len(labels):
        raise DataError(f"outputs are of {len(outputs)} images but labels of {len(labels)}")
    bad = int(np.count_nonzero(~np.isfinite(labels)))
    if bad:
        raise DataError(f"{bad} of {labels.size} numbers of the labels are not finite")
    kinds = np.unique(labels[..., 0][labels[..., 0] >= 0])
    if not kinds.size:
        raise DataError("no boxes to find: the labels of all images are padding")
    return [_found(outputs, labels, kind) for kind in kinds]


def _found(outputs: np.ndarray, labels: np.ndarray, kind: float) -> Found:
    images, scores, rights, wanted = [], [], [], []
    for image, (rows, boxes) in enumerate(zip(outputs, labels, strict=True)):
        ours, theirs = rows[rows[:, 0] == kind], boxes[boxes[:, 0] == kind]
        ours = ours[np.argsort(-ours[:, 1], kind="stable")[:MOST]]
        images.append(np.full(len(ours), image))
        scores.append(ours[:, 1])
        rights.append(_matched(overlaps(ours[:, 2:], theirs[:, 1:])))
        wanted.append(len(theirs))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Found(
        image=np.concatenate(images)[order],
        right=np.concatenate(rights, axis=1)[:, order],
        wanted=np.array(wanted, dtype=np.float64),
    )


def _matched(overlap_DG: np.ndarray) -> np.ndarray:
    """Tell which of an image's boxes, best first, are right at each threshold, (T, D)."""
    right = np.zeros((len(OVERLAPS), len(overlap_DG)), dtype=bool)
    if not overlap_DG.size:
        return right
    for t, least in enumerate(OVERLAPS):
        left = overlap_DG.copy()
        for d in range(len(left)):
            best = int(left[d].argmax())
            if left[d, best] >= least:
                right[t, d] = True
                left[:, best] = -1.0
    return right


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return intersection over union of (D, 4) with (G, 4) boxes, corners x1, y1, x2, y2."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.maximum(high - low, 0).prod(2)
    areas = (first[:, 2:] - first[:, :2]).prod(1)[:, None] + (second[:, 2:] - second[:, :2]).prod(1)
    union = areas - common
    return np.asarray(np.where(union > 0, common / np.where(union > 0, union, 1), 0.0))
