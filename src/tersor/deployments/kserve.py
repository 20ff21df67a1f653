"""An InferenceService for KServe on Kubernetes, and the model repository that it serves.

OUT/models is a repository for KServe's Triton runtime, to be copied to where `storage` says;
OUT/inferenceservice.yaml then makes the service, which answers the Open Inference Protocol, v2.

Source: the custom resource InferenceService, serving.kserve.io/v1beta1.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tersor.core.artifact import Artifact
from tersor.core.deployment import Deployment
from tersor.deployments._triton_repository import Serving, write_repository

_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?")


@dataclass(frozen=True, kw_only=True)
class Kserve:
    """Settings of `kserve`."""

    storage: str = ""
    """Where the folder `models` will lie, such as s3://bucket/digits or pvc://claim/digits."""
    name: str = "net"
    """What the service and the model are called."""
    namespace: str = ""
    """Of the cluster; "": the one that kubectl uses."""
    max_batch: int = 8
    """Most samples computed together, where the batch is free; 0: requests stay alone."""
    min_replicas: int = 1
    """Fewest copies of the server."""
    max_replicas: int = 1
    """Most copies of the server."""
    memory: str = "2Gi"
    """Memory of a server, as Kubernetes writes it."""

    def __post_init__(self) -> None:
        if not _URI.fullmatch(self.storage):
            raise ValueError(
                "storage must say where the folder `models` will lie, such as s3://bucket/digits "
                f"or pvc://claim/digits, got {self.storage!r}"
            )
        for field in ("name", "namespace"):
            value = getattr(self, field)
            if not _LABEL.fullmatch(value) and (value or field == "name"):
                raise ValueError(
                    f"{field} must be a label of Kubernetes: small letters, digits and '-', "
                    f"got {value!r}"
                )
        if self.max_batch < 0:
            raise ValueError(f"max_batch must not be negative, got {self.max_batch}")
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"there must be from min_replicas to max_replicas servers, got {self.min_replicas} "
                f"to {self.max_replicas}"
            )
        if not _QUANTITY.fullmatch(self.memory):
            raise ValueError(f"memory must be like 2Gi or 500M, got {self.memory!r}")


def write(artifact: Artifact, folder: Path, options: Kserve) -> None:
    """Write the manifest and the repository."""
    serving = Serving(
        name=options.name,
        backend=artifact.target.runtime,
        max_batch=options.max_batch,
        instances=1,
        delay_us=100,
    )
    write_repository(artifact, folder / "models", serving)
    text = yaml.safe_dump(manifest(options, artifact.target.threads), sort_keys=False)
    (folder / "inferenceservice.yaml").write_text(text, encoding="utf-8")


def manifest(options: Kserve, threads: int) -> dict[str, Any]:
    """Return the InferenceService as plain data; a server gets as many cores as it has threads."""
    room = {"cpu": str(threads or 1), "memory": options.memory}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": options.name,
            **({"namespace": options.namespace} if options.namespace else {}),
        },
        "spec": {
            "predictor": {
                "minReplicas": options.min_replicas,
                "maxReplicas": options.max_replicas,
                "model": {
                    "modelFormat": {"name": "triton", "version": "2"},
                    "runtime": "kserve-tritonserver",
                    "protocolVersion": "v2",
                    "storageUri": options.storage,
                    "resources": {"requests": dict(room), "limits": dict(room)},
                },
            }
        },
    }


DEPLOYMENT = Deployment(
    runtimes=("onnxruntime", "openvino"),
    options=Kserve,
    write=write,
    check="kubectl apply --dry-run=server -f inferenceservice.yaml",
)
