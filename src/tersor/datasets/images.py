"""Images in folders, one folder a class: "images:FOLDER" or "images:FOLDER?size=32"."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.core.context import SPLITS, Batch, Data
from tersor.core.errors import DataError, suggest
from tersor.datasets._batches import CALIBRATION, Batches, roles
from tersor.datasets._check import check

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_ALIASES = {"val": "validation", "valid": "validation"}
_Files = list[tuple[Path, int]]


def load(place: str) -> Data:
    """Read images as `x` float32 (N, 3, H, W) in [0, 1] and `labels` int64 (N,).

    FOLDER holds a folder for each class, or for each split (train, validation or val, test,
    calibration) with the classes inside. Labels count the class names in alphabetical order.
    Without splits, samples are dealt 80 / 10 / 10. Files are read when their batch is used.

    Args:
        place: "FOLDER" or "FOLDER?size=N": N x N pixels, bilinear. Without it all images must have
            one size.

    Raises:
        DataError: no such folder, no images, an image that cannot be read, or different sizes.
    """
    folder, size = _options(place)
    if not folder.is_dir():
        raise DataError(f"image folder {str(folder)!r} does not exist")
    where = f"images:{place}"
    inside = {_ALIASES.get(p.name, p.name): p for p in folder.iterdir() if p.is_dir()}
    splits = {name: path for name, path in inside.items() if name in SPLITS}
    if splits:
        classes = sorted({p.name for path in splits.values() for p in path.iterdir() if p.is_dir()})
        files = {name: _list(path, classes) for name, path in splits.items()}
    else:
        files = _deal(_list(folder, sorted(p.name for p in inside.values())))
    if not any(files.values()):
        raise DataError(
            f"image folder {str(folder)!r} holds no images in folders of classes "
            f"(such as {folder.name}/cat/1.png)"
        )
    empty = [name for name, found in files.items() if not found]
    if empty:
        raise DataError(f"image folder {str(folder)!r} has no images for the split {empty[0]!r}")
    if "calibration" not in files and "train" in files:
        some = np.random.default_rng(0).permutation(len(files["train"]))[:CALIBRATION]
        files["calibration"] = [files["train"][i] for i in sorted(some)]
    shape = size or _shape_of(next(iter(files.values()))[0][0])
    made = {name: _batches(found, shape, size, name == "train") for name, found in files.items()}
    return check(Data(**made, origin=where), where)  # type: ignore[arg-type]  # keys are names of splits


def _options(place: str) -> tuple[Path, tuple[int, int] | None]:
    """Split "FOLDER?size=32"."""
    folder, mark, options = place.partition("?")
    size = None
    for option in filter(None, options.split("&")):
        name, _, value = option.partition("=")
        if name != "size":
            raise DataError(
                f"unknown option {name!r} of images.{suggest(name, ['size'])} It takes size=N"
            )
        if not value.isdigit() or not 0 < int(value) <= 8192:
            raise DataError(f"size of images must be a whole number from 1 to 8192, got {value!r}")
        size = (int(value), int(value))
    if mark and not options:
        raise DataError(f"no option after the question mark in {place!r}; write FOLDER?size=32")
    return Path(folder), size


def _list(folder: Path, classes: Sequence[str]) -> _Files:
    return [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in _SUFFIXES
    ]


def _deal(files: _Files) -> dict[str, _Files]:
    dealt = roles(len(files), [label for _, label in files]) if files else {}
    return {name: [files[i] for i in rows] for name, rows in dealt.items()}


def _batches(
    files: _Files, shape: tuple[int, int], size: tuple[int, int] | None, shuffle: bool
) -> Batches:
    def read(rows: np.ndarray) -> Batch:
        chosen = [files[i] for i in rows]
        return {
            "x": torch.stack([_read(file, shape, size) for file, _ in chosen]),
            "labels": torch.tensor([label for _, label in chosen]),
        }

    return Batches(read, len(files), shuffle=shuffle)


def _shape_of(file: Path) -> tuple[int, int]:
    return tuple(_read(file, None, None).shape[1:])  # type: ignore[return-value]  # height and width


def _read(file: Path, shape: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """Read one image as (3, H, W) in [0, 1]."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                rgb = image.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"image {str(file)!r} cannot be read: {reason}") from error
    if size is not None:
        rgb = rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(rgb, np.float32) / 255).permute(2, 0, 1).contiguous()
    if shape is not None and tuple(pixels.shape[1:]) != shape:
        height, width = pixels.shape[1:]
        raise DataError(
            f"image {str(file)!r} is {height} x {width}, others are {shape[0]} x {shape[1]}; "
            "write images:FOLDER?size=N to resize all"
        )
    return pixels
