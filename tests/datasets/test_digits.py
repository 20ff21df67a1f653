"""The embedded digits."""

import pytest
import torch

from tersor.core.errors import DataError
from tersor.datasets import digits


def rows(split) -> torch.Tensor:
    return torch.cat([batch["x"].flatten(1) for batch in split])


def test_shapes_ranges_and_sizes():
    data = digits.load()
    sizes = {
        name: sum(len(b["labels"]) for b in getattr(data, name))
        for name in ("calibration", "train", "validation", "test")
    }
    assert sizes == {"calibration": 256, "train": 907, "validation": 445, "test": 445}
    first = next(iter(data.test))
    assert first["x"].shape == (64, 1, 8, 8)
    assert (first["x"].dtype, first["labels"].dtype) == (torch.float32, torch.int64)
    assert 0 <= first["x"].min() < first["x"].max() <= 1
    assert data.origin == "digits"


def test_splits_are_fixed_and_share_no_sample():
    one, other = digits.load(), digits.load()
    assert torch.equal(rows(one.test), rows(other.test))
    assert torch.equal(rows(one.train), rows(other.train))
    import sklearn.datasets

    count = len(sklearn.datasets.load_digits().target)
    together = sum(len(rows(s)) for s in (one.train, one.validation, one.test))
    assert together == count
    classes = torch.cat([b["labels"] for b in one.test]).bincount()
    assert classes.min() >= 43


def test_train_is_shuffled_by_its_seed_alone():
    train = digits.load().train
    first = rows(train)
    assert torch.equal(first, rows(train))
    train.seed = 1
    assert not torch.equal(first, rows(train))
    assert torch.equal(first.sort(0).values, rows(train).sort(0).values)
    assert len(train) == 15


def test_calibration_comes_from_train():
    data = digits.load()
    train = {tuple(r.tolist()) for r in rows(data.train)}
    assert all(tuple(r.tolist()) in train for r in rows(data.calibration))


def test_a_place_is_refused():
    with pytest.raises(DataError, match="takes no place, got 'x'"):
        digits.load("x")
