"""TensorFlow's part of reading a Keras model: runs in a child process alone."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.core.errors import ModelError, named_lines

_OPSET = 18
"""The newest of tf2onnx."""
_CALLS_OUT = re.compile(
    r".*(File|PyFunc|Dataset|Iterator|Reader|Library|Rpc|Grpc|Socket|Summary|HostCompute|Remote|"
    r"CustomCall|InitializeTable|Worker|Server|TPU|Debug|EncodeProto|DecodeProto|Collective).*|"
    r"Save(Slices|V2)?|Restore(Slice|V2)?|MergeV2Checkpoints|Print(V2)?|ImmutableConst|LoadAndRemapMatrix|"
    r"GenerateVocabRemapping|Skipgram"
)
"""Operators that touch files, run Python or talk to others."""
_MOST_UNPACKED = 64
"""Weights may be compressed so many times."""


def convert(place: Path, file: Path) -> None:
    """Write a .keras file, or a SavedModel folder, as ONNX.

    Args:
        place: Checked by `_keras_checks`.
        file: Written.

    Raises:
        ModelError: what TensorFlow, or the conversion, had to say.
    """
    os.environ.update(
        TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="-1"
    )
    call, specs, outputs = _saved_model(place) if place.is_dir() else _keras(place)
    _write(call, specs, outputs, file)


def _keras(place: Path) -> tuple[Any, list[Any], list[str]]:
    import keras
    import tensorflow as tf

    _check_weights(place)
    try:
        model = keras.models.load_model(place, compile=False, safe_mode=True)
    except Exception as error:
        raise ModelError(
            f"Keras {keras.__version__} cannot load it: {named_lines(error)}"
        ) from error
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype, name=tensor.name) for tensor in model.inputs]

    outputs = list(dict.fromkeys(getattr(model, "output_names", ["output"])))
    if len(outputs) != len(model.outputs):
        outputs = [f"output_{i}" for i in range(len(model.outputs))]

    def call(*tensors: Any) -> Any:
        made = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        return dict(zip(outputs, tf.nest.flatten(made), strict=True))

    return tf.function(call, autograph=False), specs, outputs


def _check_weights(place: Path) -> None:
    """Let no weight be a link to another file, or unpack to what memory does not hold."""
    import io
    from zipfile import ZipFile

    import h5py

    with ZipFile(place) as archive:
        packed = archive.read("model.weights.h5")
    total = 0
    try:
        with h5py.File(io.BytesIO(packed), "r") as weights:
            groups = [weights]
            while groups:
                group = groups.pop()
                for name in group:
                    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                        raise ModelError(f"its weights hold a link: {name[:80]!r}")
                    entry = group[name]
                    if isinstance(entry, h5py.Group):
                        groups.append(entry)
                        continue
                    if entry.external or entry.is_virtual:
                        raise ModelError(f"its weights lie in another file: {name[:80]!r}")
                    total += entry.nbytes
                    if total > _MOST_UNPACKED * len(packed) + (256 << 20):
                        raise ModelError(f"its weights of {len(packed)} bytes unpack to {total}")
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"its weights are damaged: {named_lines(error)}") from error


def _saved_model(place: Path) -> tuple[Any, list[Any], list[str]]:
    import tensorflow as tf

    try:
        with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
            copy = Path(folder)
            (copy / "saved_model.pb").write_bytes(_without_saver(place / "saved_model.pb"))
            (copy / "variables").symlink_to(place.resolve() / "variables")
            loaded = tf.saved_model.load(folder)
        signatures = {n: s for n, s in loaded.signatures.items() if not n.startswith("_")}
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"TensorFlow cannot load it: {named_lines(error)}") from error
    wanted = "serving_default" if "serving_default" in signatures else next(iter(signatures), None)
    if wanted is None:
        raise ModelError("it has no signature to call; save it with model.export(FOLDER)")
    signature = signatures[wanted]
    named = signature.structured_input_signature[1]
    specs = [tf.TensorSpec(s.shape, s.dtype, name=name) for name, s in named.items()]

    def call(*tensors: Any) -> Any:
        assert loaded is not None  # its variables live as long as this
        return signature(**dict(zip(named, tensors, strict=True)))

    return tf.function(call, autograph=False), specs, sorted(signature.structured_outputs)


def _without_saver(file: Path) -> bytes:
    """Read the graph as a message, without building it, and refuse operators that call out.

    Every SavedModel holds functions that save it again and read its weights. They are left out, so
    that nothing that runs on loading can call them: TensorFlow reads the weights without them.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    message = saved_model_pb2.SavedModel()
    try:
        message.ParseFromString(file.read_bytes())
    except Exception as error:
        raise ModelError(f"saved_model.pb is damaged: {named_lines(error)}") from error
    if len(message.meta_graphs) != 1:
        raise ModelError(f"saved_model.pb holds {len(message.meta_graphs)} graphs, not one")
    graph = message.meta_graphs[0]
    savers = {
        name.partition(":")[0]
        for name in (graph.saver_def.save_tensor_name, graph.saver_def.restore_op_name)
    }
    saving = {
        attribute.func.name
        for node in graph.graph_def.node
        if node.name in savers
        for attribute in node.attr.values()
    }
    for kept, entries in (
        ([n for n in graph.graph_def.node if n.name not in savers], graph.graph_def.node),
        (
            [f for f in graph.graph_def.library.function if f.signature.name not in saving],
            graph.graph_def.library.function,
        ),
    ):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        del entries[:]
        entries.extend(copies)
    graph.ClearField("saver_def")
    for operator in _operators(graph.graph_def):
        if _CALLS_OUT.fullmatch(operator):
            raise ModelError(
                f"its graph has the operator {operator!r}, which reaches outside of the network"
            )
    found: bytes = message.SerializeToString()
    return found


def _operators(graph: Any) -> Iterator[str]:
    yield from (node.op for node in graph.node)
    for function in graph.library.function:
        yield from (node.op for node in function.node_def)


def _write(call: Any, specs: list[Any], outputs: list[str], file: Path) -> None:
    import numpy as np
    import onnx

    for name, kind in {"object": object, "bool": bool}.items():
        if name not in vars(np):  # tf2onnx was written for numpy 1.23
            setattr(np, name, kind)
    import tf2onnx

    try:
        model, _ = tf2onnx.convert.from_function(call, input_signature=specs, opset=_OPSET)
    except Exception as error:
        raise ModelError(f"tf2onnx cannot write it as ONNX: {named_lines(error)}") from error
    _spell_erfc(model, onnx)
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    missing = sorted({n.op_type for n in model.graph.node if n.op_type not in known})
    if missing:
        raise ModelError(f"ONNX has no form of the TensorFlow operators {', '.join(missing)[:200]}")
    for value in (*model.graph.input, *model.graph.output):
        sizes = value.type.tensor_type.shape.dim
        if sizes and not sizes[0].dim_value:
            sizes[0].dim_param = "batch"
    made = {value.name: value for value in model.graph.output}
    if set(made) == set(outputs):  # TensorFlow sorts them by name
        ordered = [made[name].SerializeToString() for name in outputs]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto.FromString(value) for value in ordered)
    del model.metadata_props[:]
    model.graph.name, model.graph.doc_string = "network", ""
    file.write_bytes(model.SerializeToString(deterministic=True))


def _spell_erfc(model: Any, onnx: Any) -> None:
    """Write erfc(x), of which TensorFlow makes GELU, as 1 - erf(x)."""
    graph, made = model.graph, []
    for node in graph.node:
        if node.op_type != "Erfc":
            made.append(node)
            continue
        erf = f"{node.output[0]}_erf"
        made.append(onnx.helper.make_node("Erf", list(node.input), [erf]))
        made.append(onnx.helper.make_node("Sub", ["erfc_one", erf], list(node.output)))
    if len(made) == len(graph.node):
        return
    one = onnx.helper.make_tensor("erfc_one", onnx.TensorProto.FLOAT, [], [1.0])
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in made]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(one)
