"""Capture a network as a graph of calls that can still be trained.

`torch.fx.symbolic_trace` loses networks that unpack shapes or test them. Here every proxy also
carries the value of one example run, so shapes can be unpacked and tested, while they stay symbolic
in the graph; only a test on the *content* of a tensor is refused, with its place in the source.
"""

import operator
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import ModelError
from tersor.core.model import Inputs
from tersor.ops.notes import carry_notes


def capture(net: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return the network as a graph over its own submodules (shared, not copied).

    Layers of `torch.nn` (and of tersor) stay calls of modules under their dotted names; everything
    else becomes calls of functions. `meta["shape"]` and `meta["dtype"]` of each node are those of
    the example batch. A graph that was captured before is
    returned as it is, with these notes refreshed.

    Args:
        net: The network, in eval mode.
        inputs: How to call it.

    Raises:
        ModelError: forward fails, or decides by the content of a tensor; says where.
    """
    if isinstance(net, fx.GraphModule):
        annotate(net, inputs)
        return net
    tracer = _Tracer(inputs.example)
    try:
        with torch.no_grad(), _symbolic_len(net), _nothing_wrapped():
            graph = tracer.trace(net)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"forward of {type(net).__name__} cannot be captured{place_of(error)}: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    captured = fx.GraphModule(tracer.root, graph, type(net).__name__)
    drop_dead(captured)
    captured.recompile()
    captured.train(net.training)
    carry_notes(net, captured)
    _check_batch(net, captured, inputs)
    return captured


def _check_batch(net: nn.Module, captured: fx.GraphModule, inputs: Inputs) -> None:
    """Refuse a graph that only works for the batch size it was captured with."""
    if net.training or not any(0 in dims for dims in inputs.dynamic.values()):
        return
    one = {k: v[:1] if 0 in inputs.dynamic.get(k, {}) else v for k, v in inputs.example.items()}
    try:
        with torch.no_grad():
            captured(**one)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"forward of {type(net).__name__} turns the batch size into a Python number, so "
            "its graph would be frozen to one batch size; use x.shape[0] or x.size(0) as it is "
            f"({error})"
        ) from error


@contextmanager
def _symbolic_len(net: nn.Module) -> Iterator[None]:
    """Let `len(x)` stay symbolic in the files that the network's own classes come from."""

    def symbolic(x: Any) -> Any:
        if isinstance(x, _Proxy) and isinstance(x.value, Tensor):
            return x.size(0)
        return len(x)

    places = {type(m).__module__ for m in net.modules()}
    opened = [
        sys.modules[p].__dict__ for p in places if not p.startswith("torch.") and p in sys.modules
    ]
    opened = [names for names in opened if "len" not in names]
    for names in opened:
        names["len"] = symbolic
    try:
        yield
    finally:
        for names in opened:
            del names["len"]


@contextmanager
def _nothing_wrapped() -> Iterator[None]:
    """Look into functions that other libraries keep fx from tracing; here they can be."""
    wrapped = torch.fx._symbolic_trace._wrapped_fns_to_patch
    held = dict(wrapped)
    wrapped.clear()
    try:
        yield
    finally:
        wrapped.update(held)


def drop_dead(captured: fx.GraphModule) -> None:
    """Remove calls whose result nobody uses, but for those that change a tensor in place."""

    def acts(node: fx.Node) -> bool:
        name = str(getattr(node.target, "__name__", node.target))
        layer = captured.get_submodule(name) if node.op == "call_module" else None
        in_place = bool(node.kwargs.get("inplace")) or getattr(layer, "inplace", False)
        in_place |= node.op in ("call_function", "call_method") and (
            name in ("setitem", *_IN_PLACE) or (name.endswith("_") and not name.endswith("__"))
        )
        return in_place or node.is_impure()

    captured.graph.eliminate_dead_code(acts)


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow")


def annotate(captured: fx.GraphModule, inputs: Inputs) -> None:
    """Write shape and dtype of the example run into each node's `meta`."""
    _Annotate(captured).run_example(inputs.example)


class _Annotate(fx.Interpreter):
    def run_example(self, example: Mapping[str, Tensor]) -> None:
        assert isinstance(self.module, fx.GraphModule)
        order = [str(n.target) for n in self.module.graph.nodes if n.op == "placeholder"]
        with torch.no_grad():
            self.run(*(example.get(name) for name in order))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        _note(n, value)
        return value


def _note(node: fx.Node, value: Any) -> None:
    if isinstance(value, Tensor):
        node.meta["shape"] = tuple(value.shape)
        node.meta["dtype"] = value.dtype
    else:
        node.meta.pop("shape", None)
    if isinstance(value, (int, float)):
        node.meta["value"] = value


class _Proxy(fx.Proxy):
    """A proxy that knows the value of the example run."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        if name == "value":
            raise AttributeError(name)
        return _Attribute(self, name)

    def __bool__(self) -> bool:
        return bool(_concrete(self, "a condition"))

    def __iter__(self) -> Iterator[Any]:
        me: Any = self
        return iter([me[i] for i in range(len(self.value))])

    def __len__(self) -> int:
        return len(self.value)

    def __index__(self) -> int:
        return operator.index(_concrete(self, "a Python number"))

    def __int__(self) -> int:
        return int(_concrete(self, "a Python number"))

    def __float__(self) -> float:
        return float(_concrete(self, "a Python number"))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __contains__(self, item: Any) -> bool:
        return item in _concrete(self, "a membership test")

    def __hash__(self) -> int:
        return id(self)


class _Attribute(_Proxy):
    """`proxy.name`: a method to be called, or a value such as a shape."""

    def __init__(self, root: _Proxy, name: str) -> None:
        self.root = root
        self.attr = name
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "value":
            return getattr(self.root.value, self.attr)
        if isinstance(self.value, torch.device):
            return getattr(self.value, name)
        return _Attribute(self, name)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]  # made when first needed
        if self._node is None:
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            self._node = made.node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def _concrete(proxy: _Proxy, what: str) -> Any:
    value = proxy.value
    if isinstance(value, Tensor) or _holds_content(proxy.node):
        frames = [
            f
            for f in traceback.extract_stack()
            if not f.filename.startswith((torch.__path__[0], __file__))
        ]
        at = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
        raise ModelError(
            f"the content of a tensor is used as {what}{at}; such a network cannot be captured. "
            "Move that decision out of forward, or compute it with tensor operators (torch.where)"
        )
    return value


def _holds_content(node: fx.Node) -> bool:
    """Tell whether a number was read out of a tensor that comes from the inputs."""
    if node.op == "call_method" and node.target in _READS:
        return _comes_from_inputs(node)
    return "shape" not in node.meta and any(map(_holds_content, node.all_input_nodes))


def _comes_from_inputs(node: fx.Node) -> bool:
    seen, todo = {node}, [node]
    while todo:
        above = set(todo.pop().all_input_nodes) - seen
        seen |= above
        todo += above
    return any(each.op == "placeholder" for each in seen)


_READS = ("item", "tolist", "numpy")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, example: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.example = example
        self.running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        from_library = m.__module__.startswith(("torch.nn", "torch.ao.nn", "tersor.ops."))
        return from_library and not isinstance(m, _OPEN)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.running:  # tracing patches nn.Module.__call__ for the example run, too
            return forward(*args, **kwargs)
        try:
            self.path_of_module(m)
        except NameError:  # made inside forward: it has no place in the network
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, range):
            return range(*(int(x) for x in (a.start, a.stop, a.step)))
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        if kind == "placeholder" and args and str(target) not in self.example:
            return args[0]  # not given: forward sees its default
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        self.running = True
        try:
            proxy.value = self._run(kind, target, args, kwargs)
        finally:
            self.running = False
        _note(proxy.node, proxy.value)
        return proxy

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            name = str(target).lstrip("*")
            if name in self.example:
                return self.example[name]
            return args[0] if args else None
        if kind == "output":
            return None
        args, kwargs = _values(args), _values(kwargs)
        if kind == "get_attr":
            found: Any = self.root
            for part in str(target).split("."):
                found = getattr(found, part)
            return found
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


_OPEN = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


def _values(tree: Any) -> Any:
    """Replace proxies by the values of the example run."""
    if isinstance(tree, _Proxy):
        return tree.value
    if isinstance(tree, (tuple, list)):
        made = [_values(item) for item in tree]
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    if isinstance(tree, dict):
        return {key: _values(item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(_values(tree.start), _values(tree.stop), _values(tree.step))
    return tree


def place_of(error: BaseException) -> str:
    """Name the last line outside torch and tersor that an error came through: " at FILE:LINE"."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((torch.__path__[0], str(Path(__file__).parent)))
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
