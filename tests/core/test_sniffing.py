"""What a file is, by its content."""

import zipfile
from io import BytesIO

import pytest

from tersor.core.sniffing import foreign, sniff, zip_problem


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
    assert foreign(file) == "is a zip archive, whatever its name says"
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
