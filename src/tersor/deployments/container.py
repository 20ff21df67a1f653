"""A container image that runs the network on arrays: the runtime, the model and a short program.

OUT holds the Containerfile, requirements.txt with the runtime's packages in the versions that the
artifact was measured with, run.py and the model. The image has no torch and no tersor, and runs as
a user without rights. It is built by `docker build -f Containerfile` or `podman build`.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.core.artifact import Artifact
from tersor.core.deployment import Deployment
from tersor.core.errors import ArtifactError, TargetError
from tersor.deployments._model_files import copy_model

_PROGRAM = Path(__file__).with_name("_container_run.py")
_USER = 1000
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!-]*")
_PYTHON = re.compile(r"[0-9]+\.[0-9]+\.[0-9A-Za-z.+-]+")
_TEXT = """\
FROM {base}

RUN useradd --uid {user} --create-home runner
WORKDIR /home/runner
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY run.py ./
COPY model ./model
USER {user}

# docker run --rm -v "$PWD:/data" --user "$(id -u)" NAME --input /data/x.npz --output /data/y.npz
ENTRYPOINT ["python", "/home/runner/run.py", "--model", "/home/runner/model/{model}", \
"--threads", "{threads}"]
"""


@dataclass(frozen=True, kw_only=True)
class Container:
    """Settings of `container`."""

    base: str = ""
    """The image to start from; "": python:VERSION-slim of the Python that the artifact knows."""

    def __post_init__(self) -> None:
        if len(self.base.split()) > 1:
            raise ValueError(f"base must be the name of an image, got {self.base!r}")


def write(artifact: Artifact, folder: Path, options: Container) -> None:
    """Write the Containerfile and what it copies."""
    known = artifact.manifest.get("environment", {})
    if artifact.target.options.get("precision", "fp32") != "fp32":
        raise TargetError(
            f"run.py computes in fp32, not in {artifact.target.options['precision']}; deploy it "
            "with --to triton"
        )
    pins = [_pin(package, known) for package in ("numpy", artifact.target.runtime)]
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    (folder / "model").mkdir()
    text = _TEXT.format(
        base=options.base or f"python:{_python(known)}-slim",
        user=_USER,
        model=copy_model(artifact, folder / "model").name,
        threads=artifact.target.threads,
    )
    (folder / "Containerfile").write_text(text, encoding="utf-8")
    shutil.copyfile(_PROGRAM, folder / "run.py")


def _pin(package: str, known: Mapping[str, Any]) -> str:
    version = known.get("packages", {}).get(package)
    if not _VERSION.fullmatch(str(version)):  # it is written into requirements.txt
        raise ArtifactError(
            f"the artifact does not say which version of {package} it was measured with; compress "
            "the network again"
        )
    return f"{package}=={version}"


def _python(known: Mapping[str, Any]) -> str:
    words = str(known.get("python", "")).split()
    if len(words) != 2 or not _PYTHON.fullmatch(words[1]):
        raise ArtifactError(
            "the artifact does not say which Python it was measured with; give an image with "
            "--option base=NAME"
        )
    return ".".join(words[1].split(".")[:2])


DEPLOYMENT = Deployment(
    runtimes=("onnxruntime", "openvino"),
    options=Container,
    write=write,
    check="docker build -f Containerfile -t NAME . && docker run --rm NAME",
)
