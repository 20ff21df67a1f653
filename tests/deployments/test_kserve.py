"""The manifest is one of KServe's InferenceServices, and the repository beside it is Triton's."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tersor
from tersor.core import environments
from tersor.core.artifact import Artifact
from tersor.core.errors import RecipeError
from tersor.deployments.kserve import Kserve, manifest

STORAGE = "s3://bucket/digits"
# walks the published classes: every field is theirs, and every value of its type
CHECK = r"""
import re, sys, yaml
import kserve.models, kubernetes.client.models

def check(kind, value, where):
    if inner := re.fullmatch(r"list\[(.*)\]", kind, re.I):
        for each in value:
            check(inner[1], each, where)
    elif inner := re.fullmatch(r"dict[\[(]str, (.*)[\])]", kind, re.I):
        for key, each in value.items():
            check(inner[1], each, f"{where}.{key}")
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{where} is no {kind}"
    else:
        found = getattr(kserve.models, kind, None) or getattr(kubernetes.client.models, kind)
        names = {theirs: ours for ours, theirs in found.attribute_map.items()}
        for key, each in value.items():
            assert key in names, f"{where}.{key} is unknown to {kind}"
            check(found.openapi_types[names[key]], each, f"{where}.{key}")

check("V1beta1InferenceService", yaml.safe_load(sys.stdin), "")
"""


@pytest.fixture(scope="module")
def python() -> Path:
    found = environments.python("kserve")
    if found is None:
        pytest.skip("needs the environment: tersor doctor --create kserve")
    return found


def checked(python: Path, text: str) -> str:
    done = subprocess.run([str(python), "-c", CHECK], input=text, capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.slow
def test_the_manifest_fits_the_published_types(
    artifact_of: Callable[[str], Artifact], python: Path, tmp_path: Path
) -> None:
    options = {"storage": STORAGE, "name": "digits", "namespace": "models", "max_replicas": 3}
    tersor.deploy(artifact_of("onnxruntime"), to="kserve", out=tmp_path / "out", options=options)
    text = (tmp_path / "out" / "inferenceservice.yaml").read_text()
    assert checked(python, text) == ""
    assert ".spec.predictor.maxReplica is unknown" in checked(
        python, text.replace("maxReplicas", "maxReplica")
    )
    assert ".spec.predictor.minReplicas is no int" in checked(
        python, text.replace("minReplicas: 1", "minReplicas: one")
    )


def test_manifest_and_repository_agree(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    options = {"storage": STORAGE, "name": "digits"}
    made = tersor.deploy(
        artifact_of("onnxruntime"), to="kserve", out=tmp_path / "out", options=options
    )
    assert made.files == (
        "inferenceservice.yaml",
        "models/digits/1/model.onnx",
        "models/digits/config.pbtxt",
    )
    found = yaml.safe_load((tmp_path / "out" / "inferenceservice.yaml").read_text())
    assert found == manifest(Kserve(storage=STORAGE, name="digits"), threads=1)
    model = found["spec"]["predictor"]["model"]
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert (model["storageUri"], model["resources"]["limits"]["cpu"]) == (STORAGE, "1")
    assert "namespace" not in found["metadata"]
    config = (tmp_path / "out" / "models" / "digits" / "config.pbtxt").read_text()
    assert config.startswith('name: "digits"\nbackend: "onnxruntime"\nmax_batch_size: 8\n')


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "kserve: storage must say where the folder `models` will lie, such as s3://bucket/digits or pvc://claim/digits, got ''"),
        ({"storage": "bucket"}, "got 'bucket'"),
        ({"storage": STORAGE, "name": "Digits"}, "name must be a label of Kubernetes: small letters, digits and '-', got 'Digits'"),
        ({"storage": STORAGE, "namespace": "a_b"}, "namespace must be a label"),
        ({"storage": STORAGE, "min_replicas": 2}, "there must be from min_replicas to max_replicas servers, got 2 to 1"),
        ({"storage": STORAGE, "memory": "much"}, "memory must be like 2Gi or 500M, got 'much'"),
        ({"storage": STORAGE, "max_batch": -1}, "max_batch must not be negative, got -1"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(
    options: dict[str, Any], said: str, artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        tersor.deploy(
            artifact_of("onnxruntime"), to="kserve", out=tmp_path / "out", options=options
        )
    assert said in str(caught.value)
