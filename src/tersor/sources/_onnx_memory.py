"""Estimate the memory that running an ONNX model takes, without running it."""

import math
from collections.abc import Mapping
from typing import Any

import onnx

from tersor.core.errors import ModelError
from tersor.sources._onnx_data import _BITS

BUDGET = 8 << 30
"""Bytes that one tensor, and all that are alive at once, may take at batch 1."""
_SMALL = 4096


def check_memory(model: onnx.ModelProto, budget: int = BUDGET) -> None:
    """Refuse a model whose tensors cannot fit, such as a ConstantOfShape bomb.

    Free dimensions count as 1; shapes that depend on values at run time are not seen.

    Raises:
        ModelError: with the node, what it needs and the budget.
    """
    shapes = _shapes(model)
    for node in model.graph.node:
        for name in node.output:
            needed = shapes.get(name, 0)
            if needed > budget:
                raise ModelError(
                    f"node {node.name or name!r} ({node.op_type}) makes a tensor that needs "
                    f"{_say(needed)}, budget {_say(budget)}; refused before running"
                )
    peak = _peak(model.graph, shapes)
    if peak > budget:
        raise ModelError(
            f"running it needs {_say(peak)} at once, budget {_say(budget)}; refused before running"
        )


def _shapes(model: onnx.ModelProto) -> dict[str, int]:
    """Infer shapes on a copy without its large weights; return bytes by name."""
    light = onnx.ModelProto()
    light.CopyFrom(_without_data(model))
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ModelError(f"its shapes do not fit together: {reason}") from error
    sizes = {v.name: _bytes(v.type) for v in [*inferred.graph.value_info, *inferred.graph.output]}
    return {name: size for name, size in sizes.items() if size}


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model; large initializers become inputs of the same shape."""
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    stored = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in stored)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return light


def _bytes(kind: Any) -> int:
    """Return the bytes of a tensor type; free dimensions count as 1, unknown types as 4 bytes."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return 0
    dims = [
        max(d.dim_value, 1) if d.HasField("dim_value") else 1 for d in kind.tensor_type.shape.dim
    ]
    return math.prod(dims) * _BITS.get(kind.tensor_type.elem_type, 32) // 8


def _peak(graph: Any, sizes: Mapping[str, int]) -> int:
    """Add up what is alive while each node runs; a tensor is freed after its last use."""
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    for value in graph.output:
        last[value.name] = len(graph.node)
    ends: dict[int, list[str]] = {}
    alive = peak = 0
    for i, node in enumerate(graph.node):
        for name in node.output:
            if name in sizes:
                alive += sizes[name]
                ends.setdefault(last.get(name, i), []).append(name)
        peak = max(peak, alive)
        alive -= sum(sizes[name] for name in ends.pop(i, []))
    return peak


def _say(size: int) -> str:
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return (
                f"{size / factor:.3g} {unit}"
                if size < 1e4 * factor
                else f"{size / factor:.0f} {unit}"
            )
    return f"{size} B"
