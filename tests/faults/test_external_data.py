"""Faults 7-11: data outside an ONNX file that are not where they should be."""

import os

import pytest

pytest.importorskip("onnx")

from tersor.core.errors import ModelError
from tersor.sources import onnx as source
from tersor.sources._onnx_data import place_problem
from tests.faults.test_model_files import refuse
from tests.sources.onnx_models import adding, array, external, save


@pytest.mark.parametrize(
    "location",
    [
        "../x",
        "sub/../../x",
        "/etc/passwd",
        "C:\\x",
        "C:/x",
        "\\\\host\\x",
        "a\0b",
        "%2e%2e/x",
        "",
        "sub\\..\\x",
    ],
)
def test_7_external_data_outside(tmp_path, location):
    (tmp_path / "x").write_bytes(b"\0" * 12)
    folder = tmp_path / "inner"
    (folder / "sub").mkdir(parents=True)
    made = adding("w", stored=[external("w", [3], location=location)])
    refuse(save(made, folder / "m.onnx"), "tensor 'w': external data location")
    assert place_problem(location)
    assert place_problem("weights/x.bin") == ""


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "C:\\evil", "\\\\host\\evil", "%2e%2e/evil", "a/../../evil"]
)
def test_8_names_of_tensors_are_never_names_of_files(tmp_path, runtime, name):
    pytest.importorskip(runtime)
    from tersor.core import plugins
    from tersor.core.model import Inputs

    place = tmp_path / "deep" / "model"
    place.mkdir(parents=True)
    made = source.load(save(adding(name, stored=[array(name, [1, 2, 3])]), tmp_path / "m.onnx"))
    assert made.inputs is not None
    files = plugins.runtime(runtime).export(made.net, place, Inputs(example=made.inputs.example))
    assert all(file.parent == place for file in files)
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"m.onnx", *(f"deep/model/{file.name}" for file in files)}
    assert not [p for p in tmp_path.parent.iterdir() if "evil" in p.name]


def test_9_external_data_through_links(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 12)
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    os.link(secret, folder / "hard")
    for location, said in [
        ("link", "goes through a link; refused"),
        ("up/secret", "goes through a link; refused"),
        ("hard", "is a hard link; refused"),
        ("none", "cannot be read: no such file"),
        (".", "is not a file"),
    ]:
        made = adding("w", stored=[external("w", [3], location=location)])
        with pytest.raises(ModelError) as caught:
            source.load(save(made, folder / "m.onnx"))
        assert "tensor 'w'" in str(caught.value)
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": "-8"}, "offset '-8' is not a whole number"),
        ({"length": "-1"}, "length '-1' is not a whole number"),
        ({"offset": "abc"}, "offset 'abc' is not a whole number"),
        ({"offset": "1" * 30}, "is not a whole number"),
        (
            {"offset": "8", "length": "12"},
            "offset 8 and length 12 lead past the end of 'w.bin' (12 bytes)",
        ),
        ({"length": str(2**50)}, "lead past the end"),
        ({"length": "8"}, "length 8 is not the 12 bytes of its shape"),
    ],
)
def test_10_external_data_of_the_wrong_place(tmp_path, entries, said):
    (tmp_path / "w.bin").write_bytes(b"\0" * 12)
    made = adding("w", stored=[external("w", [3], location="w.bin", **entries)])
    refuse(save(made, tmp_path / "m.onnx"), said)


def test_10_external_data_that_overlap(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"\0" * 20)
    stored = [
        external("a", [3], location="w.bin"),
        external("b", [3], location="w.bin", offset="8"),
    ]
    refuse(
        save(adding("a", "b", stored=stored), tmp_path / "m.onnx"),
        "tensor 'b': its external data overlap those of tensor 'a'",
    )


def test_11_unknown_keys_are_ignored_and_said(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"\0" * 12)
    made = adding("w", stored=[external("w", [3], location="w.bin", __class__="x", other="y")])
    found = source.load(save(made, tmp_path / "m.onnx"))
    assert found.notes == ("tensor 'w': unknown external data keys ignored: __class__, other",)
    assert found.net.graph.initializer[0].name == "w"
