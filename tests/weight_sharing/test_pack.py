"""Packing through the pipeline: smaller files that open everywhere and compute the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tersor
from tersor.candidate import arrays_of, export
from tersor.core import packing
from tersor.core.errors import ArtifactError
from tersor.core.model import Model
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.explainer import explain
from tersor.fusions import fusions
from tersor.ops import edits
from tersor.ops.capture import capture
from tersor.ops.fold import fold_batch_norms
from tersor.ops.notes import notes_of
from tersor.weight_sharing.pack import Pack, pack
from tests import networks
from tests.command import talk

RECIPE = {
    "steps": ["pack", {"magnitude": {"sparsity": 0.8}}, {"kmeans": {"clusters": 16}}],
}


def compressed(target: str, out: Path) -> tersor.Artifact:
    return tersor.compress(
        networks.tiny_cnn(),
        Recipe.parse({**RECIPE, "target": target}),
        data=networks.data(),
        metrics=("size",),
        threads=1,
        out=out,
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tersor.Artifact:
    pytest.importorskip("onnxruntime")
    return compressed("onnxruntime", tmp_path_factory.mktemp("packed") / "out")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch_export"])
def test_packed_files_compute_the_same_and_are_smaller(runtime: str, tmp_path: Path) -> None:
    for package in {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",)}.get(
        runtime, ()
    ):
        pytest.importorskip(package)
    target = Target(runtime=runtime, options={"threads": 1})
    sample = arrays_of(networks.split(0, 16)[0], ["x"])
    found, sizes = [], []
    for place in ("plain", "packed"):
        net = networks.sparse_cnn()
        if place == "packed":
            pack(net, Pack(), None)  # type: ignore[arg-type]  # it reads no context
        candidate = export(net, tmp_path / place, networks.inputs(), target, sample)
        found.append(next(iter(candidate.runner.bind(sample)().values())))
        sizes.append(sum(file.stat().st_size for file in candidate.files))
        candidate.close()
    assert [file.name for file in (tmp_path / "packed").iterdir()] == ["model.packed"]
    np.testing.assert_array_equal(found[0], found[1])
    assert sizes[1] < 0.6 * sizes[0]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = talk(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_packed_files_are_inspected_and_measured(
    capsys: pytest.CaptureFixture[str], packed: tersor.Artifact
) -> None:
    file = packed.model_files[0]
    layers = shown(capsys, "inspect", str(packed.path))["layers"]
    assert any(layer["sparsity"] > 0.7 for layer in layers)
    assert shown(capsys, "inspect", str(file))["numbers"] > 1000
    for subject in (packed.path, file):
        asked = [w for m in ("size", "parameters", "peak_memory") for w in ("--metric", m)]
        made = shown(capsys, "measure", str(subject), *asked)["measurements"]
        found = {m["metric"]: m["value"] for m in made}
        assert found["size"] == file.stat().st_size
        assert found["parameters"] > 1000


def test_a_damaged_packed_artifact_is_refused(packed: tersor.Artifact, tmp_path: Path) -> None:
    shutil.copytree(packed.path, tmp_path / "out")
    copied = tersor.Artifact.open(tmp_path / "out")
    file = copied.model_files[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"'model\.packed' was altered"):
        copied.load()
    with pytest.raises(ArtifactError, match="its content is not what its checksum says"):
        packing.unpack(file, tmp_path)


def test_later_steps_stay_packed_and_training_can_go_on(packed: tersor.Artifact) -> None:
    """The note survives storing and replaying; the report counts the packed file."""
    assert [file.name for file in packed.model_files] == ["model.packed"]
    assert packed.describe()["model"] == ["model.packed"]
    size = {m.metric: m.value for m in packed.report.after}["size"]
    assert size == packed.model_files[0].stat().st_size
    again = edits.replay(packed.path / "network", networks.tiny_cnn())
    assert notes_of(again)["packed"] is True
    folded = fold_batch_norms(captured := capture(again, networks.inputs()), networks.inputs())
    assert folded
    assert notes_of(captured)["packed"] is True
    assert not notes_of(networks.tiny_cnn())


def test_a_packed_network_is_explained() -> None:
    """Profilers read what is inside of the packed file."""
    pytest.importorskip("onnxruntime")
    net = networks.tiny_cnn()
    pack(net, Pack(), None)  # type: ignore[arg-type]  # it reads no context
    target = Target(runtime="onnxruntime", options={"threads": 1})
    model = Model(net=net, form="module", origin="tests")
    assert explain(model, networks.data(), target=target, budget_s=0.3).parts
    assert fusions(model, networks.data(), target=target, steps=False).operators
