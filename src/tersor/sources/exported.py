"""A program that torch.export.save wrote: a .pt2 file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree

from tersor.core.errors import ModelError
from tersor.core.model import Inputs, Model, Source
from tersor.ops import pt2
from tersor.sources._weights import check_finite


def load(place: str, *, weights: Path | None = None, partial: bool = False) -> Model:
    """Read an exported program after checking that reading it runs no code.

    Args:
        place: The .pt2 file.
        weights: Must be None: the program holds its weights.
        partial: Has no meaning here.

    Raises:
        ModelError: damaged, unsafe, takes anything but tensors, or holds NaN or infinite weights.
    """
    del partial
    file = Path(place)
    if weights is not None:
        raise ModelError(f"exported program {place!r} holds its own weights; leave --weights out")
    if not file.is_file():
        raise ModelError(f"exported program {place!r} does not exist")
    program = pt2.read(file)
    check_finite(
        (
            (n, t)
            for n, t in {**program.state_dict, **program.constants}.items()
            if isinstance(t, Tensor)
        ),
        f"exported program {place!r}",
    )
    inputs = _inputs(program, place)
    return Model(net=program, form="exported", origin=f"exported:{place}", inputs=inputs)


def _inputs(program: ExportedProgram, place: str) -> Inputs:
    """Name all inputs, and let the program take them by name."""
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    shapes = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    odd = [name for name in names if not isinstance(shapes[name], Tensor)]
    if odd or len(names) != len(program.graph_signature.user_inputs):
        raise ModelError(
            f"exported program {place!r} takes an input that is no tensor "
            f"({', '.join(odd) or 'a constant'}); export it again with tensors only"
        )
    arguments, named = program.example_inputs or ((), {})
    flat = [*arguments, *named.values()]
    examples = dict(zip([*names[: len(arguments)], *named], flat, strict=False))
    if program.example_inputs and (
        set(examples) != set(names) or not all(isinstance(v, Tensor) for v in flat)
    ):
        raise ModelError(
            f"exported program {place!r} takes lists or dicts of tensors; export it again with one "
            "tensor for each parameter of forward"
        )
    dynamic = _dynamic({name: shapes[name] for name in names})
    example = {
        name: _two(_example(examples.get(name), shapes[name]), 0 in dynamic.get(name, {}))
        for name in names
    }
    if arguments:
        _take_names(program, example)
    return Inputs(example=example, dynamic=dynamic)


def _dynamic(shapes: dict[str, Any]) -> dict[str, dict[int, str]]:
    """Name the free dimensions: "batch" for the first one, one name for each symbol."""
    words: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    for name, value in shapes.items():
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                free = (
                    "batch" if axis == 0 and "batch" not in words.values() else f"dim{len(words)}"
                )
                found.setdefault(name, {})[axis] = words.setdefault(str(size), free)
    return found


def _example(given: Tensor | None, value: Tensor) -> Tensor:
    if given is not None:
        return given
    return torch.zeros([n if isinstance(n, int) else 2 for n in value.shape], dtype=value.dtype)


def _two(tensor: Tensor, free: bool) -> Tensor:
    """Repeat a batch of one, with which an export would freeze the batch size."""
    return tensor.repeat(2, *[1] * (tensor.dim() - 1)) if free and len(tensor) == 1 else tensor


def _take_names(program: ExportedProgram, example: dict[str, Tensor]) -> None:
    """Turn positional inputs into named ones; the graph itself has only names."""
    signature = program.module_call_graph[0].signature
    assert signature is not None
    signature.in_spec = _pytree.tree_structure(((), dict(example)))
    program.example_inputs = ((), dict(example))


SOURCE = Source(load=load, suffixes=(".pt2",))
