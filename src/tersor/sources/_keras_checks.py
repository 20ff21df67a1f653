"""Check a Keras file or a SavedModel folder before Keras or TensorFlow see it.

Keras builds what config.json names: layers with code (Lambda, TorchModuleWrapper), custom classes,
and in some versions any function of its own, such as one that downloads (CVE-2024-3660,
CVE-2025-1550, CVE-2025-8747, CVE-2025-49655). So only names of a list are let through, and only
what was checked is handed on: the copy is written anew from what was read here.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from tersor.core.errors import ModelError
from tersor.core.sniffing import foreign, zip_problem

_CONFIG, _WEIGHTS, _METADATA = "config.json", "model.weights.h5", "metadata.json"
_MOST_CONFIG = 64 << 20
"""Bytes of config.json."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LAYERS = _words(
    """
    Activation ActivityRegularization Add AdditiveAttention AlphaDropout Attention Average
    AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional CenterCrop
    Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose Cropping1D
    Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D Dot Dropout ELU EinsumDense
    Embedding Flatten GRU GRUCell GaussianDropout GaussianNoise GlobalAveragePooling1D
    GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GroupNormalization GroupQueryAttention Identity InputLayer LSTM LSTMCell
    LayerNormalization LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum
    MultiHeadAttention Multiply Normalization PReLU Permute RMSNormalization RNN RandomBrightness
    RandomContrast RandomCrop RandomFlip RandomRotation RandomTranslation RandomZoom ReLU
    RepeatVector Rescaling Reshape Resizing SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell
    Softmax SpatialDropout1D SpatialDropout2D SpatialDropout3D StackedRNNCells Subtract
    TimeDistributed UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D
    ZeroPadding2D ZeroPadding3D
    """
)
_OPERATIONS = _words(
    """
    Absolute Add Argmax Argmin Average AveragePool BroadcastTo Cast Clip Concatenate Conv Cos
    DepthwiseConv Divide Einsum Elu Equal Erf Exp ExpandDims Flip Floor GetItem Gelu Greater
    GreaterEqual HardSigmoid HardSilu LayerNorm LeakyRelu Less LessEqual Log LogSoftmax LogicalAnd
    LogicalNot LogicalOr Matmul Max MaxPool Maximum Mean Min Minimum Moveaxis Multiply Negative
    Normalize NotEqual OneHot Pad Power Prod Reciprocal Relu Relu6 Repeat Reshape Round Rsqrt
    Selu Sigmoid Sign Silu Sin Softmax Softplus Split Sqrt Square Squeeze Stack StopGradient
    Subtract Sum Swapaxes Take Tanh Tile Transpose TrueDivide Unstack Var Where
    """
)
_SMALL = _words(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer LecunNormal
    LecunUniform Ones Orthogonal OrthogonalInitializer RandomNormal RandomUniform TruncatedNormal
    VarianceScaling Zeros L1 L2 L1L2 OrthogonalRegularizer MaxNorm MinMaxNorm NonNeg UnitNorm
    DTypePolicy
    """
)
_MODELS = frozenset(["Functional", "Sequential"])
_ALLOWED: Mapping[str, frozenset[str]] = {
    "keras": frozenset([*_MODELS, "DTypePolicy"]),
    "keras.models": _MODELS,
    "keras.src.models.functional": _MODELS,
    "keras.src.models.sequential": _MODELS,
    "keras.layers": _LAYERS,
    "keras.initializers": _SMALL,
    "keras.regularizers": _SMALL,
    "keras.constraints": _SMALL,
    "keras.dtype_policies": _SMALL,
    "keras.src.ops.numpy": _OPERATIONS,
    "keras.src.ops.nn": _OPERATIONS,
    "keras.src.ops.math": _OPERATIONS,
    "keras.src.ops.core": _OPERATIONS,
}
_VALUES = ("__keras_tensor__", "__tensor__", "__numpy__", "__slice__", "__ellipsis__")
"""Plain values among the objects."""
_CODE = {
    "Lambda": "code",
    "__lambda__": "code",
    "TorchModuleWrapper": "a pickled PyTorch module, which can run code",
    "TFSMLayer": "another model's folder",
    "JaxLayer": "code",
    "FlaxLayer": "code",
}
_IN_FOLDER = re.compile(
    r"saved_model\.pb|fingerprint\.pb|keras_metadata\.pb|variables|assets|"
    r"variables/variables\.(index|data-\d{5}-of-\d{5})"
)


def checked_copy(file: Path, copy: Path) -> Path:
    """Check a .keras file, and write what was checked to another.

    Raises:
        ModelError: in words to put after the file's name.
    """
    reason = foreign(file, "a zip archive")
    if "HDF5" in reason:
        raise ModelError(
            "is an HDF5 file, the older format of Keras, whose code layers no setting keeps from "
            "being run (CVE-2025-9905), and is not read. Where you trust it, convert it once: "
            "keras.models.load_model(FILE).save('model.keras')"
        )
    reason = reason or zip_problem(file)
    if reason:
        raise ModelError(reason)
    with ZipFile(file) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        other = [n for n in sizes if n not in (_CONFIG, _WEIGHTS, _METADATA)]
        if other:
            raise ModelError(f"has the entry {other[0][:80]!r}, which no plain network needs")
        for needed in (_CONFIG, _WEIGHTS):
            if needed not in sizes:
                raise ModelError(f"lacks {needed!r}; save it with Keras 3: model.save(FILE.keras)")
        if sizes[_CONFIG] > _MOST_CONFIG:
            raise ModelError(f"has a config.json of {sizes[_CONFIG] >> 20} MiB")
        try:
            config = json.loads(archive.read(_CONFIG))
            check_config(config)
            plain = _without_training(config)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"has a damaged config.json: {str(error)[:160]}") from error
        with ZipFile(copy, "w") as made:
            made.writestr(_CONFIG, json.dumps(plain))
            made.writestr(_METADATA, json.dumps({"keras_version": "3", "date_saved": ""}))
            with archive.open(_WEIGHTS) as source, made.open(_WEIGHTS, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return copy


def check_config(config: Any) -> None:
    """Refuse what is not on the list of layers, operations and their settings.

    Raises:
        ModelError: names it.
    """
    found = str(config.get("class_name")) if isinstance(config, dict) else ""
    if found not in _MODELS:
        raise ModelError(
            f"holds a {found[:80]!r}, not a Sequential or Functional model; a subclassed one "
            "is code: export it instead, model.export(FOLDER), and give that folder"
        )
    for entry in _objects(config):
        _check_object(entry)


def _check_object(entry: Mapping[str, Any]) -> None:
    name, module = str(entry["class_name"]), str(entry.get("module"))
    if name in _VALUES:
        return
    inner = entry.get("config")
    given = inner.get("name") if isinstance(inner, dict) else None
    called = f" {given[:80]!r}" if isinstance(given, str) else ""
    if name in _CODE:
        raise ModelError(
            f"has a {name} layer{called}, which holds {_CODE[name]}, and is refused; rebuild the "
            "network with plain layers, or export it: model.export(FOLDER)"
        )
    shown = str(inner)[:80] if name == "function" else name[:80]
    registered = entry.get("registered_name")
    if name not in _ALLOWED.get(module, ()) or registered not in (None, "", name):
        raise ModelError(
            f"asks for {shown!r} of {module[:80]!r}{called}, which is not on the list of "
            "plain layers and operations, and is not loaded; export the network instead, "
            "model.export(FOLDER), and give that folder"
        )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield everything below that Keras would make an object of."""
    if isinstance(value, dict):
        if "class_name" in value:
            yield value
        for key, item in value.items():
            if key != "compile_config":
                yield from _objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from _objects(item)


def _without_training(value: Any) -> Any:
    """Leave out losses, metrics and optimizers, which are not needed and may be custom."""
    if isinstance(value, dict):
        return {k: _without_training(v) for k, v in value.items() if k != "compile_config"}
    return [_without_training(item) for item in value] if isinstance(value, list) else value


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no plain SavedModel.

    Raises:
        ModelError: in words to put after the folder's name.
    """
    if not (folder / "saved_model.pb").is_file():
        raise ModelError("is a folder without saved_model.pb, so no SavedModel of TensorFlow")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ModelError(f"has a link in it: {name[:80]!r}; give a folder of plain files")
        if not _IN_FOLDER.fullmatch(name):
            raise ModelError(
                f"has {name[:80]!r} in it, which no plain network needs; vocabularies and other "
                "assets belong to the code before the network"
            )
