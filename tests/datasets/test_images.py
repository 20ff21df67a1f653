"""Images in folders of classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from tersor.core.errors import DataError
from tersor.datasets import images


def draw(folder, count=10, size=(6, 6), mode="RGB") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        shape = (*size, 3) if mode == "RGB" else size
        Image.fromarray(np.full(shape, 10 * i, np.uint8), mode=None).save(folder / f"{i:02}.png")


def test_classes_are_dealt_into_splits(tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / name, 20)
    data = images.load(str(tmp_path))
    batch = next(iter(data.test))
    assert batch["x"].shape == (4, 3, 6, 6)
    assert batch["x"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    assert sum(len(b["labels"]) for b in data.train) == 32
    assert sum(len(b["labels"]) for b in data.calibration) == 32
    assert data.origin == f"images:{tmp_path}"


def test_folders_of_splits(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            draw(tmp_path / split / name, 3)
    data = images.load(str(tmp_path))
    assert len(next(iter(data.validation))["x"]) == 6
    torch.testing.assert_close(next(iter(data.test))["x"][1], torch.full((3, 6, 6), 10 / 255))


def test_size_resizes_and_gray_becomes_rgb(tmp_path):
    draw(tmp_path / "test" / "a", 2, size=(9, 5))
    draw(tmp_path / "test" / "b", 2, size=(3, 3), mode="L")
    batch = next(iter(images.load(f"{tmp_path}?size=8").test))
    assert batch["x"].shape == (4, 3, 8, 8)


def test_train_is_shuffled_by_its_seed(tmp_path):
    draw(tmp_path / "train" / "a", 20)
    train = images.load(str(tmp_path)).train
    first = next(iter(train))["x"]
    assert torch.equal(first, next(iter(train))["x"])
    train.seed = 3
    assert not torch.equal(first, next(iter(train))["x"])


def test_different_sizes_are_refused(tmp_path):
    draw(tmp_path / "test" / "a", 2)
    draw(tmp_path / "test" / "b", 2, size=(7, 9))
    with pytest.raises(
        DataError, match=r"is 7 x 9, others are 6 x 6; write images:FOLDER\?size=N to resize all"
    ):
        images.load(str(tmp_path))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("?sise=3", r"unknown option 'sise' of images. Did you mean 'size'\?"),
        ("?size=big", "size of images must be a whole number from 1 to 8192, got 'big'"),
        ("?size=0", "got '0'"),
        ("?", "no option after the question mark"),
    ],
)
def test_options(tmp_path, option, said):
    with pytest.raises(DataError, match=said):
        images.load(f"{tmp_path}{option}")


def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        images.load(str(tmp_path / "none"))
    with pytest.raises(DataError, match="holds no images in folders of classes"):
        images.load(str(tmp_path))
    (tmp_path / "train" / "a").mkdir(parents=True)
    draw(tmp_path / "test" / "a", 2)
    with pytest.raises(DataError, match="has no images for the split 'train'"):
        images.load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_a_damaged_image_is_named(tmp_path, content):
    draw(tmp_path / "test" / "a", 2)
    (tmp_path / "test" / "a" / "01.png").write_bytes(content)
    with pytest.raises(DataError, match=r"image '.*01\.png' cannot be read"):
        images.load(str(tmp_path))


def test_an_image_that_unpacks_to_too_much_is_refused(tmp_path):
    folder = tmp_path / "test" / "a"
    folder.mkdir(parents=True)
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    with pytest.raises(
        DataError, match=r"bomb\.png' cannot be read: Image size \(400000000 pixels\) exceeds limit"
    ):
        images.load(str(tmp_path))
