"""Faults 24-27: files of other tools, given as a network, as weights or as data."""

import io
import os
import pickle
import struct
import tarfile
import zipfile

import pytest

from tersor import pipeline
from tersor.core.errors import DataError
from tersor.sources import module
from tests.command import failing
from tests.faults.test_model_files import net_script as net_script
from tests.faults.test_model_files import refuse

HDF5 = b"\x89HDF\r\n\x1a\n" + b"\0" * 100


def zipped(*entries):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return made.getvalue()


def tarred(mode="w", **about):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        entry = tarfile.TarInfo(about.pop("name", "x"))
        for key, value in about.items():
            setattr(entry, key, value)
        archive.addfile(entry)
    return made.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HDF5, "is an HDF5 file (Keras weights, for instance)"),
        (zipped(("config.json", "{}"), ("metadata.json", "{}")), "is a Keras model"),
    ],
)
def test_24_keras_under_another_name(tmp_path, net_script, content, said):
    (tmp_path / "x.onnx").write_bytes(content)
    refuse(tmp_path / "x.onnx", f"{said}, whatever its name says", pipeline.load)
    (tmp_path / "x.safetensors").write_bytes(content)
    refuse(
        net_script,
        f"{said}, not a safetensors file",
        module.load,
        weights=tmp_path / "x.safetensors",
    )


def attack(canary):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch '{canary}'",)

    return Attack()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("suffix", [".joblib", ".dill", ".cloudpickle", ".pkl", ".sav", ".model"])
def test_25_pickles_of_other_tools(tmp_path, net_script, suffix, protocol):
    """dill and cloudpickle write what pickle writes."""
    canary = tmp_path / "canary"
    file = tmp_path / f"x{suffix}"
    file.write_bytes(pickle.dumps(attack(canary), protocol))
    said = "is a pickle, which can run code when it is loaded, and is not read; where you trust it"
    refuse(file, said, pipeline.load)
    refuse(net_script, "which can run code when", module.load, weights=file)
    with pytest.raises(DataError, match="is a pickle, which can run code"):
        pipeline.load_data(f"arrays:{file}")
    assert not canary.exists()


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)])
def test_25_joblib_itself(tmp_path, net_script, compress):
    joblib = pytest.importorskip("joblib")
    canary = tmp_path / "canary"
    joblib.dump(attack(canary), tmp_path / "x.joblib", compress=compress)
    refuse(tmp_path / "x.joblib", "a pickle, which can run code when it is loaded", pipeline.load)
    refuse(
        net_script,
        ".joblib files are pickles, which can run code when loaded, and are not read; convert it "
        "once, where you trust it: safetensors.torch.save_file(joblib.load(FILE)",
        module.load,
        weights=tmp_path / "x.joblib",
    )
    assert not canary.exists()


def test_22_what_pytorch_saves_otherwise(tmp_path, net_script):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "new.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refuse(
        tmp_path / "new.pt",
        "is a PyTorch checkpoint (pickles in a zip archive), which can run code when it is loaded",
        pipeline.load,
    )
    refuse(tmp_path / "old.pt", "is a pickle, which can run code when it is loaded", pipeline.load)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "new.pt").read_bytes())
    refuse(
        net_script,
        "is a PyTorch checkpoint (pickles in a zip archive), not a safetensors file",
        module.load,
        weights=tmp_path / "x.safetensors",
    )
    whole = bytearray((tmp_path / "new.pt").read_bytes())
    whole[len(whole) // 2] ^= 255  # the CRC of an entry is wrong
    (tmp_path / "crc.pt").write_bytes(whole)
    refuse(tmp_path / "crc.pt", "which can run code when it is loaded", pipeline.load)
    archive = zipped(("x/code/__torch__.py", ""), ("x/constants.pkl", ""), ("x/data.pkl", ""))
    (tmp_path / "script.pt").write_bytes(archive)
    refuse(tmp_path / "script.pt", "is a TorchScript archive (code and pickles)", pipeline.load)


ARCHIVES = [
    pytest.param(tarred(name="../x"), "a tar archive", id="tar up"),
    pytest.param(tarred(name="/etc/x"), "a tar archive", id="tar absolute"),
    pytest.param(
        tarred(name="x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a tar archive", id="link"
    ),
    pytest.param(tarred(name="x", type=tarfile.CHRTYPE), "a tar archive", id="device"),
    pytest.param(tarred("w:gz", name="../x"), "a gzip file", id="gzip"),
    pytest.param(tarred("w:bz2", name="../x"), "a bzip2 file", id="bzip2"),
    pytest.param(tarred("w:xz", name="../x"), "an xz file", id="xz"),
    pytest.param(zipped(("../x", "")), "a zip archive", id="zip up"),
    pytest.param(b"7z\xbc\xaf\x27\x1c" + b"\0" * 99, "a 7z archive", id="7z"),
    pytest.param(b"\x28\xb5\x2f\xfd" + b"\0" * 99, "a zstd file", id="zstd"),
]


@pytest.mark.parametrize(("content", "what"), ARCHIVES)
def test_26_archives_are_never_unpacked(tmp_path, net_script, content, what):
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("x.tar", "x.onnx", "x.safetensors", "x.npz"):
        (inside / name).write_bytes(content)
    refuse(inside / "x.tar", f"is {what}; networks are read from FILE.py:FUNCTION", pipeline.load)
    refuse(inside / "x.onnx", f"is {what}, whatever its name says", pipeline.load)
    refuse(
        net_script,
        f"is {what}, not a safetensors file",
        module.load,
        weights=inside / "x.safetensors",
    )
    said = "has an entry that leads outside" if what == "a zip archive" else f"is {what}, not a zip"
    with pytest.raises(DataError, match=said):
        pipeline.load_data(f"arrays:{inside / 'x.npz'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside", "net.py"]
    assert len(list(inside.iterdir())) == 4


def bomb(name, kind=zipfile.ZIP_DEFLATED, size=300 << 20):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", kind, compresslevel=1) as archive:
        archive.writestr(name, b"\0" * size)
    return made.getvalue()


def test_26_archives_in_archives_are_not_opened(tmp_path):
    nested = zipped(*((f"{i}.zip", bomb("x", size=1 << 20)) for i in range(16)))  # as 42.zip
    (tmp_path / "nested.pt2").write_bytes(nested)
    refuse(tmp_path / "nested.pt2", "exported program", pipeline.load)


@pytest.mark.slow
def test_26_a_bomb(tmp_path):
    (tmp_path / "bomb.pt2").write_bytes(bomb("x"))
    refuse(tmp_path / "bomb.pt2", "times): a zip bomb", pipeline.load)


def test_26_a_million_entries(tmp_path):
    local = b"PK\x03\x04" + b"\0" * 26
    entry = b"PK\x01\x02" + b"\0" * 42
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 10**6 * len(entry), len(local), 0)
    (tmp_path / "crowd.pt2").write_bytes(local + entry * 10**6 + end)
    refuse(tmp_path / "crowd.pt2", "has 1000000 entries, more than 100000", pipeline.load)


RUN_ONLY = [
    (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), ".gguf", "a GGUF file"),
    (b"\x1c\0\0\0TFL3" + b"\xff" * 64, ".tflite", "a TFLite file"),
    (b"\x1c\0\0\0ET12" + b"\xff" * 64, ".pte", "an ExecuTorch program"),
    (b"ftrt" + b"\xff" * 64, ".plan", "a TensorRT plan"),
]


@pytest.mark.parametrize(("content", "suffix", "what"), RUN_ONLY)
def test_27_files_of_runtimes_are_no_networks(tmp_path, net_script, content, suffix, what):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(content)
    refuse(file, f"is {what}, made for one runtime; give the network that it was", pipeline.load)
    (tmp_path / "x.onnx").write_bytes(content)
    refuse(tmp_path / "x.onnx", f"is {what}, whatever its name says", pipeline.load)
    refuse(net_script, f"is {what}, not a safetensors file", module.load, weights=file)
    file.write_bytes(b"\xff" * 64)  # a header that says nothing
    refuse(file, "is of a kind that is not known; networks are read from FILE.py", pipeline.load)


def test_27_the_command_line_says_the_same(tmp_path, capsys):
    for content, suffix, what in RUN_ONLY:
        file = tmp_path / f"x{suffix}"
        file.write_bytes(content)
        code, said = failing(capsys, "inspect", str(file))
        assert code == 2
        assert said.strip() == (
            f"{str(file)!r} is {what}, made for one runtime; give the network that it was made from"
        )
