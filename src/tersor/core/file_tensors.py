"""Where the tensors are in the files that runtimes read: offsets, widths and rows.

ONNX files (protobuf), OpenVINO's `.bin` beside its `.xml`, PyTorch's `.pt2` and other zip files
without compression, and `.safetensors`. Read with the standard library alone. A file of another
kind, or one that is not as expected, has no tensors here: it is then packed as a whole.
"""

import json
import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

_SMALLEST = 64
"""Bytes; of fewer, the description takes more than packing saves."""
_ONNX_WIDTHS = {
    **dict.fromkeys((1, 6, 12), 4),
    **dict.fromkeys((4, 5, 10, 16), 2),
    **dict.fromkeys((7, 11, 13), 8),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 21, 22, 23), 1),
}
"""Of ONNX's numbers of element types; of 4-bit types two elements share a byte."""
_OPENVINO_WIDTHS = {
    **dict.fromkeys(("f32", "i32", "u32"), 4),
    **dict.fromkeys(("f16", "bf16", "i16", "u16"), 2),
    **dict.fromkeys(("f64", "i64", "u64"), 8),
}
_SAFETENSORS_WIDTHS = {
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F64", "I64", "U64"), 8),
}


_UNEXPECTED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
    ElementTree.ParseError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading a file that is not what its name says ends in."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A tensor in a file."""

    start: int
    """Of its first byte."""
    count: int
    """Elements."""
    width: int
    """Bytes of an element: 1, 2, 4 or 8."""
    row: int = 1
    """Elements that belong together, such as the inputs of one output channel; divides `count`."""

    @property
    def stop(self) -> int:
        """Return the end of its last byte."""
        return self.start + self.count * self.width


def spans(file: Path, data: bytes) -> list[Span]:
    """Find the tensors in a file's bytes, in order, none over another."""
    kinds = {
        ".onnx": _of_onnx,
        ".pt2": _of_zip,
        ".safetensors": _of_safetensors,
    }
    try:
        if file.suffix == ".bin" and file.with_suffix(".xml").is_file():
            found = list(_of_openvino(file.with_suffix(".xml")))
        elif file.suffix in kinds:
            found = list(kinds[file.suffix](memoryview(data)))
        else:
            found = []
    except _UNEXPECTED:
        return []
    return list(_apart(found, len(data)))


def _apart(found: Sequence[Span], length: int) -> Iterator[Span]:
    end = 0
    for span in sorted(found, key=lambda span: span.start):
        large = span.count * span.width >= _SMALLEST
        if large and end <= span.start and span.stop <= length and span.count % span.row == 0:
            yield span
            end = span.stop


def _span(start: int, size: int, width: int, shape: Sequence[int]) -> Span:
    count = size // width
    row = math.prod(shape[1:]) if len(shape) > 1 else 1
    return Span(
        start=start, count=count, width=width, row=row if row > 0 and count % row == 0 else 1
    )


def _of_onnx(data: memoryview) -> Iterator[Span]:
    """Read ModelProto.graph (7), GraphProto.initializer (5), TensorProto (1, 2, 9)."""
    for graph_field, graph, stop in _fields(data, 0, len(data)):
        if graph_field != 7:
            continue
        for field, begin, end in _fields(data, graph, stop):
            if field == 5:
                shape: list[int] = []
                kind, raw = 0, (0, 0)
                for part, first, last in _fields(data, begin, end):
                    if part == 1:
                        shape += _numbers(data, first, last)
                    elif part == 2:
                        kind = _varint(data, first)[0]
                    elif part == 9:
                        raw = first, last
                if kind in _ONNX_WIDTHS and raw[1] > raw[0]:
                    yield _span(raw[0], raw[1] - raw[0], _ONNX_WIDTHS[kind], shape)


def _fields(data: memoryview, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Go through the fields of a protobuf message: number, start and end of the value."""
    while at < stop:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            end = _varint(data, at)[1]
        elif kind == 1:
            end = at + 8
        elif kind == 2:
            length, at = _varint(data, at)
            end = at + length
        elif kind == 5:
            end = at + 4
        else:
            raise ValueError(f"protobuf wire type {kind}")
        if end > stop:
            raise ValueError("a field beyond its message")
        yield key >> 3, at, end
        at = end


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _numbers(data: memoryview, at: int, stop: int) -> list[int]:
    """Read one number, or several packed ones."""
    found = []
    while at < stop:
        value, at = _varint(data, at)
        found.append(value)
    return found


def _of_openvino(description: Path) -> Iterator[Span]:
    root = ElementTree.parse(description).getroot()  # written by OpenVINO a moment ago
    for layer in root.iter("layer"):
        about = layer.find("data")
        if layer.get("type") == "Const" and about is not None:
            shape = [int(n) for n in about.get("shape", "").split(",") if n.strip()]
            width = _OPENVINO_WIDTHS.get(about.get("element_type", ""), 1)
            yield _span(int(about.attrib["offset"]), int(about.attrib["size"]), width, shape)


def _of_zip(data: memoryview) -> Iterator[Span]:
    """Take the members as arrays of float32, where their size allows."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        for member in archive.infolist():
            if member.compress_type == zipfile.ZIP_STORED and not member.filename.endswith(".json"):
                name, extra = struct.unpack_from("<HH", data, member.header_offset + 26)
                start = member.header_offset + 30 + name + extra
                width = 4 if member.file_size % 4 == 0 else 1
                yield _span(start, member.file_size, width, ())


def _of_safetensors(data: memoryview) -> Iterator[Span]:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(bytes(data[8 : 8 + length]))
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            width = _SAFETENSORS_WIDTHS.get(about["dtype"], 1)
            yield _span(8 + length + begin, end - begin, width, about["shape"])
