"""Packed files: weights that are pruned, shared or quantized, stored in the room they need.

    tersorP1  sha256 of the rest  files: name, skeleton, tensors

A packed file holds the files of a network. Of each, the bytes of large tensors are taken out and
written as what they are: elements by rows or columns; where one value is frequent, how far it is to
the next other value, and those values (Deep Compression's relative index); where there are few
values, the number of each in a table; then byte planes, each through LZMA. What is left of the file
is its skeleton, through LZMA, too. Everything comes back bit by bit.

A file is read with suspicion: its checksum first, then in pieces of bounded size, whose claims are
checked before memory is taken.

Source: Han et al., arXiv:1510.00149, sections 2 to 4; we use LZMA in place of Huffman codes, which
    finds repetition between neighbors, too.
"""

import hashlib
import lzma
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tersor.core.errors import ArtifactError
from tersor.core.file_tensors import Span, spans
from tersor.core.files import why

SUFFIX = ".packed"
_MAGIC = b"tersorP1"
_DIGEST = 32
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
_PIECE = 1 << 20
"""Elements of a tensor that are written together."""
_LONGEST_NAME = 255
_MOST_FILES = 1000
_RATIO = 1 << 14
"""LZMA makes no more than about 7,000 bytes of one."""
_TABLE = 256
_WHOLE = 1 << 23
"""Bytes of a file up to which it is also tried as one stream."""
_SAMPLE = 1 << 16
"""Elements that ways of writing are compared on."""
_STORED, _LZMA = 0, 1
_CONTEXTS = (0, 2, 4)
"""Bits of the byte before that LZMA's statistics may depend on."""
_TURNED, _GAPS, _CODES = 1, 2, 4


def is_packed(file: Path) -> bool:
    """Tell whether a file says that it is packed."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def pack(files: Sequence[Path], place: Path) -> Path:
    """Put `files` into one packed file, check that they come back, and remove them.

    Args:
        files: The first one is what a runtime loads.
        place: The file to write, which is returned.

    Raises:
        ArtifactError: the disk refuses, or what comes back differs.
    """
    body = bytearray(_number(len(files)))
    for file in files:
        if not _is_name(file.name):
            raise ArtifactError(f"{file.name!r} cannot be the name of a packed file")
        data = file.read_bytes()
        ways = [spans(file, data)]
        if len(data) <= _WHOLE:
            ways.append([])
        body += min((_file(file.name, data, tensors) for tensors in ways), key=len)
    digest = hashlib.sha256(body).digest()
    try:
        place.write_bytes(_MAGIC + digest + body)
        with unpacked(place) as first:
            for file in files:
                if first.with_name(file.name).read_bytes() != file.read_bytes():
                    raise ArtifactError(f"{file.name!r} does not come back from {place.name!r}")
        for file in files:
            file.unlink()
    except (OSError, ArtifactError) as error:
        place.unlink(missing_ok=True)
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"cannot write {place.name!r}: {why(error)}") from error
    return place


def unpack(file: Path, folder: Path) -> list[Path]:
    """Write the files that a packed file holds into `folder`; return them in order.

    Raises:
        ArtifactError: not packed, damaged, or the disk refuses.
    """
    try:
        data = file.read_bytes()
        return _unpack(data, folder)
    except OSError as error:
        raise ArtifactError(f"cannot unpack {file.name!r}: {why(error)}") from error
    except DamagedError as error:
        raise ArtifactError(
            f"{file.name!r} is damaged ({error}); run the compression again or restore the file"
        ) from error


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """Give the file that a runtime loads: `file` itself, or, inside, what is packed in it.

    Raises:
        ArtifactError: damaged.
    """
    if not is_packed(file):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        first = unpack(file, Path(folder))[0]
        if is_packed(first):
            raise ArtifactError(f"{file.name!r} holds a packed file, which is never written")
        yield first


class DamagedError(Exception):
    """What is wrong with a packed file."""


# --- files ---------------------------------------------------------------------------------------


def _file(name: str, data: bytes, tensors: Sequence[Span]) -> bytearray:
    pieces = [piece for span in tensors for piece in _pieces(span)]
    skeleton, done = bytearray(), 0
    befores = []
    for piece in pieces:
        skeleton += data[done : piece.start]
        befores.append(piece.start - done)
        done = piece.stop
    skeleton += data[done:]
    encoded = name.encode()
    body = bytearray(_number(len(encoded)) + encoded + _number(len(data)))
    _write_stream(body, bytes(skeleton))
    body += _number(len(pieces))
    for piece, before in zip(pieces, befores, strict=True):
        body += _number(before)
        _write_piece(body, data[piece.start : piece.stop], piece)
    return body


def _pieces(span: Span) -> Iterator[Span]:
    """Cut a tensor at rows, so that no piece is too long."""
    step = _PIECE // span.row * span.row or _PIECE
    row = span.row if span.row <= _PIECE else 1
    for start in range(0, span.count, step):
        count = min(step, span.count - start)
        begin = span.start + start * span.width
        yield replace(span, start=begin, count=count, row=row if count % row == 0 else 1)


def _unpack(data: bytes, folder: Path) -> list[Path]:
    body = memoryview(data)[len(_MAGIC) + _DIGEST :]
    if data[: len(_MAGIC)] != _MAGIC:
        raise DamagedError("it does not begin as a packed file")
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : len(_MAGIC) + _DIGEST]:
        raise DamagedError("its content is not what its checksum says")
    return read_body(body, folder)


def read_body(body: memoryview | bytes, folder: Path) -> list[Path]:
    """Read what comes after the checksum; every claim is checked.

    Raises:
        DamagedError: with what is wrong.
    """
    reader = _Reader(memoryview(body))
    found: list[Path] = []
    for _ in range(reader.number(_MOST_FILES)):
        found.append(_read_file(reader, folder, {file.name for file in found}))
    if not found:
        raise DamagedError("it holds no file")
    if not reader.at_end():
        raise DamagedError("bytes are left over")
    return found


def _read_file(reader: "_Reader", folder: Path, taken: set[str]) -> Path:
    try:
        name = bytes(reader.take(reader.number(_LONGEST_NAME))).decode()
    except UnicodeDecodeError as error:
        raise DamagedError("a file name is not text") from error
    if not _is_name(name) or name in taken:
        raise DamagedError(f"{name!r} is not the name of a file")
    size = reader.number(1 << 50)
    if size > shutil.disk_usage(folder).free:
        raise DamagedError(f"{name!r} would take {size} bytes, more than the disk has free")
    skeleton = _Stream(reader, size)
    place, left = folder / name, size
    with place.open("wb") as out:
        for _ in range(reader.number(len(reader.rest))):
            left -= skeleton.copy(out, reader.number(skeleton.left))
            piece = _read_piece(reader)
            left -= len(piece)
            if left < skeleton.left:
                break
            out.write(piece)
        if left == skeleton.left:
            left -= skeleton.copy(out, skeleton.left)
    if left:
        raise DamagedError(f"{name!r} has another size than it says")
    return place


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not any(c in name for c in "/\\\0:")


# --- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """How elements are written."""

    flags: int
    elements: np.ndarray
    """In the order of writing."""
    common: int = 0

    def streams(self) -> tuple[np.ndarray | None, list[np.ndarray]]:
        """Return the table, and arrays of bytes."""
        made: list[np.ndarray] = []
        values = self.elements
        if self.flags & _GAPS:
            where = np.flatnonzero(values != values.dtype.type(self.common))
            made.append(_gaps(where))
            values = values[where]
        table = None
        if self.flags & _CODES:
            table, codes = np.unique(values, return_inverse=True)
            values = codes.astype(np.uint8)
        planes = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
        return table, [*made, *np.ascontiguousarray(planes.T)]

    def size(self) -> int:
        """Return about how many bytes it takes."""
        table, streams = self.streams()
        own = 0 if table is None else table.nbytes
        return own + sum(min(len(_compress(s.tobytes(), 0)), len(s)) for s in streams)


def _write_piece(body: bytearray, data: bytes, span: Span) -> None:
    elements = np.frombuffer(data, _WIDTHS[span.width])
    sample = elements[: max(_SAMPLE // span.row, 1) * span.row]
    way = min(_ways(sample, span.row), key=_Way.size)
    way = _way(way.flags, elements, span.row, way.common)
    if way.flags & _CODES and len(np.unique(_others(way))) > _TABLE:
        way = replace(way, flags=way.flags & ~_CODES)
    table, streams = way.streams()
    body += bytes([way.flags, span.width]) + _number(span.count) + _number(span.row)
    if way.flags & _GAPS:
        body += _number(way.common)
    if table is not None:
        body += _number(len(table)) + table.tobytes()
    for stream in streams:
        _write_stream(body, stream.tobytes())


def _others(way: _Way) -> np.ndarray:
    """Return the elements that are not the common one, where gaps tell of that."""
    if not way.flags & _GAPS:
        return way.elements
    found: np.ndarray = way.elements[way.elements != way.elements.dtype.type(way.common)]
    return found


def _ways(elements: np.ndarray, row: int) -> Iterator[_Way]:
    kinds, counts = np.unique(elements, return_counts=True)
    common = int(kinds[counts.argmax()])
    few = 4 * len(kinds) <= len(elements) and len(kinds) <= _TABLE and elements.itemsize > 1
    frequent = counts.max() * 4 > len(elements)
    turnable = row > 1 and len(elements) % row == 0 and len(elements) > row
    for turned in (0, _TURNED) if turnable else (0,):
        for gaps in (0, _GAPS) if frequent else (0,):
            yield _way(turned | gaps | (_CODES if few else 0), elements, row, common)


def _way(flags: int, elements: np.ndarray, row: int, common: int) -> _Way:
    if flags & _TURNED:
        elements = np.ascontiguousarray(elements.reshape(-1, row).T).reshape(-1)
    return _Way(flags, elements, common)


def _read_piece(reader: "_Reader") -> bytes:
    flags, width = reader.byte(), reader.byte()
    if flags > _TURNED + _GAPS + _CODES or width not in _WIDTHS:
        raise DamagedError(f"a tensor of unknown form {flags}, {width}")
    kind: Any = _WIDTHS[width]
    count = reader.number(_PIECE)
    row = reader.number(_PIECE)
    if not row or count % row:
        raise DamagedError(f"rows of {row} in {count} elements")
    common = reader.number(2 ** (8 * width) - 1) if flags & _GAPS else 0
    table = None
    if flags & _CODES:
        table = np.frombuffer(reader.take(reader.number(_TABLE) * width), kind)
    where = None
    others = count
    if flags & _GAPS:
        where = _positions(np.frombuffer(_read_stream(reader, count), np.uint8), count)
        others = len(where)
    planes = 1 if table is not None else width
    read = [np.frombuffer(_read_stream(reader, others), np.uint8) for _ in range(planes)]
    if any(len(plane) != others for plane in read):
        raise DamagedError("a tensor has too few values")
    if table is None:
        values = np.ascontiguousarray(np.stack(read, 1)).reshape(-1).view(kind)
    else:
        if others and int(read[0].max()) >= len(table):
            raise DamagedError("a value that is not in its table")
        values = table[read[0]]
    if where is not None:
        full = np.full(count, common, kind)
        full[where] = values
        values = full
    if flags & _TURNED:
        values = values.reshape(row, -1).T
    made: bytes = values.tobytes()
    return made


def _gaps(where: np.ndarray) -> np.ndarray:
    """Write increasing positions as distances; 255 is that many elements without one."""
    gaps = np.diff(where, prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1) - 1
    made = np.full(int(ends[-1]) + 1 if len(ends) else 0, 255, np.uint8)
    made[ends] = gaps % 255
    return made


def _positions(gaps: np.ndarray, count: int) -> np.ndarray:
    at_one = gaps < 255
    steps = gaps.astype(np.int64) + at_one
    found: np.ndarray = np.cumsum(steps)[at_one] - 1
    if len(found) and int(found[-1]) >= count:
        raise DamagedError("a value beyond the end of its tensor")
    return found


# --- bytes ---------------------------------------------------------------------------------------


def _filters(length: int, literal_context: int = 0) -> list[dict[str, Any]]:
    window = min(max(4096, 1 << (max(length, 1) - 1).bit_length()), 1 << 26)
    return [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": window,
            "lc": literal_context,
            "lp": 0,
            "pb": 0,
        }
    ]


def _compress(data: bytes, literal_context: int) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_filters(len(data), literal_context))


def _write_stream(body: bytearray, data: bytes, contexts: Sequence[int] = _CONTEXTS) -> None:
    """Write bytes by LZMA; as they are where that is no longer."""
    made, head = data, data[:_SAMPLE]
    tried = {context: len(_compress(head, context)) for context in contexts}
    context = min(tried, key=lambda c: tried[c])
    if tried[context] < len(head):
        made = _compress(data, context)
    packed = len(made) < len(data)
    body += bytes([_LZMA if packed else _STORED]) + _number(len(data))
    if packed:
        body += _number(len(made))
    body += made if packed else data


def _read_stream(reader: "_Reader", most: int) -> bytes:
    """Read a stream that is short enough to be held."""
    stream = _Stream(reader, most)
    return stream.read(stream.left)


class _Stream:
    """Bytes that are decoded as they are asked for, so that a claim takes no memory."""

    left: int
    """Bytes that are not read yet."""

    def __init__(self, reader: "_Reader", most: int) -> None:
        kind, self.left = reader.byte(), reader.number(most)
        if kind not in (_STORED, _LZMA):
            raise DamagedError(f"a stream of unknown kind {kind}")
        count = reader.number(len(reader.rest)) if kind == _LZMA else self.left
        self._raw = reader.take(count)
        self._decoder = None
        if kind == _LZMA:
            if self.left > count * _RATIO:
                raise DamagedError(f"{self.left} bytes are claimed to come of {count}")
            filters = _filters(self.left)
            self._decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)

    def read(self, count: int) -> bytes:
        """Return the next bytes; after the last ones the stream must be at its end."""
        made = bytearray()
        try:
            while len(made) < count:
                part = self._next(count - len(made))
                if not part:
                    raise DamagedError("a stream has another length than it says")
                made += part
            self.left -= count
            if not self.left and not self._ends():
                raise DamagedError("a stream has another length than it says")
        except (lzma.LZMAError, EOFError) as error:
            raise DamagedError("a stream cannot be decoded") from error
        return bytes(made)

    def copy(self, out: BinaryIO, count: int) -> int:
        """Write the next bytes to a file, a part at a time."""
        for start in range(0, count, _PIECE) or (0,):
            out.write(self.read(min(count - start, _PIECE)))
        return count

    def _next(self, most: int) -> bytes:
        if self._decoder is None:
            taken, self._raw = self._raw[:most], self._raw[most:]
            return bytes(taken)
        if self._decoder.eof:
            return b""
        given, self._raw = self._raw, memoryview(b"")  # the decoder keeps what it does not need yet
        return self._decoder.decompress(given, max_length=most)

    def _ends(self) -> bool:
        """Tell whether nothing is left; the end mark may come after the last byte."""
        if self._decoder is None:
            return True
        extra = b"" if self._decoder.eof else self._next(1)
        return self._decoder.eof and not extra and not self._decoder.unused_data


def _number(value: int) -> bytes:
    """Write a number in groups of seven bits, the low ones first."""
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
    return bytes(made)


class _Reader:
    """Reads a body from its start."""

    rest: memoryview

    def __init__(self, body: memoryview) -> None:
        self.rest = body

    def at_end(self) -> bool:
        return not len(self.rest)

    def take(self, count: int) -> memoryview:
        if count > len(self.rest):
            raise DamagedError("it is cut off")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, most: int) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                break
        else:
            raise DamagedError("a number without an end")
        if value > most:
            raise DamagedError(f"a number of {value}, where at most {most} can be")
        return value
