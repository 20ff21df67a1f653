"""Rules that follow channels through operators that only move values.

Each rule takes a step and returns what the dimensions of the result hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from tersor.ops.atoms import Atoms, Dims, Path, Value
from tersor.ops.channel_step import Shape, Step


def reshape(step: Step) -> Dims:
    """`x.reshape(2, -1)`, `x.view((2, 8))`."""
    sizes = step.node.args[1:]
    if "shape" in step.node.kwargs:
        return step.unknown("reshape")
    nested = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
    if step.shape is None or len(sizes[0] if nested else sizes) != len(step.shape):  # type: ignore[arg-type]  # nested: a tuple
        return regroup(step, None)  # one variable holds all sizes
    where: list[Path] = [
        ("args", 1, i) if nested else ("args", 1 + i)
        for i in range(len(sizes[0] if nested else sizes))  # type: ignore[arg-type]  # nested: a tuple
    ]
    return regroup(step, where)


def flatten(step: Step) -> Dims:
    """`x.flatten(1)`: its sizes follow by themselves."""
    return regroup(step, None)


def reshape_as(step: Step) -> Dims:
    """`x.reshape_as(y)`: what y holds is what is asked for."""
    made = regroup(step, None)
    for dim, atoms in (step.dims[1] if len(step.dims) > 1 else {}).items():
        if dim in made:
            step.flow.unite(made[dim], atoms)
        else:
            step.block(atoms, "reshape_as")
    return made


def unflatten(step: Step) -> Dims:
    """`x.unflatten(1, (4, -1))`."""
    (dim,) = step.listed(step.argument(1, "dim"))
    sizes = step.argument(2, "sizes")
    root: Path = ("kwargs", "sizes") if "sizes" in step.node.kwargs else ("args", 2)
    where: list[Path | None] = [None] * len(step.shape or ())
    where[dim : dim + len(sizes)] = [(*root, i) for i in range(len(sizes))]
    return regroup(step, where)


def regroup(step: Step, where: Sequence[Path | None] | None) -> Dims:
    """Move atoms through any change of shape that keeps the order of values.

    Args:
        step: One operand.
        where: For each dimension of the result, where its size is written; None: nowhere.
    """
    before, after = step.shapes[0], step.shape
    what = step.name
    if after is None:
        return step.unknown(what)
    made: Dims = {}
    for old, new in _blocks(before, after):
        inside = [d for d in old if d in step.dims[0]]
        if not inside:
            continue
        if len(inside) > 1:
            return step.unknown(f"{what} joins two dimensions of channels")
        atoms = step.dims[0][inside[0]]
        if len(old) > 1 and len(new) > 1:
            return step.unknown(what)
        if len(old) > 1:
            along = atoms.reshape([-1 if d == inside[0] else 1 for d in old])
            atoms = np.broadcast_to(along, [before[d] for d in old]).reshape(-1)
        if len(new) == 1:
            made[new[0]] = atoms
        elif not new:
            return step.unknown(what)
        else:
            dim, atoms = _split(step, [after[d] for d in new], new, atoms)
            made[dim] = atoms
        _note_sizes(step, where, new, made, after, batch=0 in old and len(old) > 1)
    return made


def _split(step: Step, sizes: list[int], new: list[int], atoms: Atoms) -> tuple[int, Atoms]:
    """Split one dimension of channels; one of the new ones may shrink, the same for all others."""
    name = step.node.name
    step.flow.splits[name] = (len(new), atoms)
    place = len(new) - 1 - step.flow.choices.get(name, 0)
    table = np.moveaxis(atoms.reshape(sizes), place, -1).reshape(-1, sizes[place])
    return new[place], step.flow.unite_rows(table)


def _note_sizes(
    step: Step,
    where: Sequence[Path | None] | None,
    new: list[int],
    made: Dims,
    after: Shape,
    *,
    batch: bool,
) -> None:
    for dim in new:
        path = None if where is None else where[dim]
        if path is None or dim not in made or at(step.node, path) == -1:
            continue
        # what holds the batch, too, can only be left open
        step.number(path, made[dim], (lambda _: -1) if batch else int)


def _blocks(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Pair the smallest runs of dimensions that hold as many values; sizes of one are in none."""
    old = [d for d, size in enumerate(before) if size != 1]
    new = [d for d, size in enumerate(after) if size != 1]
    found = []
    while old or new:
        a, b = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        x, y = (before[a[0]] if a else 1), (after[b[0]] if b else 1)
        while x != y:
            if x < y and old:
                a.append(old.pop(0))
                x *= before[a[-1]]
            elif new:
                b.append(new.pop(0))
                y *= after[b[-1]]
            else:  # only for an empty tensor
                return [(list(range(len(before))), list(range(len(after))))]
        found.append((a, b))
    return found


def at(node: fx.Node, path: Path) -> Any:
    """Return what is written at a place in a call."""
    found: Any = node.args if path[0] == "args" else node.kwargs
    for part in path[1:]:
        found = getattr(found, part) if isinstance(found, slice) else found[part]  # type: ignore[arg-type]  # a name
    return found


def getitem(step: Step) -> Value:
    """`x[:, 1:]`, `x[..., None]`, or an element of a tuple."""
    source, index = step.node.args[:2]
    held = step.values.get(source) if isinstance(source, fx.Node) else None
    if isinstance(held, tuple):
        return held[index] if isinstance(index, int) else step.unknown("indexing")
    items = list(index) if isinstance(index, tuple) else [index]
    if step.shape is None or not step.dims or len(step.sources) > 1:
        return step.unknown("indexing")
    if any(isinstance(i, (Tensor, list, tuple, bool)) for i in items):
        return step.unknown("indexing")
    rank = len(step.shapes[0])
    taken = sum(i is not None and i is not Ellipsis for i in items)
    places: list[int | None] = list(range(len(items)))
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (rank - taken)
        places[place : place + 1] = [None] * (rank - taken)
    made: Dims = {}
    old = new = 0
    for number in range(max(len(items), rank + items.count(None))):
        item = items[number] if number < len(items) else slice(None)
        where = places[number] if number < len(places) else None
        atoms = None if item is None else step.dims[0].get(old)
        if atoms is not None:
            path: Path = ("args", 1) if not isinstance(index, tuple) else ("args", 1, where or 0)
            atoms = _select(step, atoms, item, path)
            if atoms is not None and not isinstance(item, int):
                made[new] = atoms
        old += item is not None
        new += item is None or isinstance(item, slice)
    return made


def _select(step: Step, atoms: Atoms, item: Any, path: Path) -> Atoms | None:
    """Take channels by a slice or a number, noting the numbers that are to change."""
    if item == slice(None):
        return atoms
    if isinstance(item, int):
        place = item % len(atoms)
        step.block(atoms[place : place + 1], "indexing selects one channel")
        _position(step, path, atoms, place, item)
        return None
    simple = isinstance(item, slice) and item.step in (None, 1)
    ends = (item.start, item.stop) if simple else ()
    if not simple or any(isinstance(e, fx.Node) for e in ends):
        step.block(atoms, "indexing selects channels")
        return None
    for word, end in zip(("start", "stop"), ends, strict=True):
        if end is not None:
            place = slice(None, end).indices(len(atoms))[1]
            _position(step, (*path, word), atoms, place, end)
    taken: Atoms = atoms[item]
    return taken


def _position(step: Step, path: Path, atoms: Atoms, place: int, written: int) -> None:
    """Note a place among channels, counted from the end that it is written from."""
    if written < 0:
        step.number(path, atoms[place:], lambda kept: -kept)
    else:
        step.number(path, atoms[:place])


def chunk(step: Step) -> Value:
    """`x.chunk(2, 1)`: parts of equal size, that lose the same channels."""
    count = step.argument(1, "chunks")
    (dim,) = step.listed(step.argument(2, "dim", 0))
    atoms = step.dims[0].get(dim)
    if not isinstance(count, int) or step.shapes[0][dim] % count:
        return step.unknown("chunk")
    if atoms is None:
        return (step.dims[0],) * count
    step.flow.unite_rows(atoms.reshape(count, -1))
    return tuple({**step.dims[0], dim: part} for part in np.split(atoms, count))


def split(step: Step) -> Value:
    """`x.split(8, 1)`, `x.split([8, 24], 1)`."""
    sizes = step.argument(1, "split_size_or_sections", step.node.kwargs.get("split_size"))
    (dim,) = step.listed(step.argument(2, "dim", 0))
    atoms, whole = step.dims[0].get(dim), step.shapes[0][dim]
    keyword = next((k for k in step.node.kwargs if k.startswith("split_size")), None)
    path: Path = ("kwargs", keyword) if keyword else ("args", 1)
    if isinstance(sizes, fx.Node):
        sizes = sizes.meta["value"]
    if isinstance(sizes, (tuple, list)):
        sizes = [s.meta["value"] if isinstance(s, fx.Node) else s for s in sizes]
    if atoms is None:
        count = len(sizes) if isinstance(sizes, (tuple, list)) else -(-whole // sizes)
        return (step.dims[0],) * count
    if isinstance(sizes, (tuple, list)):
        parts = np.split(atoms, np.cumsum(sizes)[:-1])
        for number, part in enumerate(parts):
            step.number((*path, number), part)
        return tuple({**step.dims[0], dim: part} for part in parts)
    if whole % sizes:
        return step.unknown("split in unequal parts")
    first_atoms = step.flow.unite_rows(atoms.reshape(-1, sizes))
    step.number(path, first_atoms)
    return tuple({**step.dims[0], dim: part} for part in np.split(atoms, whole // sizes))


def unbind(step: Step) -> Value:
    """`x.unbind(0)`."""
    (dim,) = step.listed(step.argument(1, "dim", 0))
    if dim in step.dims[0]:
        return step.unknown("unbind of channels")
    left = {d - (d > dim): atoms for d, atoms in step.dims[0].items()}
    return (left,) * step.shapes[0][dim]


def permute(step: Step) -> Dims:
    """`x.permute(0, 2, 3, 1)`."""
    order = step.argument(1, "dims")
    order = order if isinstance(order, (tuple, list)) else step.node.args[1:]
    places = step.listed(order)
    return {new: step.dims[0][old] for new, old in enumerate(places) if old in step.dims[0]}


def transpose(step: Step) -> Dims:
    """`x.transpose(1, 2)`, `x.swapaxes(1, 2)`, `x.t()`, `x.mT`."""
    rank = len(step.shapes[0])
    named = step.name == "getattr"
    pair = (
        [rank - 2, rank - 1]
        if named
        else [step.argument(1, "dim0", rank - 2), step.argument(2, "dim1", rank - 1)]
    )
    a, b = step.listed(pair)
    swap = {a: b, b: a}
    return {swap.get(d, d): atoms for d, atoms in step.dims[0].items()}


def movedim(step: Step) -> Dims:
    """`x.movedim(1, -1)`."""
    rank = len(step.shapes[0])
    source = step.listed(step.argument(1, "source"))
    target = step.listed(step.argument(2, "destination"))
    order: list[int] = [-1] * rank
    for old, new in zip(source, target, strict=True):
        order[new] = old
    rest = iter(d for d in range(rank) if d not in source)
    order = [next(rest) if d < 0 else d for d in order]
    return {new: step.dims[0][old] for new, old in enumerate(order) if old in step.dims[0]}


def unsqueeze(step: Step) -> Dims:
    """`x.unsqueeze(1)`."""
    place = int(step.argument(1, "dim")) % (len(step.shapes[0]) + 1)
    return {d + (d >= place): atoms for d, atoms in step.dims[0].items()}


def squeeze(step: Step) -> Dims:
    """`x.squeeze(1)`."""
    over = step.listed(step.argument(1, "dim"))
    gone = [d for d in over if step.shapes[0][d] == 1]
    return {d - sum(g < d for g in gone): a for d, a in step.dims[0].items()}


def expand(step: Step) -> Dims:
    """`x.expand(-1, 8)`."""
    sizes = step.node.args[1:]
    nested = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
    if step.shape is None:
        return step.unknown("expand")
    shift = len(step.shape) - len(step.shapes[0])
    made = {d + shift: atoms for d, atoms in step.dims[0].items() if step.shapes[0][d] > 1}
    for dim, atoms in made.items():
        path: Path = ("args", 1, dim) if nested else ("args", 1 + dim)
        if at(step.node, path) != -1:
            step.number(path, atoms)
    return made


def repeat(step: Step) -> Dims:
    """`x.repeat(1, 2)`."""
    sizes = step.node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if step.shape is None:
        return step.unknown("repeat")
    shift = len(step.shape) - len(step.shapes[0])
    return {
        d + shift: np.tile(atoms, step.shape[d + shift] // len(atoms))
        for d, atoms in step.dims[0].items()
    }


def repeat_interleave(step: Step) -> Dims:
    """`x.repeat_interleave(4, dim=1)`: each value several times, as keys of grouped queries."""
    times, dim = step.argument(1, "repeats"), step.argument(2, "dim")
    if dim is None or not isinstance(times, int):
        return step.unknown("repeat_interleave")
    (dim,) = step.listed(dim)
    return {d: np.repeat(a, times) if d == dim else a for d, a in step.dims[0].items()}


def cat(step: Step) -> Dims:
    """`torch.cat([x, y], 1)`."""
    tensors = step.argument(0, "tensors")
    if step.shape is None or not isinstance(tensors, (tuple, list)):
        return step.unknown("cat")
    along = int(step.argument(1, "dim", 0)) % len(step.shape)
    made: Dims = {}
    for dim in range(len(step.shape)):
        given = [step.of(n).get(dim) for n in tensors]
        if all(atoms is None for atoms in given):
            continue
        if dim == along:
            parts = [
                step.flow.new(n.meta["shape"][dim]) if atoms is None else atoms
                for n, atoms in zip(tensors, given, strict=True)
            ]
            made[dim] = np.concatenate(parts)
        elif (met := _meet(step, given, "cat")) is not None:
            made[dim] = met
    return made


def stack(step: Step) -> Dims:
    """`torch.stack([x, y], 1)`."""
    tensors = step.argument(0, "tensors")
    if step.shape is None or not isinstance(tensors, (tuple, list)):
        return step.unknown("stack")
    place = int(step.argument(1, "dim", 0)) % len(step.shape)
    made: Dims = {}
    for dim in range(len(step.shape) - 1):
        given = [step.of(n).get(dim) for n in tensors]
        if (met := _meet(step, given, "stack")) is not None:
            made[dim + (dim >= place)] = met
    return made


def _meet(step: Step, given: Sequence[Atoms | None], what: str) -> Atoms | None:
    """Unite what lies side by side."""
    known = [atoms for atoms in given if atoms is not None]
    for atoms in known[1:]:
        step.flow.unite(known[0], atoms)
    if known and len(known) < len(given):
        step.block(known[0], f"{what} with values that are not channels")
        return None
    return known[0] if known else None


def pad(step: Step) -> Dims:
    """`F.pad(x, (0, 0, 1, 1))`; padding with constant channels adds ones that can go again."""
    amounts = step.argument(1, "pad")
    constant = step.argument(2, "mode", "constant") == "constant"
    rank = len(step.shapes[0])
    if not isinstance(amounts, (tuple, list)):
        return step.unknown("pad")
    root: Path = ("kwargs", "pad") if "pad" in step.node.kwargs else ("args", 1)
    made = {}
    for dim, atoms in step.dims[0].items():
        place = 2 * (rank - 1 - dim)
        ends = list(amounts[place : place + 2])
        if not any(isinstance(a, fx.Node) or a != 0 for a in ends):
            made[dim] = atoms
        elif constant and all(isinstance(a, int) and a >= 0 for a in ends):
            left, right = (step.flow.new(a) for a in ends)
            step.number((*root, place), left)
            step.number((*root, place + 1), right)
            made[dim] = np.concatenate([left, atoms, right])
        else:
            step.block(atoms, "pad changes channels")
    return made


def pixel_shuffle(step: Step, factor: int | None = None) -> Dims:
    """`F.pixel_shuffle(x, 2)`: each four channels in a row become one."""
    factor = int(step.argument(1, "upscale_factor") if factor is None else factor)
    channel = len(step.shapes[0]) - 3
    atoms = step.dims[0].get(channel)
    if any(d > channel for d in step.dims[0]):
        return step.unknown("pixel_shuffle")
    if atoms is None:
        return dict(step.dims[0])
    table = atoms.reshape(-1, factor * factor)
    return {**step.dims[0], channel: step.flow.unite_rows(table.T)}


def pixel_unshuffle(step: Step, factor: int | None = None) -> Dims:
    """`F.pixel_unshuffle(x, 2)`: each channel becomes four in a row."""
    factor = int(step.argument(1, "downscale_factor") if factor is None else factor)
    channel = len(step.shapes[0]) - 3
    if any(d > channel for d in step.dims[0]):
        return step.unknown("pixel_unshuffle")
    return {d: np.repeat(a, factor**2) if d == channel else a for d, a in step.dims[0].items()}


def roll(step: Step) -> Dims:
    """`torch.roll(x, ...)`, `flip`, `cumsum`: dimensions that they do not touch pass."""
    keyword, default = ("dims", None) if step.name != "cumsum" else ("dim", None)
    place = 2 if step.name == "roll" else 1
    moved = step.listed(step.argument(place, keyword, default))
    for dim in moved:
        if dim in step.dims[0]:
            step.block(step.dims[0][dim], f"{step.name} moves channels")
    return dict(step.dims[0])


RULES: dict[str, Callable[..., Value]] = {
    **dict.fromkeys(("reshape", "view"), reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t"), transpose),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(("expand", "broadcast_to"), expand),
    **dict.fromkeys(("repeat", "tile"), repeat),
    **dict.fromkeys(("roll", "flip", "cumsum"), roll),
    **dict.fromkeys(("split", "split_with_sizes"), split),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(("reshape_as", "view_as"), reshape_as),
    "flatten": flatten,
    "unflatten": unflatten,
    "getitem": getitem,
    "chunk": chunk,
    "unbind": unbind,
    "permute": permute,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "repeat_interleave": repeat_interleave,
    "stack": stack,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
}
