"""Arrays in .npz files."""

import numpy as np
import pytest
import torch

from tersor.core.errors import DataError
from tersor.datasets import arrays


def save(tmp_path, **made) -> str:
    np.savez(tmp_path / "x.npz", **made)
    return str(tmp_path / "x.npz")


def test_splits_by_name(tmp_path):
    place = save(
        tmp_path,
        train_x=np.arange(600.0).reshape(300, 2),
        train_labels=np.arange(300),
        test_x=np.ones((10, 2), np.float64),
        test_labels=np.zeros(10, np.uint8),
        calibration_x=np.ones((5, 2)),
    )
    data = arrays.load(place)
    assert data.origin == f"arrays:{place}"
    assert data.validation is None
    batch = next(iter(data.test))
    assert (batch["x"].dtype, batch["labels"].dtype, len(batch["x"])) == (
        torch.float32,
        torch.int64,
        10,
    )
    assert set(next(iter(data.calibration))) == {"x"}
    seen = torch.cat([b["labels"] for b in data.train])
    assert not torch.equal(seen, torch.arange(300))
    assert torch.equal(seen.sort().values, torch.arange(300))
    for batch in data.train:
        torch.testing.assert_close(batch["x"][:, 0], 2 * batch["labels"].float())


def test_calibration_comes_from_train(tmp_path):
    data = arrays.load(save(tmp_path, train_x=np.arange(300.0)[:, None]))
    found = torch.cat([b["x"] for b in data.calibration])
    assert torch.equal(found[:, 0], torch.arange(256.0))


def test_plain_names_are_dealt_by_class(tmp_path):
    place = save(tmp_path, x=np.arange(100.0)[:, None], label=np.arange(100) % 2)
    data = arrays.load(place)
    parts = {
        name: torch.cat([b["x"][:, 0] for b in getattr(data, name)])
        for name in ("train", "validation", "test")
    }
    assert {name: len(p) for name, p in parts.items()} == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(100.0))
    assert int(next(iter(data.test))["labels"].sum()) == 5


def test_pixels_become_numbers_in_0_1(tmp_path):
    batch = next(
        iter(
            arrays.load(
                save(
                    tmp_path,
                    test_x=np.full((4, 2, 2), 255, np.uint8),
                    test_mask=np.ones((4, 2), bool),
                )
            ).test
        )
    )
    assert batch["x"].dtype == torch.float32
    assert batch["x"].max() == 1
    assert batch["mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            {"x": np.ones((4, 2)), "labels": np.ones(5)},
            "arrays have different lengths: 'x' 4, 'labels' 5",
        ),
        (
            {"test_x": np.ones((4, 2)), "test_labels": np.ones(5)},
            "arrays of split 'test' have different lengths",
        ),
        (
            {"test_x": np.ones((4, 2)), "y": np.ones(4)},
            "'y' name no split, but others do; write SPLIT_NAME",
        ),
        ({"x": np.ones((4, 2))}, "has 4 samples, too few to deal out; name the splits"),
        (
            {"test_x": np.array([[1.0], [np.nan], [np.inf]])},
            "'test_x' has NaN or infinite values, first in sample 1",
        ),
        ({"test_x": np.float64(3)}, "'test_x' is a single value, not samples"),
        ({"test_x": np.array(["a", "b"])}, "'test_x' has type <U1, not numbers"),
        ({"test_x": np.array([1j])}, "has type complex128, not numbers"),
        ({"test_labels": np.ones(3, np.int64)}, "has no inputs; name them as forward's parameters"),
        ({"test_x": np.ones((0, 3))}, "holds no arrays"),
        ({}, "is an empty zip archive"),
    ],
)
def test_what_is_refused(tmp_path, made, said):
    with pytest.raises(DataError) as caught:
        arrays.load(save(tmp_path, **made))
    assert said in str(caught.value)


def test_real_data(shared):
    data = arrays.load(str(shared / "data" / "mnist" / "test.npz"))
    batch = next(iter(data.test))
    assert batch["image"].shape == (64, 28, 28)
    assert batch["labels"].dtype == torch.int64
