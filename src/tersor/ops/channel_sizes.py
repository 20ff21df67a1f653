"""Numbers that a forward computes from a count of channels, such as a head's depth from the width.

When channels go, such a number would come out smaller. Each call that takes one is noted, so that
the number is written there as it was; the rules of shapes then write what is really kept.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import fx

from tersor.ops.atoms import Atoms, Flow, Number, Path, Value

_PARTS = ("split", "split_with_sizes")
"""Take sizes and return several tensors, which have no one shape."""


def note(flow: Flow, node: fx.Node, values: dict[fx.Node, Value]) -> None:
    """Note what a node that holds numbers is computed from, and where such numbers are taken."""
    if node.op in ("placeholder", "get_attr", "output"):
        return
    called = str(getattr(node.target, "__name__", node.target))
    if "shape" not in node.meta and called not in _PARTS:
        found = _source(flow, node, values)
        if found is not None:
            flow.derived[node] = found
        return
    for path, operand in [*_nodes(node.args, ("args",)), *_nodes(node.kwargs, ("kwargs",))]:
        atoms = flow.derived.get(operand)
        if atoms is None:
            continue
        if "value" not in operand.meta:
            flow.block(atoms, f"{node.name} takes several sizes at once ({node.name})")
            continue
        before = operand.meta["value"]
        flow.numbers.append(Number(node=node.name, path=path, atoms=atoms, value=_constant(before)))


def _constant(value: float) -> Any:
    return lambda _: value


def _source(flow: Flow, node: fx.Node, values: dict[fx.Node, Value]) -> Atoms | None:
    """Return the atoms that a number was computed from, if any."""
    name = str(getattr(node.target, "__name__", node.target))
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is not None and "shape" in source.meta:
        dims = values.get(source, {})
        if not isinstance(dims, dict):
            return None
        if name == "size" and len(node.args) == 2 and isinstance(node.args[1], int):
            return dims.get(node.args[1] % len(source.meta["shape"]))
        if name == "len":
            return dims.get(0)
        return _all(dims.values()) if name == "numel" else None
    if source is not None and name == "getitem":
        whole = _shape_of(source, values)
        if whole is not None:
            rank, dims = whole
            index = node.args[1]
            if isinstance(index, int):
                return dims.get(index % rank)
            if isinstance(index, slice):
                taken = range(rank)[index]
                return _all(dims[d] for d in taken if d in dims)
    operands = [operand for _, operand in _nodes((node.args, node.kwargs), ())]
    if any(isinstance(values.get(o), tuple) for o in operands):
        return None  # an element of several tensors
    shapes = [whole[1] for o in operands if (whole := _shape_of(o, values)) is not None]
    known = [flow.derived[o] for o in operands if o in flow.derived]
    return _all([*known, *(atoms for dims in shapes for atoms in dims.values())])


def _shape_of(node: fx.Node, values: dict[fx.Node, Value]) -> tuple[int, dict[int, Atoms]] | None:
    """Return rank and channels of the tensor whose whole shape a node holds."""
    name = str(getattr(node.target, "__name__", node.target))
    whole = name == "getattr" and node.args[1:] == ("shape",)
    if not (whole or (name == "size" and len(node.args) == 1)):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or "shape" not in source.meta:
        return None
    dims = values.get(source, {})
    return (len(source.meta["shape"]), dims) if isinstance(dims, dict) else None


def _all(several: Any) -> Atoms | None:
    found = list(several)
    return np.concatenate(found) if found else None


def _nodes(tree: Any, path: Path) -> Iterator[tuple[Path, fx.Node]]:
    """List the nodes inside an argument, and where they are."""
    if isinstance(tree, fx.Node):
        yield path, tree
    elif isinstance(tree, slice):
        for word in ("start", "stop"):
            yield from _nodes(getattr(tree, word), (*path, word))
    elif isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from _nodes(item, (*path, index))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _nodes(item, (*path, key))
