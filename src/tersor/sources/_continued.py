"""Go on from an artifact: its layers and weights, as they were before the export."""

from pathlib import Path

from torch import nn

from tersor.core.artifact import Artifact
from tersor.core.errors import ModelError


def from_artifact(net: nn.Module, folder: Path) -> nn.Module:
    """Build the network of an artifact again, on the one that it was made from.

    Args:
        net: The network that the artifact was made from.
        folder: The artifact.

    Raises:
        ModelError: it holds none, or was made from another network.
    """
    from tersor.ops import edits

    artifact = Artifact.open(folder, check="hashes")
    stored = artifact.path / "network"
    if not (stored / "network.json").is_file():
        raise ModelError(
            f"artifact {str(folder)!r} holds no network to go on from: no stage changed it, or it "
            "was made from an exported program or ONNX"
        )
    cause: Exception | None = None
    try:
        made = edits.replay(stored, net)
        other = edits.differing(stored, made)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        cause, other = error, [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    if other:
        raise ModelError(
            f"artifact {str(folder)!r} was not made from this network ({other[0]}); give the "
            f"factory that it was made from: {artifact.describe().get('origin')}"
        ) from cause
    return made
