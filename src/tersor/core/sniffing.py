"""Tell what a file really is, by its first bytes; its name may lie."""

import re
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

_MAGIC = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras weights, for instance)"),
    (b"GGUF", "a GGUF file"),
    (b"ftrt", "a TensorRT plan"),
    (b"\x93NUMPY", "a NumPy .npy file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program or shared library"),
    (b"<?xml", "an XML file (an OpenVINO model, for instance)"),
)
_AFTER_SIZE = ((b"TFL3", "a TFLite file"), (b"ET12", "an ExecuTorch program"))
"""Marks of flat buffers, after four bytes."""
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_OLD_PICKLE = re.compile(rb"c[\w.]+\n[\w.]+\n|\(?[dlt](p0)?\n|[\]}]q\x00|\(c[\w.]+\n")
"""How pickles of protocols 0 and 1 begin, which have no mark: with a function, or a container."""
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
"""Endings of files that hold pickles."""
_PICKLES_ONLY = tuple(suffix for suffix in PICKLED if suffix != ".bin")
DAMAGED_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError)
"""What zipfile raises for archives that are damaged, or packed in a way that it cannot read."""
MAX_ENTRIES = 100_000
MAX_UNPACKED = 64 << 30
MAX_RATIO = 100
_LONGEST_END = 22 + 65535
"""Bytes of the end of a zip archive: its record and a comment."""
SMALL = 256 << 20
"""Archives that unpack to less than this may be packed as tightly as they like."""


def sniff(path: Path) -> str:
    """Say what a file is.

    Returns:
        "empty", "html", "lfs", "safetensors", "pickle", or words such as "a zip archive"; "" where
        its first bytes say nothing.
    """
    size = path.stat().st_size
    if size == 0:
        return "empty"
    with path.open("rb") as stream:
        head = stream.read(1024)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "lfs"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "html"
    if (
        len(head) > 8
        and head[8:9] == b"{"
        and int.from_bytes(head[:8], "little") < max(size, 1 << 32)
    ):
        return "safetensors"
    for magic, what in _AFTER_SIZE:
        if len(head) > 8 and head[4:8] == magic:
            return what
    if _is_pickle(head, path):
        return "pickle"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if len(head) > 262 and head[257:262] == b"ustar":
        return "a tar archive"
    return ""


def _is_pickle(head: bytes, path: Path) -> bool:
    """Tell a pickle, also one that joblib has compressed."""
    if head.startswith((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda", b"\x1f\x8b")):
        try:
            head = zlib.decompressobj(wbits=47).decompress(head, 64)  # zlib or gzip
        except zlib.error:
            return False
        return head.startswith(_PICKLES)
    if head.startswith(_PICKLES):
        return True
    if not _OLD_PICKLE.match(head):
        return False
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) == b"."


def foreign(path: Path, wanted: str = "", *, instead: str = "") -> str:
    """Say why a file cannot be read, in words to put after its name; nothing where it may be.

    Args:
        path: The file.
        wanted: What `sniff` says of a good one: "safetensors", "a zip archive"; "" for formats
            without a mark, such as ONNX.
        instead: What it should be, where no mark is wanted: "a safetensors file".
    """
    if not path.exists():
        return "does not exist"
    if not path.is_file():
        return "is not a file"
    try:
        found = sniff(path)
    except OSError as error:
        return f"cannot be read: {(error.strerror or str(error)).lower()}"
    reasons = {
        "empty": "is an empty file",
        "an empty zip archive": "is an empty zip archive",
        "html": "looks like an HTML page; was the download blocked?",
        "lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull`",
        "pickle": "is a pickle, which can run code when it is loaded, and is not read",
        "safetensors": "is a safetensors file; give it as --weights of the network's code",
    }
    if found == wanted or (not found and not wanted):
        return ""
    if found in ("empty", "html", "lfs"):
        return reasons[found]
    if wanted:
        instead = wanted if wanted.startswith("a ") else f"a {wanted} file"
    if not found:
        return f"is not {instead}"
    what = _of_zip(path) if found == "a zip archive" else found
    contrast = f"not {instead}" if instead else "whatever its name says"
    return reasons.get(found, f"is {what}, {contrast}")


def _of_zip(path: Path) -> str:
    """Say what a zip archive holds, by the names of its entries."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except DAMAGED_ZIP:
        return "a damaged zip archive"
    if "constants.pkl" in names:
        return "a TorchScript archive (code and pickles)"
    if "data.pkl" in names:
        return "a PyTorch checkpoint (pickles in a zip archive)"
    if {"config.json", "metadata.json"} <= names:
        return "a Keras model"
    return "a zip archive"


_RUN_ONLY = ("a GGUF file", "a TFLite file", "an ExecuTorch program", "a TensorRT plan")


def no_network(path: Path) -> str:
    """Say what a file or folder is that no source reads, in words to put after its name.

    Args:
        path: It exists.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return f"is a folder; of Hugging Face, it is read as huggingface:{path}"
        if (path / "manifest.json").is_file():
            return "is an artifact; give the network that it was made from"
        return "is a folder without config.json or manifest.json; give a network"
    found = sniff(path)
    if found in ("empty", "html", "lfs"):
        return foreign(path)
    what = "a pickle" if found == "pickle" else found
    what = _of_zip(path) if found == "a zip archive" else what
    if what in ("", "a gzip file", "a bzip2 file", "an xz file") and path.suffix in _PICKLES_ONLY:
        what = "by its name a pickle"
    if "pickle" in what:
        return (
            f"is {what}, which can run code when it is loaded, and is not read; where you trust "
            "it, load it in a function that returns the network, and give that: FILE.py:FUNCTION"
        )
    if found == "safetensors":
        return (
            "holds weights only; give the function that returns the network, and these as its "
            "weights: FILE.py:FUNCTION --weights FILE"
        )
    if found in _RUN_ONLY:
        return f"is {found}, made for one runtime; give the network that it was made from"
    what = what or "of a kind that is not known"
    return f"is {what}; networks are read from FILE.py:FUNCTION, .onnx and .pt2 files"


def zip_problem(file: Path | BytesIO) -> str:
    """Say what makes a zip archive unsafe to unpack: names, number, sizes, ratio; or nothing."""
    packed = len(file.getbuffer()) if isinstance(file, BytesIO) else file.stat().st_size
    listed = _entries_listed(file, packed)
    if listed > MAX_ENTRIES:
        return f"has {listed} entries, more than {MAX_ENTRIES}"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except DAMAGED_ZIP as error:
        return f"is a damaged zip archive: {error}"
    if len(entries) > MAX_ENTRIES:
        return f"has {len(entries)} entries, more than {MAX_ENTRIES}"
    names: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in name or "\0" in name:
            return f"has an entry that leads outside: {name[:80]!r}"
        if name in names:
            return f"has two entries called {name[:80]!r}"
        if entry.flag_bits & 0x1:
            return f"has an encrypted entry {name[:80]!r}"
        if entry.external_attr >> 28 not in (0, 8, 4):  # file type of the mode: regular or folder
            return f"has an entry that is a link or a device: {name[:80]!r}"
        names.add(name)
    unpacked = sum(e.file_size for e in entries)
    if unpacked > MAX_UNPACKED:
        return f"unpacks to {unpacked / 2**30:.0f} GiB, more than {MAX_UNPACKED >> 30} GiB"
    if unpacked > SMALL and unpacked > MAX_RATIO * packed:
        return f"unpacks {packed} bytes to {unpacked} ({unpacked // packed} times): a zip bomb"
    return ""


def _entries_listed(file: Path | BytesIO, size: int) -> int:
    """Count the entries of an archive's directory without making an object of each."""
    with BytesIO(file.getbuffer()) if isinstance(file, BytesIO) else file.open("rb") as stream:
        start = max(0, size - _LONGEST_END)
        stream.seek(start)
        tail = stream.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) < end + 16:
            return 0
        length = int.from_bytes(tail[end + 12 : end + 16], "little")
        if length > start + end:
            return 0
        stream.seek(start + end - length)
        return stream.read(length).count(b"PK\x01\x02")
