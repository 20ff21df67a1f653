"""Writes an ONNX file as TensorFlow's SavedModel; run in an environment that has TensorFlow.

Its folder holds network.onnx, example.npz and request.json: inputs and outputs with types and sizes
(null where free). It writes saved_model/, loads it again, and writes answer.npz: what the loaded
model makes of the example, or answer.json: why there is none.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError, named_lines


def main(folder: Path) -> None:
    """Do what is asked."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        made = _save(folder)
    except Exception as error:
        reason = str(error) if isinstance(error, TargetError) else named_lines(error)
        (folder / "answer.json").write_text(json.dumps({"refused": reason}), encoding="utf-8")
    else:
        np.savez(folder / "answer.npz", **made)


def _save(folder: Path) -> dict[str, Any]:
    import onnx
    import tensorflow as tf

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    model = onnx.load(folder / "network.onnx")
    names = list(request["inputs"])
    wanted = [
        tf.TensorSpec(entry["shape"], tf.as_dtype(entry["dtype"]), name=name)
        for name, entry in request["inputs"].items()
    ]

    def serve(*given: Any) -> dict[str, Any]:
        return _compute(model, dict(zip(names, given, strict=True)), request["outputs"])

    module = tf.Module()
    module.serve = tf.function(serve, input_signature=wanted, autograph=False)
    tf.saved_model.save(module, str(folder / "saved_model"), signatures=module.serve)
    loaded = tf.saved_model.load(str(folder / "saved_model"))
    with np.load(folder / "example.npz", allow_pickle=False) as arrays:
        example = {name: tf.constant(arrays[name]) for name in names}
    made = loaded.signatures["serving_default"](**example)
    return {name: tensor.numpy() for name, tensor in made.items()}


def _compute(model: Any, given: Mapping[str, Any], outputs: list[str]) -> dict[str, Any]:
    """Call the operators of a graph in their order."""
    import onnx
    import tensorflow as tf

    from tersor.deployments._tensorflow_operators import OPERATORS

    values: dict[str, Any] = {"": None, **given}
    for tensor in model.graph.initializer:
        values[tensor.name] = _array(tensor)
    for node in model.graph.node:
        attributes = {
            a.name: _attribute(onnx.helper.get_attribute_value(a)) for a in node.attribute
        }
        if node.op_type == "Constant":
            values[node.output[0]] = _constant(attributes)
            continue
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise TargetError(f"TensorFlow has no operator {node.op_type} ({node.output[0]})")
        try:
            made = OPERATORS[node.op_type]([values[name] for name in node.input], attributes)
        except TargetError as error:
            raise TargetError(
                f"TensorFlow has no operator {node.op_type} ({node.output[0]}) with {error}"
            ) from error
        except Exception as error:
            raise ValueError(f"operator {node.op_type} ({node.output[0]}): {error}") from error
        several = made if isinstance(made, list | tuple) else [made]
        values.update(zip(node.output, several, strict=False))
    return {name: tf.identity(values[name], name=None) for name in outputs}


def _array(tensor: Any) -> np.ndarray:
    import onnx

    array = onnx.numpy_helper.to_array(tensor)
    # TensorFlow computes nothing in types of 4 bits
    return array.astype(np.int8) if array.dtype.itemsize == 1 and array.dtype.kind == "V" else array


def _attribute(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _constant(attributes: Mapping[str, Any]) -> np.ndarray:
    ((name, value),) = attributes.items()
    if name == "value":
        return _array(value)
    return np.array(value, np.int64 if name.startswith("value_int") else np.float32)
