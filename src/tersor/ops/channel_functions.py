"""Rules that follow channels through operators that compute.

Each rule takes a step and returns what the dimensions of the result hold.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import fx

from tersor.ops.atoms import Atoms, Dims, Value
from tersor.ops.channel_step import Shape, Step


def elementwise(step: Step) -> Dims:
    """Unite what meets at the same index; dimensions are aligned at the end."""
    if step.shape is None:
        return step.unknown(step.name)
    return _aligned(step, list(zip(step.dims, step.shapes, strict=True)), range(len(step.shape)))


def _aligned(step: Step, operands: Sequence[tuple[Dims, Shape]], dims: range) -> Dims:
    """Unite what operands hold in some dimensions of the result, aligned at the end."""
    assert step.shape is not None
    made: Dims = {}
    for dim in dims:
        met = []
        fixed = False
        for held, shape in operands:
            own = dim - (len(step.shape) - len(shape))
            if own < 0 or shape[own] == 1:
                continue
            if own in held:
                met.append(held[own])
            else:
                fixed = True
        for atoms in met[1:]:
            step.flow.unite(met[0], atoms)
        if met and fixed:
            step.block(met[0], f"{step.name} with values that are not channels")
        elif met:
            made[dim] = met[0]
    return made


def spatial(step: Step, kind: str = "") -> Dims:
    """Pooling and resizing: batch and channels pass, nothing else may carry atoms."""
    name = kind or step.name
    digit = next((int(c) for c in name if c.isdigit()), len(step.shapes[0]) - 2)
    kept = len(step.shapes[0]) - digit
    if step.shape is None or any(dim >= kept for dim in step.dims[0]):
        return step.unknown(name)
    return dict(step.dims[0])


def mixing(step: Step, name: str, over: Sequence[int]) -> Dims:
    """Operators that need all values along some dimensions."""
    for dim, atoms in step.dims[0].items():
        if dim in over:
            step.block(atoms, f"{name} mixes channels")
    step.flow.block_all(step.dims[1:], f"{name} ({step.node.name})")
    return dict(step.dims[0])


def softmax(step: Step) -> Dims:
    """Softmax over a dimension."""
    return mixing(step, step.name, step.listed(step.argument(1, "dim", -1)))


def layer_norm(step: Step) -> Dims:
    """`F.layer_norm`: over the last dimensions."""
    shape = step.argument(1, "normalized_shape")
    count = len(shape) if isinstance(shape, (tuple, list)) else 1
    rank = len(step.shapes[0])
    return mixing(step, step.name, range(rank - count, rank))


def normalize(step: Step) -> Dims:
    """`F.normalize`: a Euclidean norm is that of the channels that are there."""
    over = step.listed(step.argument(2, "dim", 1))
    if step.argument(1, "p", 2.0) != 2:
        return mixing(step, step.name, over)
    for dim in over:
        if dim in step.dims[0]:
            step.read(step.sources[0], dim, step.dims[0][dim])
    return dict(step.dims[0])


def norm(step: Step) -> Dims:
    """`x.norm(dim=1)`: the Euclidean one is that of the channels that are there."""
    order = step.argument(1, "ord" if "ord" in step.node.kwargs else "p", 2)
    over = step.listed(step.argument(2, "dim"))
    held = [dim for dim in over if dim in step.dims[0]]
    if step.shape is None or (held and order not in (2, "fro", None)):
        return step.unknown("norm over channels")
    for dim in held:
        step.read(step.sources[0], dim, step.dims[0][dim])
    kept = {d: a for d, a in step.dims[0].items() if d not in over}
    if len(step.shape) == len(step.shapes[0]):
        return kept
    return {d - sum(o < d for o in over): a for d, a in kept.items()}


def reduce(step: Step) -> Dims:
    """Sums count channels as they are; a mean goes on to divide by all; maxima would change."""
    over = step.listed(step.argument(1, "dim"))
    held = [dim for dim in over if dim in step.dims[0]]
    mean = step.name == "mean" and len(held) == 1 and _keeps_zeros(step.sources[0])
    if step.shape is None or (held and step.name != "sum" and not mean):
        return step.unknown(f"{step.name} over channels")
    if held and mean:
        step.flow.means.append((step.node.name, step.dims[0][held[0]]))
    for dim in held:
        step.read(step.sources[0], dim, step.dims[0][dim])
    kept = {d: a for d, a in step.dims[0].items() if d not in over}
    if bool(step.argument(2, "keepdim", False)):
        return kept
    return {d - sum(o < d for o in over): a for d, a in kept.items()}


def _keeps_zeros(node: fx.Node) -> bool:
    """Tell whether a mean is of squares or norms: of channels that are zero it is zero."""
    name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
    if name in ("norm", "vector_norm", "linalg_vector_norm"):
        return True
    base = node.args[0] if node.args else None
    squares = name == "square" or (name == "pow" and node.args[1:] == (2,))
    squares |= name == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]
    if not squares or not isinstance(base, fx.Node):
        return False
    shifted = str(getattr(base.target, "__name__", base.target)).rstrip("_")
    return shifted not in ("sub", "isub", "rsub", "subtract", "add", "iadd")


def linear(step: Step) -> Dims:
    """`F.linear(x, weight, bias)`."""
    given = [step.argument(i, word) for i, word in enumerate(("input", "weight", "bias"))]
    x, weight, bias = (step.of(node) for node in given)
    last = len(given[0].meta["shape"]) - 1
    outputs, inputs = given[1].meta["shape"]
    _contract(step, given[0], x.get(last), given[1], weight.get(1), last)
    rows = weight.get(0)
    if rows is not None and 0 in bias:
        step.flow.unite(rows, bias[0])
    elif rows is not None and isinstance(given[2], fx.Node):
        step.block(rows, "linear with a bias that is not channels")
    places = math.prod(given[0].meta["shape"][:-1])
    step.work(places, outputs if rows is None else rows, weight.get(1, inputs))
    made = {d: a for d, a in x.items() if d != last}
    return made if rows is None else {**made, last: rows}


def _contract(
    step: Step,
    left: fx.Node,
    a: Atoms | None,
    right: fx.Node,
    b: Atoms | None,
    dim: int,
) -> None:
    """Sum over a dimension that both operands have; `dim` is that of the left one."""
    if a is not None and b is not None:
        step.flow.unite(a, b)
        step.read(left, dim, a)
    elif a is not None or b is not None:
        step.flow.block_all(
            [{0: a} if a is not None else {}, {0: b} if b is not None else {}],
            f"{step.name} with values that are not channels ({step.node.name})",
        )


def matmul(step: Step) -> Dims:
    """`a @ b`, with batch dimensions."""
    left, right = step.argument(0, "input"), step.argument(1, "other")
    if not all(isinstance(n, fx.Node) and "shape" in n.meta for n in (left, right)):
        return step.unknown("matmul")
    x, y = left.meta["shape"], right.meta["shape"]
    if step.shape is None or min(len(x), len(y)) < 2:
        return step.unknown("matmul")
    a, b = step.of(left), step.of(right)
    _contract(step, left, a.get(len(x) - 1), right, b.get(len(y) - 2), len(x) - 1)
    rank = len(step.shape)
    made = _batch(step, [(left, a), (right, b)], rank)
    if rank > 3 and rank - 3 in made:
        step.flow.heads.append(made[rank - 3])
    if len(x) - 2 in a:
        made[rank - 2] = a[len(x) - 2]
    if len(y) - 1 in b:
        made[rank - 1] = b[len(y) - 1]
    depth = a.get(len(x) - 1)
    factors = [made.get(d, step.shape[d]) for d in range(rank)]
    step.work(1, *factors, x[-1] if depth is None else depth)
    return made


def _batch(step: Step, operands: Sequence[tuple[fx.Node, Dims]], rank: int) -> Dims:
    """Unite the dimensions before the last two."""
    return _aligned(step, [(dims, node.meta["shape"]) for node, dims in operands], range(rank - 2))


def attention(step: Step) -> Dims:
    """`F.scaled_dot_product_attention(q, k, v)`, also with grouped queries."""
    words = ("query", "key", "value", "attn_mask")
    q, k, v, mask = (step.argument(i, word) for i, word in enumerate(words))
    if step.shape is None or not all(isinstance(n, fx.Node) for n in (q, k, v)):
        return step.unknown("attention")
    rank = len(step.shape)
    a, b, c = step.of(q), step.of(k), step.of(v)
    for dims in (a, b, c):
        if rank - 2 in dims:
            step.block(dims[rank - 2], "attention over channels as tokens")
    _contract(step, q, a.get(rank - 1), k, b.get(rank - 1), rank - 1)
    if rank - 1 in a and step.node.kwargs.get("scale") is None:
        scale = 1 / math.sqrt(q.meta["shape"][-1])
        step.number(("kwargs", "scale"), a[rank - 1], lambda _: scale)
    repeats = q.meta["shape"][-3] // k.meta["shape"][-3] if rank > 2 else 1
    if repeats > 1:  # each key serves several queries
        b, c = (
            {d: np.repeat(x, repeats) if d == rank - 3 else x for d, x in dims.items()}
            for dims in (b, c)
        )
    met: list[tuple[fx.Node, Dims]] = [(q, a), (q, b), (q, c)]
    if isinstance(mask, fx.Node):
        met.append((mask, step.of(mask)))
    made = _batch(step, met, rank)
    if rank - 1 in c:
        made[rank - 1] = c[rank - 1]
    if rank - 3 in made:
        step.flow.heads.append(made[rank - 3])
    keys, tokens = k.meta["shape"][-2], step.shape[-2]
    heads = [made.get(d, step.shape[d]) for d in range(rank - 2)]
    depth_k, depth_v = a.get(rank - 1), c.get(rank - 1)
    step.work(tokens * keys, *heads, q.meta["shape"][-1] if depth_k is None else depth_k)
    step.work(tokens * keys, *heads, v.meta["shape"][-1] if depth_v is None else depth_v)
    return made


def gated(step: Step, dim: int | None = None) -> Dims:
    """`F.glu(x, 1)`: one half gates the other; both lose the same channels."""
    (along,) = step.listed(step.argument(1, "dim", -1) if dim is None else dim)
    atoms = step.dims[0].get(along)
    if atoms is None:
        return dict(step.dims[0])
    return {**step.dims[0], along: step.flow.unite_rows(atoms.reshape(2, -1))}


def einsum(step: Step) -> Dims:
    """`torch.einsum("bhqd,bhkd->bhqk", q, k)`."""
    equation, *operands = step.node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    text = str(equation).replace(" ", "")
    if "->" not in text or "." in text or not all(isinstance(n, fx.Node) for n in operands):
        return step.unknown("einsum")
    before, after = text.split("->")
    found: dict[str, Atoms] = {}
    sizes: dict[str, Atoms | int] = {}
    for letters, node in zip(before.split(","), operands, strict=True):
        dims = step.of(node)
        if len(set(letters)) < len(letters) or not isinstance(node, fx.Node):
            return step.unknown("einsum")
        for dim, letter in enumerate(letters):
            sizes.setdefault(letter, node.meta["shape"][dim])
            if dim in dims:
                step.flow.unite(found.setdefault(letter, dims[dim]), dims[dim])
                sizes[letter] = found[letter]
                if letter not in after:
                    step.read(node, dim, dims[dim])
    for letters, node in zip(before.split(","), operands, strict=True):
        for dim, letter in enumerate(letters):
            if letter in found and dim not in step.of(node):
                step.block(found[letter], "einsum with values that are not channels")
    step.work(1, *sizes.values())
    return {dim: found[letter] for dim, letter in enumerate(after) if letter in found}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ELEMENTWISE = _words("""
    relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign sigmoid logsigmoid tanh
    hardswish hardsigmoid hardtanh hardshrink prelu
    dropout dropout1d dropout2d dropout3d alpha_dropout clamp clamp_min clamp_max abs neg exp log
    sqrt rsqrt square reciprocal pow contiguous clone detach float half bfloat16 double to type_as
    type expand_as
    add iadd sub isub rsub mul imul div truediv itruediv true_divide multiply subtract divide
    maximum minimum where masked_fill lerp addcmul erf sin cos nan_to_num requires_grad_
    eq ne lt le gt ge logical_and logical_or logical_not and or bool int long stochastic_depth
    drop_path zeros_like positive
""")
_SPATIAL = _words("""
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_max_pool2d boolean_dispatch interpolate upsample lp_pool2d
""")

RULES: dict[str, Callable[..., Value]] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "std", "var"), reduce),
    **dict.fromkeys(("matmul", "bmm"), matmul),
    **dict.fromkeys(("norm", "vector_norm", "linalg_norm", "linalg_vector_norm"), norm),
    "layer_norm": layer_norm,
    "normalize": normalize,
    "linear": linear,
    "scaled_dot_product_attention": attention,
    "einsum": einsum,
    "glu": gated,
}
