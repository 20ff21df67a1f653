"""The weights of a folder: one safetensors file, or several with an index. Checked before use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.core.errors import ModelError
from tersor.core.sniffing import foreign
from tersor.sources import _safetensors
from tersor.sources._misfit import shorten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHERS = {
    "tf_model.h5": "TensorFlow's weights",
    "flax_model.msgpack": "Flax's weights",
    "model.onnx": "an ONNX model, which `onnx:FILE` reads",
    "adapter_model.safetensors": "an adapter (PEFT): merge it into its model and save that",
}
_LARGEST_INDEX = 64 << 20
_CONVERT = (
    "convert it once, where you trust it: "
    "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors"
)


def find_shards(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a folder, each whole, all belonging together.

    Raises:
        ModelError: there are none, or only pickles; a file is damaged; the index names one that is
            missing, leads outside or is of another model, or a tensor is in two.
    """
    if (folder / SINGLE).is_file():
        _safetensors.check(folder / SINGLE)
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    for name in _PICKLED:
        if (folder / name).exists():
            raise ModelError(
                f"folder {str(folder)!r} has its weights in {name!r}, a pickle, which can run code "
                f"when loaded and is not read; {_CONVERT}"
            )
    other = [f"{name!r} is {what}" for name, what in _OTHERS.items() if (folder / name).exists()]
    raise ModelError(
        f"folder {str(folder)!r} has no {SINGLE} and no {INDEX}"
        + (f"; {'; '.join(other)}" if other else "; was the download complete?")
    )


def shapes_of(shards: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {
        name: tuple(entry["shape"])
        for file in shards
        for name, entry in _safetensors.read_header(file).items()
    }


def read_json(file: Path, largest: int) -> dict[str, Any]:
    """Read a file that must hold a JSON object.

    Raises:
        ModelError: it does not, or is larger than `largest` bytes.
    """
    reason = foreign(file)
    if reason:
        raise ModelError(f"{str(file)!r} {reason}")
    if file.stat().st_size > largest:
        raise ModelError(f"{str(file)!r} is larger than {largest >> 20} MiB")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{str(file)!r} is not a JSON object but a {type(raw).__name__}")
    return raw


def _indexed(index: Path) -> tuple[Path, ...]:
    raw = read_json(index, _LARGEST_INDEX)
    places = raw.get("weight_map")
    where = f"index {str(index)!r}"
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(shard, str) for shard in places.values())
    ):
        raise ModelError(f"{where} has no weight_map from tensors to files")
    for shard in dict.fromkeys(places.values()):
        _check_shard(index.parent, shard, where, [n for n, s in places.items() if s == shard])
    shards = tuple(index.parent / shard for shard in dict.fromkeys(places.values()))
    holders: dict[str, str] = {}
    for file in shards:
        _check_content(file, places, holders, where)
    _check_total(raw.get("metadata"), shards, where)
    return shards


def _check_shard(folder: Path, shard: str, where: str, names: list[str]) -> None:
    if "/" in shard or "\\" in shard or ":" in shard or "\0" in shard or not shard.strip("."):
        raise ModelError(f"{where} names a shard outside its folder: {shard[:80]!r}")
    if not shard.endswith(".safetensors"):
        raise ModelError(f"{where} names a shard that is no safetensors file: {shard[:80]!r}")
    if not (folder / shard).is_file():
        raise ModelError(
            f"{where}: shard {shard!r} is missing, which holds {shorten(names)}; "
            f"was the download complete?"
        )
    _safetensors.check(folder / shard)


def _check_content(
    file: Path, places: Mapping[str, str], holders: dict[str, str], where: str
) -> None:
    """Compare what a shard holds with what the index says of it."""
    held = _safetensors.read_header(file)
    for name in held:
        if name in holders:
            raise ModelError(
                f"{where}: tensor {name!r} is in two shards: {holders[name]!r} and {file.name!r}"
            )
        holders[name] = file.name
    absent = [name for name, shard in places.items() if shard == file.name and name not in held]
    strange = [name for name in held if places.get(name) != file.name]
    if absent or strange:
        parts = [
            f"{len(names)} {what} ({shorten(names)})"
            for names, what in ((absent, "are not in it"), (strange, "should not be in it"))
            if names
        ]
        raise ModelError(
            f"{where}: shard {file.name!r} is not the one that was indexed, of its tensors "
            f"{' and '.join(parts)}; is it a shard of another model?"
        )


def _check_total(metadata: Any, shards: tuple[Path, ...], where: str) -> None:
    """Compare the bytes of all tensors with what the index says."""
    wanted = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(wanted, int | float) or isinstance(wanted, bool):
        return
    sizes = {
        file.name: sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for entry in _safetensors.read_header(file).values()
        )
        for file in shards
    }
    if sum(sizes.values()) != int(wanted):
        each = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ModelError(
            f"{where} says that its tensors have {int(wanted)} bytes, the shards hold "
            f"{sum(sizes.values())} ({each}); is one of them a shard of another model?"
        )
