"""Artifacts to deploy: a tiny network exported to a runtime, as compress writes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tersor.core.artifact import Artifact, write_artifact
from tersor.core.runtime import Target
from tests import networks
from tests.core.artifacts import report


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Return `make(runtime) -> Artifact`; each is made once."""
    made: dict[str, Artifact] = {}

    def make(runtime: str) -> Artifact:
        if runtime not in made:
            made[runtime] = write(tmp_path_factory.mktemp(runtime), runtime)
        return made[runtime]

    return make


def write(folder: Path, runtime: str) -> Artifact:
    from tersor.core import plugins
    from tersor.core.hardware import environment
    from tersor.ops.lower import lower

    found = plugins.runtime(runtime)
    net, inputs = networks.tiny_cnn(trained=False), networks.inputs()
    files = found.export(lower(net, found.takes, inputs), folder, inputs)
    manifest = {
        "recipe": {"steps": ["fuse_batch_norm"], "target": runtime},
        "target": Target(runtime=runtime, options={"threads": 1}),
        "origin": "module:tests",
        "inputs": {"x": {"shape": [2, 1, 8, 8], "dtype": "float32", "dynamic": {"0": "batch"}}},
        "seed": 0,
        "environment": environment(),
    }
    return write_artifact(folder / "artifact", files=files, manifest=manifest, report=report())


@pytest.fixture
def x() -> np.ndarray:
    """Five samples."""
    return np.random.default_rng(1).standard_normal((5, 1, 8, 8)).astype("float32")


def expected(artifact: Artifact, x: np.ndarray) -> tuple[str, np.ndarray]:
    """Return what our runner makes of `x`, with its name."""
    runner = artifact.load()
    try:
        ((name, array),) = runner.bind({"x": x})().items()
    finally:
        runner.close()
    return name, array
