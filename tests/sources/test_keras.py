"""Keras files and SavedModels: what is refused before anything is loaded, and what is converted."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor import pipeline
from tersor.core import environments, plugins
from tersor.core.errors import DependencyError, ModelError
from tersor.sources._keras_checks import check_config, check_folder, checked_copy

MAKE = """
import os, sys
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
import numpy as np, keras
from keras import layers
keras.utils.set_random_seed(0)
image, extra = keras.Input((8, 8, 1), name="image"), keras.Input((4,), name="extra")
x = layers.Conv2D(6, 3, padding="same", use_bias=False)(image)
x = layers.ReLU()(layers.BatchNormalization()(x)) * 2 + 1
x = layers.SeparableConv2D(8, 3, activation="gelu")(layers.MaxPooling2D()(x))
x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), extra])
net = keras.Model([image, extra], [layers.Dense(3, name="b")(x), layers.Dense(2, name="a")(x)])
folder = sys.argv[1]
rng = np.random.default_rng(0)
batch = [rng.random((5, 8, 8, 1), np.float32), rng.random((5, 4), np.float32)]
net.save(folder + "/net.keras")
net.export(folder + "/saved", verbose=False)
first, second = net.predict(batch, verbose=0)
np.savez(folder + "/batch.npz", image=batch[0], extra=batch[1], b=first, a=second)
"""
WRITER = """
import os, sys
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
import tensorflow as tf
class Net(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def call(self, x):
        tf.io.write_file(sys.argv[2], "harm")
        return x * 2
net = Net()
tf.saved_model.save(net, sys.argv[1], signatures=net.call)
"""


def layer(name: str = "Dense", module: str | None = "keras.layers", **more: Any) -> dict[str, Any]:
    config = {"name": "suspect", "units": 2}
    return {"module": module, "class_name": name, "config": config, "registered_name": None, **more}


def model(*layers: dict[str, Any], **more: Any) -> dict[str, Any]:
    entry = layer("InputLayer")
    config = {"name": "net", "layers": [entry, *layers]}
    return {"module": "keras", "class_name": "Sequential", "config": config, **more}


def write(file: Path, config: Any, **entries: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
        archive.writestr("metadata.json", "{}")
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


@pytest.fixture(scope="session")
def python() -> str:
    """An interpreter with TensorFlow and Keras."""
    source = plugins.source("keras")
    if all(plugins.installed(package) for package in source.to_convert):
        return sys.executable
    found = environments.python("keras")
    if found is None:
        pytest.skip("needs TensorFlow or the environment 'keras'")
    return str(found)


@pytest.fixture(scope="session")
def made(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a Keras model of two inputs and two outputs, a batch and its outputs."""
    folder = tmp_path_factory.mktemp("keras")
    subprocess.run([python, "-c", MAKE, str(folder)], capture_output=True, check=True)
    return folder


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (layer("Lambda"), "has a Lambda layer 'suspect', which holds code, and is refused"),
        (layer("TorchModuleWrapper"), "a pickled PyTorch module, which can run code"),
        (layer("Dense", "os"), "asks for 'Dense' of 'os' 'suspect', which is not on the list"),
        (layer("Dense", None), "asks for 'Dense' of 'None'"),
        (layer("Mine", "my.code"), "asks for 'Mine' of 'my.code'"),
        (layer(registered_name="mine>Dense"), "asks for 'Dense' of 'keras.layers'"),
        (layer("StringLookup"), "asks for 'StringLookup' of 'keras.layers'"),
        (layer("TFSMLayer"), "which holds another model's folder"),
    ],
)
def test_layers_with_code_are_refused(bad: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Also inside another layer, where Keras makes objects, too."""
    wrapped = layer("TimeDistributed", config={"name": "outer", "layer": bad})
    for config in (model(bad), model(wrapped)):
        file = write(tmp_path / "net.keras", config)
        with pytest.raises(ModelError) as caught:
            pipeline.load(str(file))
        assert str(caught.value).startswith(f"Keras model '{file}' ")
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"class_name": "__lambda__", "config": {"value": "4wAAAA"}}, "has a __lambda__ layer"),
        (
            {"module": "keras.utils", "class_name": "function", "config": "get_file"},
            "asks for 'get_file' of 'keras.utils'",
        ),
        (
            {
                "module": "keras.config",
                "class_name": "function",
                "config": "enable_unsafe_deserialization",
            },
            "asks for 'enable_unsafe_deserialization' of 'keras.config'",
        ),
        ({"module": "builtins", "class_name": "eval", "config": {}}, "asks for 'eval'"),
        ({"class_name": ["Dense"], "module": "keras.layers", "config": {}}, "asks for"),
    ],
)
def test_objects_among_settings_are_refused(value: dict[str, Any], said: str) -> None:
    bad = layer(config={"name": "suspect", "activation": value})
    with pytest.raises(ModelError) as caught:
        check_config(model(bad))
    assert said in str(caught.value)


def test_a_subclassed_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"holds a 'Mine', not a Sequential or Functional model"):
        check_config({"module": "my", "class_name": "Mine", "config": {}})


def test_losses_are_left_out_of_the_copy(tmp_path: Path) -> None:
    """Custom losses are of no use here; nor is whatever else the file says twice or beside."""
    config = model(layer(), compile_config={"loss": layer("Lambda")})
    text = json.dumps(config)[:-1] + ', "class_name": "Sequential"}'
    copy = checked_copy(write(tmp_path / "net.keras", text), tmp_path / "copy.keras")
    with zipfile.ZipFile(copy) as archive:
        found = json.loads(archive.read("config.json"))
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
    assert "compile_config" not in found
    assert found["config"] == config["config"]


def test_other_archives_are_refused(tmp_path: Path) -> None:
    copy = tmp_path / "copy.keras"
    cases = [
        (write(tmp_path / "a", model(), **{"../x": b""}), "has an entry that leads outside"),
        (write(tmp_path / "b", model(), **{"assets/v.txt": b""}), "has the entry 'assets/v.txt'"),
        (write(tmp_path / "c", "{not json"), "has a damaged config.json"),
        (write(tmp_path / "d", "[" * 100_000), "has a damaged config.json"),
        (tmp_path / "none", "does not exist"),
    ]
    with zipfile.ZipFile(tmp_path / "e", "w") as archive:
        archive.writestr("x", "")
    cases.append((tmp_path / "e", "has the entry 'x'"))
    for file, said in cases:
        with pytest.raises(ModelError, match=said):
            checked_copy(file, copy)
    assert not copy.exists()


def test_hdf5_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "net.h5"
    file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    with pytest.raises(ModelError, match=r"CVE-2025-9905.*load_model\(FILE\).save\('model.keras'"):
        pipeline.load(str(file))


def test_weights_of_their_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds its own weights; leave --weights out"):
        pipeline.load(str(tmp_path / "net.keras"), weights="w.safetensors")


def test_folders_are_plain_saved_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without saved_model.pb"):
        check_folder(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"")
    check_folder(tmp_path)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "words.txt").touch()
    with pytest.raises(ModelError, match=r"has 'assets/words.txt' in it"):
        check_folder(tmp_path)
    (tmp_path / "assets" / "words.txt").unlink()
    (tmp_path / "variables").symlink_to("/")
    with pytest.raises(ModelError, match="has a link in it: 'variables'"):
        check_folder(tmp_path)


def test_says_what_makes_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if all(plugins.installed(package) for package in plugins.source("keras").to_convert):
        pytest.skip("TensorFlow is installed here")
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "empty"))
    file = write(tmp_path / "net.keras", model(layer()))
    with pytest.raises(DependencyError, match=r"needs the package .*tersor doctor --create keras"):
        pipeline.load(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["net.keras", "saved"])
def test_converted_network_computes_the_same(made: Path, place: str) -> None:
    import onnxruntime

    prefix = "" if place.endswith(".keras") else "keras:"
    loaded = pipeline.load(f"{prefix}{made / place}")
    assert loaded.form == "onnx"
    assert loaded.origin == f"keras:{made / place}"
    assert loaded.inputs is not None
    assert loaded.inputs.dynamic == {"image": {0: "batch"}, "extra": {0: "batch"}}
    assert loaded.inputs.example["image"].shape == (2, 8, 8, 1)  # channels last, as in Keras
    batch = np.load(made / "batch.npz")
    session = onnxruntime.InferenceSession(loaded.net.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    assert names == (["b", "a"] if not prefix else ["output_0", "output_1"])
    found = session.run(None, {n: batch[n] for n in ("image", "extra")})
    for array, wanted in zip(found, ("b", "a"), strict=True):
        np.testing.assert_allclose(array, batch[wanted], atol=1e-5)


@pytest.mark.slow
def test_a_graph_that_writes_files_is_not_loaded(python: str, tmp_path: Path) -> None:
    folder, harm = tmp_path / "saved", tmp_path / "harm.txt"
    subprocess.run([python, "-c", WRITER, str(folder), str(harm)], capture_output=True, check=True)
    with pytest.raises(ModelError, match="has the operator 'WriteFile', which reaches outside"):
        pipeline.load(f"keras:{folder}")
    assert not harm.exists()


@pytest.mark.slow
def test_damaged_weights_are_an_error(made: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(made / "net.keras") as archive:
        config = archive.read("config.json").decode()
    with pytest.raises(ModelError, match="cannot be converted: its weights are damaged"):
        pipeline.load(str(write(tmp_path / "net.keras", config)))
