"""Check the structure of an ONNX model, naming the node that is wrong."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnx

from tersor.core.errors import ModelError

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "ai.onnx.preview")
_DEEPEST = 16
_LONGEST_LOOP = 10_000_000


def check_versions(model: onnx.ModelProto) -> None:
    """Refuse a model newer than what is installed, or of no version.

    Raises:
        ModelError: saying what is needed.
    """
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"IR version {model.ir_version} is newer than the {onnx.IR_VERSION} known here; "
            f"needs {_newer()}, or export it again with IR version <= {onnx.IR_VERSION}"
        )
    known = onnx.defs.onnx_opset_version()
    versions = {entry.domain: entry.version for entry in model.opset_import}
    standard = versions.get("", versions.get("ai.onnx"))
    if standard is None:
        raise ModelError("it imports no operator set: cut off, or not an ONNX model")
    if standard > known:
        raise ModelError(
            f"opset {standard} is newer than the {known} known here; "
            f"needs {_newer()}, or export it again with opset <= {known}"
        )
    if standard < 7:
        raise ModelError(
            f"opset {standard} is too old; convert it to 21 with onnx.version_converter"
        )


def check_text(message: Any) -> None:
    """Refuse names that are not UTF-8, which protobuf lets through as bytes.

    Raises:
        ModelError: with the field.
    """
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            texts = [value] if isinstance(value, (str, bytes)) else value
            bad = [text for text in texts if isinstance(text, bytes)]
            if bad:
                raise ModelError(f"its field {field.full_name!r} is not UTF-8: {bad[0][:40]!r}")
        elif field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                check_text(part)


def check_structure(model: onnx.ModelProto) -> None:
    """Refuse unknown operators, wrong names, cycles, missing inputs and deep nesting.

    Raises:
        ModelError: naming the node.
    """
    graph = model.graph
    if not graph.node:
        raise ModelError("it has no nodes: cut off, or not an ONNX model")
    if not graph.output:
        raise ModelError("its graph has no outputs")
    local = {(f.domain, f.name) for f in model.functions}
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for function in model.functions:
        _check_nodes(function.node, set(function.input), local, versions, 1)
    _check_graph(graph, set(), local, versions, 0)


def _check_graph(
    graph: Any,
    outer: set[str],
    local: set[tuple[str, str]],
    versions: Mapping[str, int],
    depth: int,
) -> None:
    if depth > _DEEPEST:
        raise ModelError(f"its subgraphs (If, Loop) are nested more than {_DEEPEST} deep")
    inputs = [value.name for value in graph.input]
    if len(set(inputs)) < len(inputs):
        raise ModelError(f"two inputs are called {_twice(inputs)!r}")
    stored = [tensor.name for tensor in graph.initializer]
    stored += [sparse.values.name for sparse in graph.sparse_initializer]
    if len(set(stored)) < len(stored):
        raise ModelError(f"two initializers are called {_twice(stored)!r}")
    made = _check_nodes(graph.node, outer | set(inputs) | set(stored), local, versions, depth)
    for value in graph.output:
        if value.name not in made:
            raise ModelError(f"output {value.name!r} is made by no node")


def _check_nodes(
    nodes: Sequence[Any],
    known: set[str],
    local: set[tuple[str, str]],
    versions: Mapping[str, int],
    depth: int,
) -> set[str]:
    """Go through nodes in order; return all names known after the last one."""
    known = set(known)
    makers: dict[str, Any] = {}
    for node in nodes:
        for name in filter(None, node.output):
            if name in makers or name in known:
                other = (
                    f"node {_label(makers[name])}" if name in makers else "an input or initializer"
                )
                raise ModelError(f"node {_label(node)} makes {name!r} again, which {other} makes")
            makers[name] = node
    for node in nodes:
        _check_operator(node, local, versions)
        for name in filter(None, node.input):
            if name not in known:
                raise ModelError(_unknown(node, name, makers))
        for attribute in node.attribute:
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _check_graph(graph, known, local, versions, depth + 1)
        known.update(filter(None, node.output))
    return known


def _check_operator(node: Any, local: set[tuple[str, str]], versions: Mapping[str, int]) -> None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if (node.domain, node.op_type) in local:
        return
    if domain not in _DOMAINS:
        raise ModelError(
            f"node {_label(node)} is of the custom operator domain {node.domain!r}, whose code is "
            "not part of the file; custom operators are refused"
        )
    if (
        domain not in versions
        and node.domain not in versions
        and not (domain == "" and "ai.onnx" in versions)
    ):
        raise ModelError(f"node {_label(node)} is of domain {node.domain!r}, which is not imported")
    if domain == "":
        newest = versions.get("", versions.get("ai.onnx", 1))
        try:
            onnx.defs.get_schema(node.op_type, newest, "")
        except onnx.defs.SchemaError:
            raise ModelError(
                f"node {_label(node)}: there is no operator {node.op_type!r} in opset {newest}"
            ) from None


def _unknown(node: Any, name: str, makers: Mapping[str, Any]) -> str:
    """Say why an input is not there when its node runs."""
    if name not in makers:
        return f"node {_label(node)} takes {name!r}, which nothing makes"
    seen, todo = set(), [makers[name]]
    while todo:
        maker = todo.pop()
        if maker is node or any(name in maker.input for name in node.output if name):
            return f"the graph has a cycle through node {_label(node)}, by {name!r}"
        for wanted in maker.input:
            if wanted in makers and wanted not in seen:
                seen.add(wanted)
                todo.append(makers[wanted])
    return f"node {_label(node)} takes {name!r}, which is made only later; its nodes are not sorted"


def check_loops(model: onnx.ModelProto) -> None:
    """Refuse loops whose fixed number of turns would never end.

    Raises:
        ModelError: naming the node.
    """
    _check_loops(model.graph, {})


def _check_loops(graph: Any, outer: Mapping[str, int]) -> None:
    fixed = {**outer, **{t.name: _first(t) for t in graph.initializer if _is_count(t)}}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and _is_count(attribute.t):
                fixed[node.output[0]] = _first(attribute.t)
            elif node.op_type == "Constant" and attribute.name == "value_int":
                fixed[node.output[0]] = attribute.i
        if node.op_type == "Loop" and node.input and fixed.get(node.input[0], 0) > _LONGEST_LOOP:
            raise ModelError(
                f"node {_label(node)} loops {fixed[node.input[0]]} times, more than the budget of "
                f"{_LONGEST_LOOP}"
            )
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _check_loops(inner, fixed)


def _is_count(tensor: Any) -> bool:
    return tensor.data_type == onnx.TensorProto.INT64 and list(tensor.dims) in ([], [1])


def _first(tensor: Any) -> int:
    return int(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])


def _label(node: Any) -> str:
    name = node.name or (node.output[0] if node.output else "")
    return f"{name!r} ({node.op_type})" if name else f"({node.op_type})"


def _twice(names: list[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


def _newer() -> str:
    """Name the first onnxruntime that may know more than the one installed."""
    try:
        major, minor = version("onnxruntime").split(".")[:2]
    except PackageNotFoundError:
        return f"onnx newer than {onnx.__version__} and an onnxruntime to match"
    return f"onnxruntime >= {major}.{int(minor) + 1} and onnx newer than {onnx.__version__}"
