"""A Keras 3 file (.keras) or a TensorFlow SavedModel folder, converted to ONNX.

Layers that carry code are never loaded: what the file asks for is compared with a list of layers
before Keras sees it, and Keras gets a copy that holds nothing else. A SavedModel is a graph, not
code; its operators that touch files or call out are refused. Both are read by TensorFlow, in a
child process with limits on its time and memory. Inputs keep Keras' names and layout (channels
last).
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from tersor.core import plugins
from tersor.core.errors import ModelError, TargetError
from tersor.core.model import Model, Source
from tersor.sources._keras_checks import check_folder, checked_copy

_SECONDS = 600.0
"""For TensorFlow to start, load and convert."""


def load(place: str, *, weights: Path | None = None, partial: bool = False) -> Model:
    """Convert a Keras file or a SavedModel folder, and read the result as an ONNX file.

    Args:
        place: The .keras file or the folder.
        weights: Must be None: both hold their weights.
        partial: Has no meaning here.

    Raises:
        ModelError: damaged, unsafe, or not convertible.
        DependencyError: TensorFlow is neither here nor in the environment `keras`.
    """
    del partial
    path = Path(place)
    if weights is not None:
        raise ModelError(f"Keras model {place!r} holds its own weights; leave --weights out")
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        try:
            if path.is_dir():
                check_folder(path)
                taken = path
            else:
                taken = checked_copy(path, Path(folder) / "model.keras")
        except ModelError as error:
            raise ModelError(f"Keras model {place!r} {error}") from error
        made = Path(folder) / "model.onnx"
        try:
            plugins.converted("keras", taken, made, seconds=_SECONDS)
        except (ModelError, TargetError) as error:
            raise ModelError(f"Keras model {place!r} cannot be converted: {error}") from error
        try:
            model = plugins.source("onnx").load(str(made))
        except ModelError as error:
            said = str(error).replace(str(made), place)
            raise ModelError(f"Keras model {place!r}, converted to ONNX: {said}") from error
    return replace(model, origin=f"keras:{place}")


def convert(place: Path, file: Path) -> None:
    """Write a checked model as ONNX; runs in a child process."""
    from tersor.sources import _keras_convert

    _keras_convert.convert(place, file)


SOURCE = Source(
    load=load,
    suffixes=(".keras", ".h5", ".hdf5"),
    convert=convert,
    to_convert=("tensorflow", "keras", "tf2onnx", "onnx"),
)
