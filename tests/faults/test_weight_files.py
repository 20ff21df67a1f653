"""Faults 20 and 22: weights that are not what they claim to be, and weights that run code."""

import json
import os
import pickle
import struct

import pytest

from tersor.sources import module
from tests.faults.test_model_files import net_script as net_script
from tests.faults.test_model_files import refuse


def safetensors(header, data=b"", *, length=None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


CASES = [
    (
        safetensors(b"{}", length=99),
        "header length 99 is more than the file's 10 bytes; it is cut off",
    ),
    (safetensors(b"{}", length=10**9), "header length 1000000000 is above the limit of 100 MB"),
    (safetensors(b'{"\xff": 1}'), "header is not UTF-8 (byte 2)"),
    (safetensors(b'{"a": '), "header is not JSON"),
    (
        safetensors(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
        "header has the entry 'a' twice",
    ),
    (
        safetensors({"a": entry(), "b": entry(offsets=(2, 6))}, b"\0" * 6),
        "tensor 'b': its data overlap those of another",
    ),
    (
        safetensors({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12),
        "tensor 'b': there is a hole of 4 bytes before",
    ),
    (
        safetensors({"a": entry(offsets=(-4, 0))}, b""),
        "tensor 'a': data_offsets [-4, 0] are negative or in the wrong order",
    ),
    (
        safetensors({"a": entry(offsets=(0, 4))}, b"\0"),
        "tensor 'a': data_offsets [0, 4] lead past the end of the file (1 bytes",
    ),
    (
        safetensors({"a": entry(shape=(2,))}, b"\0" * 4),
        "tensor 'a': shape [2] of F32 needs 8 bytes, data_offsets give 4",
    ),
    (safetensors({"a": entry()}, b"\0" * 9), "has 5 trailing bytes after the last tensor"),
    (safetensors({"a": entry(dtype="F7")}, b"\0" * 4), "tensor 'a': unknown dtype 'F7'"),
    (
        safetensors({"a": entry(shape=(-1,))}, b"\0" * 4),
        "tensor 'a': shape [-1] has a negative dimension",
    ),
    (
        safetensors({"a": entry(shape=(True,))}, b"\0" * 4),
        "tensor 'a': shape [True] is not a list of whole numbers",
    ),
    (
        safetensors({"a": entry(offsets=(0, 4, 8))}, b"\0" * 4),
        "data_offsets [0, 4, 8] are not two whole numbers",
    ),
    (
        safetensors({"a": {"dtype": "F32"}}),
        "tensor 'a': must have exactly dtype, shape and data_offsets",
    ),
    (safetensors(b"[1]"), "header is not a JSON object but a list"),
    (b"\0\0\0", "has 3 bytes, fewer than the 8 of a safetensors header length"),
    (safetensors(b"[" * 100_000), "header is not JSON"),
    (
        safetensors({"a": entry(shape=(2**40, 2**40))}, b"\0" * 4),
        "needs 4835703278458516698824704 bytes",
    ),
]


@pytest.mark.parametrize(("content", "said"), CASES, ids=range(len(CASES)))
def test_20_safetensors(tmp_path, net_script, content, said):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    refuse(net_script, said, module.load, weights=file)


def test_20_every_message_is_its_own():
    assert len({said for _, said in CASES[:12]}) == 12


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_22_pickles(tmp_path, net_script, suffix):
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch '{canary}'",)

    file = tmp_path / f"x{suffix}"
    file.write_bytes(pickle.dumps(Attack()))
    said = (
        "is a pickle, which can run code"
        if suffix == ".safetensors"
        else f"{suffix} files are pickles, which can run code when loaded, and are not read; convert it once"
    )
    refuse(net_script, said, module.load, weights=file)
    file = tmp_path / "x.onnx"
    file.write_bytes(pickle.dumps(Attack()))
    refuse(file, "is a pickle, which can run code when it is loaded, and is not read")
    assert not canary.exists()
