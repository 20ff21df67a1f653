"""What a file is, by its content."""

import gzip
import zipfile
import zlib
from io import BytesIO

import pytest

from tersor.core.sniffing import foreign, no_network, sniff, zip_problem


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>", "html"),
        (b"<html><head>", "html"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "lfs"),
        (b"\x10\0\0\0\0\0\0\0" + b'{"a":1}         ', "safetensors"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"\x80\x02}q\0.", "pickle"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras weights, for instance)"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x1c\0\0\0TFL3abc", "a TFLite file"),
        (b"\x1c\0\0\0ET12abc", "an ExecuTorch program"),
        (b"ftrt\0\0\0\0", "a TensorRT plan"),
        (zlib.compress(b"\x80\x04K\x01."), "pickle"),
        (gzip.compress(b"\x80\x04K\x01.", mtime=0), "pickle"),
        (gzip.compress(b"hello", mtime=0), "a gzip file"),
        (b"\x78\x9cno zlib", ""),
        (b"cposix\nsystem\n(S'x'\ntR.", "pickle"),
        (b"(dp0\nS'a'\nI1\ns.", "pickle"),
        (b"}q\x00X\x01\x00\x00\x00aK\x01s.", "pickle"),
        (b"class\nof\nthings", ""),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"\x08\x08\x12\x04test", ""),
    ],
)
def test_sniff(tmp_path, content, kind):
    file = tmp_path / "file"
    file.write_bytes(content)
    assert sniff(file) == kind


def test_foreign_says_what_it_is(tmp_path):
    file = tmp_path / "x.onnx"
    assert foreign(file) == "does not exist"
    assert foreign(tmp_path) == "is not a file"
    file.write_bytes(b"PK\x03\x04")
    assert foreign(file) == "is a damaged zip archive, whatever its name says"
    file.write_bytes(_zip(("x", b"1")).getvalue())
    assert foreign(file) == "is a zip archive, whatever its name says"
    assert foreign(file, instead="a song") == "is a zip archive, not a song"
    file.write_bytes(_zip(("x/data.pkl", b"1")).getvalue())
    said = "is a PyTorch checkpoint (pickles in a zip archive), not a safetensors file"
    assert foreign(file, "safetensors") == said
    assert foreign(file, "a zip archive") == ""
    file.write_bytes(b"hello")
    assert foreign(file, "a zip archive") == "is not a zip archive"
    assert foreign(file) == ""


def _zip(*entries: tuple[zipfile.ZipInfo | str, bytes], packed: bool = False) -> BytesIO:
    made = BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w", kind, compresslevel=1) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return made


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "C:x", "a\\..\\..\\x"])
def test_entries_that_lead_outside_are_refused(name):
    assert zip_problem(_zip((name, b"1"))).startswith("has an entry that leads outside")


def test_links_are_refused():
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    assert (
        zip_problem(_zip((link, b"/etc/passwd")))
        == "has an entry that is a link or a device: 'link'"
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_damage_and_bombs_are_refused():
    assert zip_problem(_zip(("a", b"1"), ("a", b"2"))) == "has two entries called 'a'"
    whole = _zip(("a", b"1" * 100)).getvalue()
    assert zip_problem(BytesIO(whole[:-30])).startswith("is a damaged zip archive")
    zeros = b"\0" * (1 << 20)
    bomb = _zip(*((str(i), zeros) for i in range(257)), packed=True)
    assert zip_problem(bomb).endswith("a zip bomb")
    assert zip_problem(_zip(("a", b"1"), ("folder/", b""))) == ""


def test_folders_are_told_apart(tmp_path):
    said = "is a folder without config.json or manifest.json; give a network"
    assert no_network(tmp_path) == said
    (tmp_path / "manifest.json").write_text("{}")
    assert no_network(tmp_path) == "is an artifact; give the network that it was made from"
    (tmp_path / "config.json").write_text("{}")
    said = f"is a folder; of Hugging Face, it is read as huggingface:{tmp_path}"
    assert no_network(tmp_path) == said
