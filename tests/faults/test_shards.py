"""Fault 21: folders of weights in several files whose index does not tell the truth."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tersor.core.errors import ModelError
from tersor.sources._shards import INDEX, SINGLE, find_shards, shapes_of

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD = {"one.weight": A, "one.bias": A, "two.weight": B}


@pytest.fixture
def folder(tmp_path):
    """Make a good folder of two shards."""
    save_file({"one.weight": torch.ones(4, 3), "one.bias": torch.ones(4)}, tmp_path / A)
    save_file({"two.weight": torch.ones(2, 4)}, tmp_path / B)
    index(tmp_path, GOOD)
    return tmp_path


def index(folder, places, total=96):
    raw = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(raw))


def refused(folder):
    with pytest.raises(ModelError) as caught:
        find_shards(folder)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_21_a_good_folder(folder):
    shards = find_shards(folder)
    assert [file.name for file in shards] == [A, B]
    assert shapes_of(shards) == {"one.weight": (4, 3), "one.bias": (4,), "two.weight": (2, 4)}


def test_21_a_missing_shard(folder):
    (folder / B).unlink()
    said = refused(folder)
    assert f"shard '{B}' is missing, which holds two.weight; was the download" in said


@pytest.mark.parametrize(
    "place",
    [
        "../model.safetensors",
        "sub/model.safetensors",
        "/etc/passwd.safetensors",
        "C:\\model.safetensors",
        "..\\model.safetensors",
        "a\0.safetensors",
        "..",
        "",
    ],
)
def test_21_a_shard_outside(folder, place):
    save_file({"two.weight": torch.ones(2, 4)}, folder.parent / "model.safetensors")
    index(folder, {**GOOD, "two.weight": place})
    assert f"names a shard outside its folder: {place!r}" in refused(folder)


def test_21_a_shard_that_is_a_pickle(folder):
    (folder / "x.bin").write_bytes(pickle.dumps({}))
    index(folder, {**GOOD, "two.weight": "x.bin"})
    assert "names a shard that is no safetensors file: 'x.bin'" in refused(folder)
    (folder / B).write_bytes(pickle.dumps({}))
    index(folder, GOOD)
    assert f"{B}' is a pickle, which can run code" in refused(folder)


def test_21_a_tensor_in_two_shards(folder):
    save_file({"two.weight": torch.ones(2, 4), "one.bias": torch.zeros(4)}, folder / B)
    assert f"tensor 'one.bias' is in two shards: '{A}' and '{B}'" in refused(folder)


def test_21_a_shard_of_another_model(folder):
    save_file({"other.weight": torch.ones(2, 4)}, folder / B)
    said = refused(folder)
    assert f"shard '{B}' is not the one that was indexed, of its tensors 1 are not in it" in said
    assert "(two.weight) and 1 should not be in it (other.weight); is it a shard of another" in said
    save_file({"two.weight": torch.ones(9, 4)}, folder / B)
    said = refused(folder)
    assert f"have 96 bytes, the shards hold 208 ({A} 64, {B} 144)" in said
    assert "is one of them a shard of another model?" in said


def test_21_a_damaged_shard(folder):
    whole = (folder / B).read_bytes()
    (folder / B).write_bytes(whole[:-1])
    assert f"{B}': tensor 'two.weight': data_offsets [0, 32] lead past the end" in refused(folder)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object but a list"),
        ('{"weight_map": {}}', "has no weight_map from tensors to files"),
        ('{"weight_map": {"a": 1}}', "has no weight_map from tensors to files"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_21_an_index_that_is_none(folder, raw, said):
    (folder / INDEX).write_text(raw)
    assert said in refused(folder)


def test_22_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    said = refused(tmp_path)
    assert (
        "has its weights in 'pytorch_model.bin', a pickle, which can run code when loaded" in said
    )
    assert "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors" in said


def test_a_folder_without_weights(tmp_path):
    assert f"has no {SINGLE} and no {INDEX}; was the download complete?" in refused(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    assert "; 'tf_model.h5' is TensorFlow's weights" in refused(tmp_path)
