"""Messages between two processes of tersor: a line of JSON, and arrays as bytes. Nothing is run.

8 bytes     length of the header, little endian
header      JSON: {"arrays": [{"name", "dtype", "shape"} ...], and whatever is said}
bytes       of the arrays, one after the other, in C order
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.runtime import Arrays

_MOST = 1 << 28
"""Bytes of a header."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is said, and arrays by name."""

    fields: Mapping[str, Any]
    arrays: Arrays = field(default_factory=dict)


def send(stream: BinaryIO, message: Message) -> None:
    """Write a message and flush.

    Raises:
        OSError: the other side is gone. TargetError: an array that cannot be sent; nothing was
            written.
    """
    for name, array in message.arrays.items():
        # of a type that numpy does not know by itself, such as bfloat16, only bytes would arrive
        if array.dtype.kind in "OV":
            raise TargetError(
                f"array {name!r} is of {array.dtype}, which another process cannot get"
            )
    arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
    about = [
        {"name": name, "dtype": array.dtype.str, "shape": list(np.shape(message.arrays[name]))}
        for name, array in arrays.items()
    ]
    header = json.dumps({**message.fields, "arrays": about}).encode()
    stream.write(len(header).to_bytes(8, "little") + header)
    for array in arrays.values():
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> Message | None:
    """Read a message; None at the end of the stream.

    Raises:
        ValueError: what comes is not a message.
    """
    head = stream.read(8)
    if not head:
        return None
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > _MOST:
        raise ValueError("what came is not a message")
    fields = json.loads(_whole(stream, length))
    arrays = {}
    for about in fields.pop("arrays"):
        dtype, shape = np.dtype(about["dtype"]), tuple(about["shape"])
        if dtype.hasobject:
            raise ValueError("arrays of objects are not read")
        data = _whole(stream, dtype.itemsize * math.prod(shape))
        arrays[about["name"]] = np.frombuffer(data, dtype=dtype).reshape(shape)
    return Message(fields=fields, arrays=arrays)


def _whole(stream: BinaryIO, length: int) -> bytearray:
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        part = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not part:
            raise ValueError(f"the message ends after {done} of {length} bytes")
        done += part
    return data
