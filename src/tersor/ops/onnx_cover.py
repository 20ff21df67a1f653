"""Which operators of an ONNX file each operator of ONNX Runtime's optimized graph computes."""

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.core.runtime import RanOperator

_BLOCKED = "_nchwc"
"""Ends the names that ONNX Runtime gives to operators on channels in blocks."""
_ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish", "Gelu")


def name_of(node: Any) -> str:
    """Return the name of an ONNX node; without one, that of its first output."""
    return str(node.name or node.output[0])


def covered(file: Any, optimized: Any) -> list[RanOperator]:
    """Follow tensors by name: what lies between an operator's outputs and its inputs, it computes.

    Args:
        file: onnx.ModelProto as the runtime was given it.
        optimized: onnx.ModelProto that the runtime wrote of what it executes.
    """
    makers = {name: node for node in file.graph.node for name in node.output if name}
    users: dict[str, list[Any]] = {}
    for node in file.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    alias: dict[str, str] = {}
    for node in optimized.graph.node:
        _rename(node, alias, makers, users)
    made = {alias.get(name, name) for node in optimized.graph.node for name in node.output if name}
    alive = made | {value.name for value in file.graph.input}
    found = []
    for node in optimized.graph.node:
        outputs = [alias.get(name, name) for name in node.output if name]
        passes = node.op_type in ("ReorderInput", "ReorderOutput")
        names = [] if passes else _between(outputs, alive, makers)
        found.append(RanOperator(kind=node.op_type, covers=tuple(names), name=node.name))
    return found


def _rename(
    node: Any,
    alias: dict[str, str],
    makers: Mapping[str, Any],
    users: Mapping[str, Sequence[Any]],
) -> None:
    """Learn which tensor of the file an output stands for that got a name of its own."""
    if node.op_type in ("ReorderInput", "ReorderOutput"):
        alias[node.output[0]] = alias.get(node.input[0], node.input[0])
        return
    if not node.name.endswith(_BLOCKED) or node.name.removesuffix(_BLOCKED) not in makers:
        return
    now = node.name.removesuffix(_BLOCKED)
    if node.op_type == "Conv":
        # the name is that of the tensor before a sum and its activation were taken in
        added = len(node.input) > 3 and bool(node.input[3])
        if added:
            now = _next(now, users, ("Add", "Sum")) or now
        acts = any(attribute.name == "activation" for attribute in node.attribute)
        if acts and makers[now].op_type not in _ACTIVATIONS:
            now = _next(now, users, _ACTIVATIONS) or now
    alias[node.output[0]] = now


def _next(name: str, users: Mapping[str, Sequence[Any]], kinds: Sequence[str]) -> str | None:
    found = [node for node in users.get(name, ()) if node.op_type in kinds]
    return found[0].output[0] if len(found) == 1 else None


def _between(outputs: Sequence[str], alive: set[str], makers: Mapping[str, Any]) -> list[str]:
    """Name the file's operators from some tensors back to tensors that exist when it runs."""
    names, todo, seen = [], [n for n in outputs if n in makers], set()
    while todo:
        node = makers[todo.pop()]
        if id(node) in seen:
            continue
        seen.add(id(node))
        names.append(name_of(node))
        todo += [n for n in node.input if n in makers and n not in alive]
    return names
