"""Check a safetensors file strictly before anything reads it.

Source: the format's own description (safetensors README, "Format"): 8 bytes of header length, a
JSON header, then the data without holes. Each way of breaking it has a message of its own.
"""

import json
import math
from pathlib import Path
from typing import Any

from tersor.core.errors import ModelError
from tersor.core.sniffing import foreign

_LARGEST_HEADER = 100_000_000
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
}


class _DuplicateError(ValueError):
    pass


def check(file: Path) -> None:
    """Refuse a file that is not whole and exact safetensors.

    Raises:
        ModelError: with the file, the entry and what is wrong with it.
    """
    reason = _broken(file)
    if reason:
        between = ":" if reason.startswith(("header", "tensor")) else ""
        raise ModelError(f"weights {str(file)!r}{between} {reason}")


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return dtype, shape and data_offsets of each tensor of a file that `check` let through."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


def _broken(file: Path) -> str:
    reason = foreign(file, instead="a safetensors file")
    if reason and not reason.startswith("is a safetensors"):
        return reason
    size = file.stat().st_size
    if size < 8:
        return f"has {size} bytes, fewer than the 8 of a safetensors header length"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LARGEST_HEADER:
            return f"header length {length} is above the limit of 100 MB; not a safetensors file"
        if length > size - 8:
            return f"header length {length} is more than the file's {size} bytes; it is cut off"
        raw = stream.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"header is not UTF-8 (byte {error.start})"
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateError as error:
        return f"header has the entry {str(error)!r} twice"
    except (ValueError, RecursionError) as error:
        return f"header is not JSON: {error}"
    if not isinstance(header, dict):
        return f"header is not a JSON object but a {type(header).__name__}"
    return _entries(header, size - 8 - length)


def _entries(header: dict[str, Any], available: int) -> str:
    """Check every tensor's dtype, shape and place, and that the places fill the data exactly."""
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        reason = _entry(entry, available)
        if reason:
            return f"tensor {name!r}: {reason}"
        begin, end = entry["data_offsets"]
        places.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(places):
        if begin < reached:
            return f"tensor {name!r}: its data overlap those of another tensor (offset {begin})"
        if begin > reached:
            return f"tensor {name!r}: there is a hole of {begin - reached} bytes before its data"
        reached = end
    if reached < available:
        return f"has {available - reached} trailing bytes after the last tensor"
    return ""


def _entry(entry: Any, available: int) -> str:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "must have exactly dtype, shape and data_offsets"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _BITS:
        return f"unknown dtype {entry['dtype']!r}"
    if not isinstance(shape, list) or not all(_is_whole(n) for n in shape):
        return f"shape {shape!r} is not a list of whole numbers"
    if any(n < 0 for n in shape):
        return f"shape {shape} has a negative dimension"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_whole(n) for n in offsets):
        return f"data_offsets {offsets!r} are not two whole numbers"
    begin, end = offsets
    if begin < 0 or end < begin:
        return f"data_offsets {offsets} are negative or in the wrong order"
    if end > available:
        return f"data_offsets {offsets} lead past the end of the file ({available} bytes of data)"
    bits = math.prod(shape) * _BITS[entry["dtype"]]
    if bits != 8 * (end - begin):
        return (
            f"shape {shape} of {entry['dtype']} needs {bits // 8} bytes, "
            f"data_offsets give {end - begin}"
        )
    return ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise _DuplicateError(key)
        made[key] = value
    return made
