"""Lower a network: module -> exported program -> ONNX, one way only.

What is written carries no stack traces, doc strings or local paths, and the same network gives the
same bytes.
"""

import contextlib
import io
import itertools
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tersor.core.errors import ModelError, named_lines
from tersor.core.model import Inputs, may_lower
from tersor.core.runtime import Form
from tersor.ops.capture import capture, place_of
from tersor.ops.direct import make_direct

OPSET = 21
"""The first with 4-bit and block-wise DequantizeLinear."""
_CHATTY = (
    "torch.onnx",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "onnxscript",
    "onnx_ir",
)
_LONGEST = 65536
"""Of a free dimension, where the network does not say less."""


def form_of(net: Any) -> Form:
    """Tell which of the three forms a network has.

    Raises:
        ModelError: none of them.
    """
    if isinstance(net, nn.Module):
        return "module"
    if isinstance(net, ExportedProgram):
        return "exported"
    if type(net).__name__ == "ModelProto":
        return "onnx"
    raise ModelError(
        f"expected an nn.Module, an ExportedProgram or an ONNX model, got {type(net).__name__}"
    )


def lower(net: Any, to: Form, inputs: Inputs) -> Any:
    """Return the network in the form `to`; the same object where it has that form already.

    Args:
        net: nn.Module in eval mode, ExportedProgram or onnx.ModelProto. Not modified.
        to: The form wanted.
        inputs: How to call it; `dynamic` dimensions stay free. Where there are none, those that a
            program or an ONNX model leaves free get the sizes of the example.

    Raises:
        ModelError: the way would be upwards, or the exporter cannot translate the network.
    """
    form = form_of(net)
    if not may_lower(form, to):
        raise ModelError(f"a network of form {form!r} cannot become {to!r} again")
    if form == "onnx":
        return net if inputs.dynamic else _sized(net, inputs)
    if form == to == "module":
        return net
    program = _exported(net, inputs) if form == "module" else net
    if form == "exported" and not inputs.dynamic and _is_free(program):
        program = _export(program.module(check_guards=False), inputs)
    if to == "exported":
        return program
    return _to_onnx(program, own=form == "module")


def _exported(net: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Export, by way of the captured graph where torch.export alone cannot.

    `len(x)` of a batch, for instance, freezes the batch for torch.export and not for `capture`.
    """
    try:
        return _export(net, inputs)
    except ModelError as error:
        try:
            captured = capture(net, inputs)
        except ModelError:
            raise error from None
        return _export(captured, inputs)


def _is_free(program: ExportedProgram) -> bool:
    """Tell whether an input has a free dimension."""
    wanted = set(program.graph_signature.user_inputs)
    return any(
        isinstance(size, torch.SymInt)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in wanted
        for size in getattr(node.meta.get("val"), "shape", ())
    )


def _sized(model: Any, inputs: Inputs) -> Any:
    """Return an ONNX model whose inputs have the sizes of the example; itself where they do."""
    import onnx

    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.example.items()}
    free = any(
        not dim.HasField("dim_value")
        for port in model.graph.input
        if port.name in shapes
        for dim in port.type.tensor_type.shape.dim
    )
    if not free:
        return model
    made = type(model)()
    made.CopyFrom(model)
    # what was inferred for free sizes; every runtime infers it again
    del made.graph.value_info[:]
    for port in made.graph.input:
        dims = port.type.tensor_type.shape.dim
        for dim, size in zip(dims, shapes.get(port.name, ()), strict=False):
            dim.dim_value = size
    for port in made.graph.output:
        for dim in port.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    made = onnx.shape_inference.infer_shapes(made)  # of the outputs
    del made.graph.value_info[:]
    return made


def _export(net: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Export with `inputs.dynamic` free; a dimension of one name is one dimension.

    Where the network itself bounds one (a table of 512 positions), it is free up to there.
    """
    try:
        try:
            program = _traced(net, inputs, {})
        except Exception as error:
            bounds = _bounds(error)
            if not bounds:
                raise
            program = _traced(net, inputs, bounds)
    except GuardOnDataDependentSymNode as error:
        raise ModelError(
            f"forward of {type(net).__name__} decides by the content of a tensor"
            f"{place_of(error)}, which an exported graph cannot: compute it with torch.where, or "
            "with torch.cond where only one side may run; or choose a target that runs modules as "
            "they are, such as torch_eager"
        ) from error
    except Exception as error:
        raise ModelError(
            f"{type(net).__name__} cannot be exported by torch.export: {named_lines(error, 2)}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("source_fn_stack", None)
    return program


def _traced(net: nn.Module, inputs: Inputs, bounds: dict[str, int]) -> ExportedProgram:
    dims: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for name in inputs.example:
        named = {
            axis: dims.setdefault(word, Dim(word, min=1, max=bounds.get(word, _LONGEST)))
            for axis, word in inputs.dynamic.get(name, {}).items()
        }
        shapes[name] = named or None
    example = {name: tensor.contiguous() for name, tensor in inputs.example.items()}
    with _quiet(), plain_attention(), torch.no_grad():
        return torch.export.export(net, (), kwargs=example, dynamic_shapes=shapes)


def _bounds(error: Exception) -> dict[str, int]:
    """Read the largest sizes that torch.export proposes where ours are too large."""
    text = str(error)
    if "Suggested fixes" not in text:
        return {}
    found = re.findall(r"(\w+) = Dim\('\w+'(?:, min=\d+)?, max=(\d+)\)", text)
    return {word: int(largest) for word, largest in found}


def _to_onnx(program: ExportedProgram, *, own: bool) -> Any:
    """Write a program as ONNX; `own`: nobody else needs it."""
    from tersor.ops.onnx_translations import finish, translations

    table = translations()
    called = {n.target for n in program.graph.nodes if n.op == "call_function"}
    if any(str(target).startswith("tersor.sparse_") for target in called):
        raise ModelError(
            "layers whose weights are executed sparse cannot be written as ONNX, which has no such "
            "operator; choose a target of PyTorch, such as torch_export, or leave the layers dense"
        )
    if own and make_direct(program, table):
        # most of the exporter's time would go into tracing it again, to decompose nothing
        vars(program)["run_decompositions"] = lambda _: program
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                custom_translation_table=table,
            )
        assert made is not None
        model = made.model_proto
    except Exception as error:
        raise ModelError(
            f"the network cannot be written as ONNX: {named_lines(error, 2)}"
        ) from error
    _strip(model)
    _keep_names(model.graph, program.graph_signature.user_inputs)
    return finish(model)


def _keep_names(graph: Any, wanted: Iterable[Any]) -> None:
    """Give inputs that the network returns unchanged their own names again.

    The exporter hands the name of such an input to the output and calls the input NAME_orig.
    """
    names = {name for name in wanted if isinstance(name, str)}
    ports = {port.name for port in graph.input}
    lost = [n for n in sorted(names - ports) if f"{n}_orig" in ports]
    if not lost:
        return
    known = {name for node in graph.node for name in (*node.input, *node.output)}
    renamed: dict[str, str] = {}
    for name in lost:
        output = next(
            made
            for made in (f"{name}_output{i or ''}" for i in itertools.count())
            if made not in known
        )
        renamed |= {f"{name}_orig": name, name: output}
    _rename(graph, renamed)


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename tensors in a graph and in those inside its nodes, which see them too."""
    for port in (*graph.input, *graph.output):
        port.name = names.get(port.name, port.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, names)


def _strip(model: Any) -> None:
    """Remove what tells where and when the model was made."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        del graph.metadata_props[:]
        entries = [*graph.node, *getattr(graph, "value_info", [])]
        if graph is model.graph:
            entries += [*graph.input, *graph.output, *graph.initializer]
            # intermediate shapes are inferred again by every runtime
            del graph.value_info[:]
        for entry in entries:
            del entry.metadata_props[:]
            entry.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints its progress, and of a failure all that it has traced."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    # not redirected: the progress of the command line goes to stderr as well
    names = vars(import_module("torch.export._trace"))
    names["print"] = lambda *_, **__: None
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            names.pop("print", None)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Turn off the fused inference path of nn.MultiheadAttention, which no exporter translates."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
