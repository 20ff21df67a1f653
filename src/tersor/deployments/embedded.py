"""A C program that runs the network without Python, by ONNX Runtime's C interface.

OUT holds main.c, a Makefile, the model, one example of inputs and the outputs that the artifact
made of it; `make check ORT=FOLDER` compiles and runs it, and compares. FOLDER is a release of ONNX
Runtime, or its Python package. Other builds of ONNX Runtime, and other processors, may round
differently; `tolerance` says by how much.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tersor.core.artifact import Artifact
from tersor.core.deployment import Deployment
from tersor.core.errors import TargetError
from tersor.core.runtime import Arrays
from tersor.deployments._interface import Interface, interface
from tersor.deployments._model_files import copy_model

_PARTS = {
    "main.c": "_embedded_main.c",
    "ort.h": "_embedded_ort.h",
    "Makefile": "_embedded_Makefile",
}
_API_VERSION = 11
"""Of the C interface: the oldest with all that main.c calls is 5; later ones answer to it, too."""
_TYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Settings of `embedded`."""

    tolerance: float = 1e-4
    """Largest difference that the check allows, as a part of the largest expected value."""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance:g}")


def write(artifact: Artifact, folder: Path, options: Embedded) -> None:
    """Write the program, the model and the example."""
    found = interface(artifact)
    model = copy_model(artifact, folder).name
    for name, source in _PARTS.items():
        shutil.copyfile(Path(__file__).with_name(source), folder / name)
    text = _header(found, model, artifact.target.threads, options)
    (folder / "network.h").write_text(text, encoding="utf-8")
    for word, arrays in (("input", found.example), ("expected", found.made)):
        for i, array in enumerate(arrays.values()):
            little = array.astype(array.dtype.newbyteorder("<"))
            (folder / f"{word}_{i}.bin").write_bytes(np.ascontiguousarray(little).tobytes())


def _header(found: Interface, model: str, threads: int, options: Embedded) -> str:
    lines = [
        "/* What the network takes and gives. */",
        "",
        "#pragma once",
        "",
        f"#define MODEL {json.dumps(model)}",
        f"#define API_VERSION {_API_VERSION}",
        f"#define THREADS {threads} /* 0: all */",
        f"#define TOLERANCE {options.tolerance!r} /* of the largest expected value */",
        f"#define NUM_INPUTS {len(found.example)}",
        f"#define NUM_OUTPUTS {len(found.made)}",
        "",
        "typedef struct {",
        "    const char *name, *file;",
        "    int type;",
        "    size_t bytes, rank;",
        "    int64_t shape[8];",
        "} Tensor;",
        "",
        *_tensors("INPUTS", "input", found.example),
        *_tensors("OUTPUTS", "expected", found.made),
    ]
    return "\n".join(lines) + "\n"


def _tensors(word: str, file: str, arrays: Arrays) -> list[str]:
    lines = [f"static const Tensor {word}[] = {{"]
    for i, (name, array) in enumerate(arrays.items()):
        kind = str(array.dtype)
        if kind not in _TYPES or array.ndim > 8:
            raise TargetError(
                f"the embedded program has no {array.ndim}-dimensional tensors of {kind}, such as "
                f"{name!r}; it has those of {', '.join(_TYPES)} with up to 8 dimensions"
            )
        shape = ", ".join(map(str, array.shape)) or "0"
        lines.append(
            f'    {{{json.dumps(name)}, "{file}_{i}.bin", '
            f"ONNX_TENSOR_ELEMENT_DATA_TYPE_{_TYPES[kind]}, "
            f"{array.nbytes}, {array.ndim}, {{{shape}}}}},"
        )
    return [*lines, "};"]


DEPLOYMENT = Deployment(
    runtimes=("onnxruntime",),
    options=Embedded,
    write=write,
    check="make check ORT=FOLDER  # a release of ONNX Runtime, or the `capi` of its Python package",
)
