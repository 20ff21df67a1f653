"""A PyTorch network that the user's code builds: "package.module:factory" or "file.py:factory"."""

from pathlib import Path

from torch import nn

from tersor.core.artifact import Artifact
from tersor.core.errors import ModelError
from tersor.core.imports import call_object
from tersor.core.model import Model, Source
from tersor.sources._weights import check_finite, load_weights


def load(place: str, *, weights: Path | None = None, partial: bool = False) -> Model:
    """Call a factory and put weights into what it returns. The network is set to eval mode.

    Args:
        place: "file.py:factory" or "package.module:factory"; the factory needs no argument.
        weights: A .safetensors file, or an artifact made from this network: its layers and
            weights, as they were before the export. Else those that the factory leaves.
        partial: Load the weights that fit, and say in `Model.notes` what did not.

    Raises:
        ModelError: it cannot be imported (with file and line), fails, returns no nn.Module, the
            weights do not fit, or there are NaN or infinite values among them.
    """
    net = call_object(place, error=ModelError, what="factory")
    if isinstance(net, type) and issubclass(net, nn.Module):
        raise ModelError(
            f"factory {place!r} returned the class {net.__name__}; return {net.__name__}()"
        )
    if not isinstance(net, nn.Module):
        raise ModelError(f"factory {place!r} returned {type(net).__name__}, not an nn.Module")
    notes: tuple[str, ...] = ()
    if weights is not None and Path(weights).is_dir():
        net = _compressed(net, Path(weights))
    elif weights is not None:
        notes = load_weights(net, Path(weights), partial=partial)
    net.eval()
    check_finite(net.state_dict().items(), f"network {place!r}")
    return Model(net=net, form="module", origin=f"module:{place}", notes=notes)


def _compressed(net: nn.Module, folder: Path) -> nn.Module:
    """Build the network of an artifact again, on the one that it was made from."""
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


SOURCE = Source(load=load)
