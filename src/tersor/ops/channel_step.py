"""One call in a captured graph, as the rules that follow channels see it."""

from typing import Any

from torch import fx, nn

from tersor.ops.atoms import Atoms, Dims, Flow, Number, Path, Read, Value, Work

Shape = tuple[int, ...]
_NUMPY = {"dim": "axis", "keepdim": "keepdims"}
"""Other words that torch takes for an argument."""


class Step:
    """A node: its operands, what their dimensions hold, and what is found out about it."""

    flow: Flow
    captured: fx.GraphModule
    net: nn.Module
    node: fx.Node
    values: dict[fx.Node, Value]
    sources: list[fx.Node]
    dims: list[Dims]
    shapes: list[Shape]
    shape: Shape | None

    def __init__(
        self,
        flow: Flow,
        captured: fx.GraphModule,
        net: nn.Module,
        node: fx.Node,
        values: dict[fx.Node, Value],
    ) -> None:
        self.flow, self.captured, self.net, self.node = flow, captured, net, node
        self.values = values
        self.sources = [n for n in node.all_input_nodes if n.meta.get("shape") is not None]
        self.dims = [self.of(n) for n in self.sources]
        self.shapes = [n.meta["shape"] for n in self.sources]
        self.shape = node.meta.get("shape")

    @property
    def name(self) -> str:
        """What is called: the function's or method's own name, without a trailing underscore."""
        # a method's target is its name already
        return str(getattr(self.node.target, "__name__", self.node.target)).rstrip("_")

    def of(self, node: Any) -> Dims:
        """Return what the dimensions of an operand hold."""
        value = self.values.get(node, {}) if isinstance(node, fx.Node) else {}
        return value if isinstance(value, dict) else {}

    def argument(self, place: int, keyword: str, default: Any = None) -> Any:
        """Return an argument, however it was given."""
        for word in (keyword, _NUMPY.get(keyword)):
            if word in self.node.kwargs:
                return self.node.kwargs[word]
        return self.node.args[place] if len(self.node.args) > place else default

    def listed(self, dims: Any) -> list[int]:
        """Turn a `dim` argument into dimensions counted from the front; None means all."""
        rank = len(self.shapes[0])
        if dims is None:
            return list(range(rank))
        return [int(d) % rank for d in (dims if isinstance(dims, (tuple, list)) else [dims])]

    def unknown(self, what: str) -> Dims:
        """Block all channels that come in here."""
        carried = [v for n in self.node.all_input_nodes if (v := self.values.get(n))]
        if carried:
            self.flow.block_all(carried, f"{what} ({self.node.name})")
        return {}

    def block(self, atoms: Atoms, what: str) -> None:
        """Block channels, naming this call."""
        self.flow.block(atoms, f"{what} ({self.node.name})")

    def read(self, operand: fx.Node, dim: int, atoms: Atoms) -> None:
        """Note that this call sums over the channels in a dimension of an operand."""
        self.flow.reads.append(
            Read(node=self.node.name, operand=operand.name, dim=dim, atoms=atoms)
        )

    def number(self, path: Path, atoms: Atoms, value: Any = int) -> None:
        """Note that the number at `path` depends on how many of `atoms` are kept."""
        self.flow.numbers.append(Number(node=self.node.name, path=path, atoms=atoms, value=value))

    def work(self, constant: float, *factors: Atoms | int) -> None:
        """Note the multiply-accumulates of the example: the constant times all factors."""
        constant /= self.flow.batch
        for each in factors:
            constant *= each if isinstance(each, int) else 1
        atoms = tuple(each for each in factors if not isinstance(each, int))
        self.flow.work.append(Work(constant=constant, factors=atoms))
