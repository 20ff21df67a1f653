"""1,797 handwritten digits of 8 x 8 pixels, which scikit-learn brings along."""

import numpy as np
import torch

from tersor.core.context import Data
from tersor.core.errors import DataError
from tersor.datasets._batches import CALIBRATION, of_tensors, roles


def load(place: str = "") -> Data:
    """Return batches of 64: `x` float32 (N, 1, 8, 8) in [0, 1], `labels` int64 (N,).

    907 samples train, 445 validate and 445 test, so that a point is four of them; the same ones
    every time, of each digit its share. Calibration is 256 of the training samples.
    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI 1998 (its test
    part, as scikit-learn ships it).

    Args:
        place: Must be empty.
    """
    from sklearn.datasets import load_digits

    if place:
        raise DataError(f"the data set 'digits' takes no place, got {place!r}")
    raw = load_digits()
    images = torch.from_numpy((raw.images / 16).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    tensors = {
        name: {"x": images[rows], "labels": labels[rows]}
        for name, rows in roles(len(labels), raw.target, parts=4).items()
    }
    some = np.random.default_rng(0).permutation(len(tensors["train"]["x"]))[:CALIBRATION]
    return Data(
        calibration=of_tensors(
            {name: value[np.sort(some)] for name, value in tensors["train"].items()}
        ),
        train=of_tensors(tensors["train"], shuffle=True),
        validation=of_tensors(tensors["validation"]),
        test=of_tensors(tensors["test"]),
        origin="digits",
    )
