"""Packed files come back bit by bit; damaged ones are refused."""

import hashlib
import json
import random
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tersor.core import packing
from tersor.core.errors import ArtifactError
from tersor.core.file_tensors import Span, spans
from tersor.core.packing import DamagedError, read_body


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    kinds = {"float32": "F32", "int8": "I8", "float16": "F16", "int64": "I64"}
    header, body = {}, b""
    for name, array in tensors.items():
        begin = len(body)
        body += array.tobytes()
        header[name] = {
            "dtype": kinds[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, len(body)],
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((40, 30)).astype(np.float32)
    pruned = np.where(rng.random((50, 60)) < 0.9, 0, rng.standard_normal((50, 60)))
    shared = rng.choice(np.linspace(-1, 1, 16, dtype=np.float32), (64, 3, 3, 3))
    return {
        "dense": dense,
        "pruned": pruned.astype(np.float32),
        "shared": shared.astype(np.float32),
        "both": np.where(rng.random((30, 700)) < 0.995, 0, shared.flat[0]).astype(np.float32),
        "codes": np.clip(rng.normal(0, 20, (100, 64)), -127, 127).astype(np.int8),
        "nothing": np.zeros((20, 300), np.float32),
        "special": np.array([np.nan, np.inf, -0.0, 0.0] * 64, np.float32).reshape(16, 16),
        "half": rng.standard_normal((32, 32)).astype(np.float16),
        "long": np.arange(256, dtype=np.int64).reshape(16, 16),
        "small": np.ones(3, np.float32),
    }


def packed(folder: Path, name: str, data: bytes) -> Path:
    file = folder / name
    file.write_bytes(data)
    return packing.pack([file], folder / "model.packed")


def test_everything_comes_back_and_is_smaller(tmp_path: Path) -> None:
    data = safetensors(weights())
    place = packed(tmp_path, "model.safetensors", data)
    assert not (tmp_path / "model.safetensors").exists()  # the packed file takes its place
    with packing.unpacked(place) as file:
        assert file.name == "model.safetensors"
        assert file.read_bytes() == data
    assert not file.exists()
    assert place.stat().st_size < 0.5 * len(data)


@pytest.mark.parametrize("name", list(weights()))
def test_each_kind_of_tensor_comes_back(name: str, tmp_path: Path) -> None:
    data = safetensors({name: weights()[name]})
    with packing.unpacked(packed(tmp_path, "x.safetensors", data)) as file:
        assert file.read_bytes() == data


@pytest.mark.parametrize("data", [b"", b"x", bytes(1000), bytes(range(256)) * 5])
def test_files_of_any_kind_come_back(data: bytes, tmp_path: Path) -> None:
    with packing.unpacked(packed(tmp_path, "x.any", data)) as file:
        assert file.read_bytes() == data


def test_several_files_come_back_in_order(tmp_path: Path) -> None:
    files = [tmp_path / "model.xml", tmp_path / "model.bin"]
    array = np.zeros((64, 64), np.float32)
    array[::7, ::5] = 0.5
    element = f'<data element_type="f32" shape="64, 64" offset="0" size="{array.nbytes}"/>'
    files[0].write_text(f'<net><layers><layer type="Const">{element}</layer></layers></net>')
    files[1].write_bytes(array.tobytes())
    assert spans(files[1], array.tobytes()) == [Span(start=0, count=4096, width=4, row=64)]
    texts = [file.read_bytes() for file in files]
    place = packing.pack(files, tmp_path / "model.packed")
    (tmp_path / "out").mkdir()
    found = packing.unpack(place, tmp_path / "out")
    assert [file.name for file in found] == ["model.xml", "model.bin"]
    assert [file.read_bytes() for file in found] == texts


def test_a_tensor_longer_than_a_piece_comes_back(tmp_path: Path) -> None:
    array = np.zeros((1100, 1024), np.int8)  # more than 2**20 elements
    array[np.random.default_rng(0).random(array.shape) < 0.05] = 3
    data = safetensors({"w": array})
    place = packed(tmp_path, "x.safetensors", data)
    with packing.unpacked(place) as file:
        assert file.read_bytes() == data
    assert place.stat().st_size < 0.05 * len(data)


def test_few_values_take_about_their_entropy(tmp_path: Path) -> None:
    """16 values, 8 % of the weights: within 8 % of what independent weights need at least."""
    rng = np.random.default_rng(0)
    keep = rng.random((300, 784)) < 0.08
    values = rng.choice(np.linspace(-1, 1, 16, dtype=np.float32), keep.shape)
    place = packed(tmp_path, "x.safetensors", safetensors({"w": np.where(keep, values, 0)}))
    bits = -(0.08 * np.log2(0.08) + 0.92 * np.log2(0.92)) + 0.08 * 4
    assert place.stat().st_size < 1.08 * bits * keep.size / 8


def test_the_tensors_of_onnx_and_zip_files_are_found(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    array = np.arange(600, dtype=np.float32).reshape(20, 30)
    codes = np.arange(128, dtype=np.int8).reshape(2, 64)
    tensors = [onnx.numpy_helper.from_array(a, n) for a, n in ((array, "w"), (codes, "c"))]
    graph = onnx.helper.make_graph([], "g", [], [], initializer=tensors)
    data = onnx.helper.make_model(graph).SerializeToString()
    found = spans(Path("x.onnx"), data)
    assert [(s.count, s.width, s.row) for s in found] == [(600, 4, 30), (128, 1, 64)]
    assert data[found[0].start : found[0].stop] == array.tobytes()
    file = tmp_path / "x.pt2"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/w", array.tobytes())
    (span,) = spans(file, file.read_bytes())
    assert file.read_bytes()[span.start : span.stop] == array.tobytes()


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2", "x.safetensors", "x.bin"])
def test_a_file_that_is_not_what_its_name_says_is_packed_as_a_whole(
    name: str, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(500)
    with packing.unpacked(packed(tmp_path, name, data)) as file:
        assert file.read_bytes() == data


# --- damage --------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    place = packed(tmp_path, "x.safetensors", safetensors({"w": weights()["shared"]}))
    data = place.read_bytes()
    dice = random.Random(0)
    for _ in range(300):
        at = dice.randrange(len(data))
        place.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(ArtifactError, match="is damaged"):
            packing.unpack(place, tmp_path / "out")


@pytest.mark.parametrize("length", [0, 5, 8, 20, 40, 41, 60])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    place = packed(tmp_path, "x.safetensors", safetensors({"w": weights()["shared"]}))
    place.write_bytes(place.read_bytes()[:length])
    with pytest.raises(ArtifactError, match=r"'model\.packed' is damaged .*run the compression"):
        packing.unpack(place, tmp_path)


def forged(folder: Path, body: bytes) -> Path:
    """Write a body with a checksum that holds."""
    place = folder / "forged.packed"
    place.write_bytes(b"tersorP1" + hashlib.sha256(body).digest() + body)
    return place


NAME = b"\x01\x01x"
"""One file, called x."""
LARGE = b"\x80\x80\x80\x80\x04"
"""1 GB, as a number."""
BAD = {
    "it holds no file": b"\x00",
    "it is cut off": b"\x01\x05ab",
    "'../x' is not the name of a file": b"\x01\x04../x",
    "'.x' is not the name of a file": b"\x01\x02.x",
    "a file name is not text": b"\x01\x02\xff\xfe",
    "a number without an end": b"\x01\x01x" + b"\xff" * 11,
    "more than the disk has free": NAME + b"\xff\xff\xff\xff\xff\xff\x7f" + b"\x00\x00\x00",
    "are claimed to come of": NAME + LARGE + b"\x01" + LARGE + b"\x01\x00",
    "a number of 9, where at most 3 can be": NAME + b"\x03" + b"\x00\x09abcdefghi" + b"\x00",
    "has another size than it says": NAME + b"\x05" + b"\x00\x03abc" + b"\x00",
    "bytes are left over": NAME + b"\x03" + b"\x00\x03abc" + b"\x00" + b"!",
    "a stream of unknown kind 7": NAME + b"\x03" + b"\x07\x03abc" + b"\x00",
    "a stream cannot be decoded": NAME + b"\x03" + b"\x01\x03\x03\x03\x03\x03" + b"\x00",
    "a tensor of unknown form": NAME + b"\x03" + b"\x00\x00" + b"\x01\x00" + b"\x09\x04",
    "rows of 3 in 4 elements": NAME + b"\x04" + b"\x00\x00" + b"\x01\x00" + b"\x00\x01\x04\x03",
    "a value that is not in its table": (
        NAME
        + b"\x04"
        + b"\x00\x00"
        + b"\x01\x00"
        + b"\x04\x01\x04\x01\x01A\x00\x04\x00\x00\x00\x01"
    ),
    "a value beyond the end": (
        NAME + b"\x04\x00\x00\x01\x00" + b"\x02\x01\x04\x01\x00" + b"\x00\x01\x09" + b"\x00\x01A"
    ),
}


@pytest.mark.parametrize("reason", list(BAD))
def test_a_forged_file_is_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refused:
        packing.unpack(forged(tmp_path, BAD[reason]), tmp_path)
    assert reason in str(refused.value)


def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """A file that really holds 1 GB of zeros, but says that it is of 10 bytes; one that says 1 GB."""
    lengths = {b"\x0a": "a number of 1073741824, where at most 10", LARGE: "has another length"}
    zeros = packing._compress(bytes(1 << 22), 0)
    for size, reason in lengths.items():
        stream = b"\x01" + LARGE + packing._number(len(zeros) + (1 << 17))
        body = NAME + size + stream + zeros + bytes(1 << 17) + b"\x00"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ArtifactError, match=reason):
            packing.unpack(forged(tmp_path, body), tmp_path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_packed_file_in_a_packed_file_is_refused(tmp_path: Path) -> None:
    inner = packed(tmp_path, "x.any", bytes(100)).rename(tmp_path / "inner.packed")
    with pytest.raises(ArtifactError, match=r"'outer\.packed' holds a packed file"):
        packing.pack([inner], tmp_path / "outer.packed")
    assert not (tmp_path / "outer.packed").exists()
    body = packing._number(1) + packing._file("inner.packed", inner.read_bytes(), [])
    with (
        pytest.raises(ArtifactError, match=r"'forged\.packed' holds a packed file"),
        packing.unpacked(forged(tmp_path, bytes(body))),
    ):
        raise AssertionError


def test_names_that_cannot_be_packed_are_refused_before_work(tmp_path: Path) -> None:
    file = tmp_path / ".x"
    file.write_bytes(b"abc")
    with pytest.raises(ArtifactError, match=r"'\.x' cannot be the name of a packed file"):
        packing.pack([file], tmp_path / "x.packed")
    assert file.exists()
    assert not (tmp_path / "x.packed").exists()


def garbage(dice: random.Random, whole: bytes) -> bytes:
    """Make a body: random bytes, or a whole one that was changed."""
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.randrange(60))
    if kind == 1:
        return whole[: dice.randrange(len(whole))]
    made = bytearray(whole)
    for _ in range(dice.randrange(1, 5)):
        made[dice.randrange(len(made) if kind == 2 else 60)] = dice.randrange(256)
    return bytes(made)


def decode_many(count: int, folder: Path) -> int:
    """Decode garbage past the checksum; return how many were refused."""
    small = {
        "w": weights()["pruned"][:8],
        "s": weights()["shared"][:4],
        "c": weights()["codes"][:4],
    }
    place = packed(folder, "x.safetensors", safetensors(small))
    whole = place.read_bytes()[40:]
    dice = random.Random(0)
    refused = 0
    for _ in range(count):
        try:
            read_body(garbage(dice, whole), folder)
        except DamagedError:
            refused += 1
    return refused


def test_garbage_past_the_checksum_is_an_error_or_a_file_and_never_a_crash(tmp_path: Path) -> None:
    assert decode_many(1000, tmp_path) > 700  # a changed weight is no error without the checksum


@pytest.mark.slow
def test_a_million_decodes_of_garbage_never_crash(tmp_path: Path) -> None:
    dice = random.Random(1)
    place = tmp_path / "x.packed"
    for _ in range(10**6 - 10**5):
        data = dice.randbytes(dice.randrange(120))
        with pytest.raises(DamagedError):
            packing._unpack(b"tersorP1" + data if dice.random() < 0.5 else data, tmp_path)
    assert decode_many(10**5, tmp_path) > 7 * 10**4
    assert not place.exists()
