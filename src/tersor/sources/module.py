"""A PyTorch network that the user's code builds: "package.module:factory" or "file.py:factory"."""

from pathlib import Path

from torch import nn

from tersor.core.errors import ModelError
from tersor.core.imports import call_object
from tersor.core.model import Model, Source
from tersor.sources._continued import from_artifact
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
        net = from_artifact(net, Path(weights))
    elif weights is not None:
        notes = load_weights(net, Path(weights), partial=partial)
    net.eval()
    check_finite(net.state_dict().items(), f"network {place!r}")
    return Model(net=net, form="module", origin=f"module:{place}", notes=notes)


SOURCE = Source(load=load)
