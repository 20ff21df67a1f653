"""Simplify the graph: constants folded, dead and idle operators out, by onnxslim."""

import contextlib
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from tersor.core import plugins
from tersor.core.context import Context
from tersor.core.errors import StepError, UnfitError
from tersor.core.technique import technique

_SAME = 1e-4
"""Largest relative root-mean-square difference that sums in another order explain."""


@dataclass(frozen=True, kw_only=True)
class SimplifyGraph:
    """Settings of simplifying."""

    rounds: int = 2
    """How often the passes are repeated, 1 to 10; they stop when nothing changes."""

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= 10:
            raise ValueError(f"rounds must be 1 to 10, got {self.rounds}")


@technique()
def simplify_graph(net: ModelProto, config: SimplifyGraph, context: Context) -> ModelProto:
    """Let onnxslim rewrite the graph, and keep it where it is right and not larger.

    Outputs on the example batch, computed by ONNX Runtime without optimizations, stay the same.

    Raises:
        DependencyError: onnxslim is missing. UnfitError: no operator goes, or the file would grow.
        StepError: the outputs would change.
    """
    plugins.require("techniques", "simplify_graph", ("onnxslim", "onnxruntime"))
    import onnxslim

    feeds = {name: t.detach().cpu().numpy() for name, t in context.inputs.example.items()}
    wanted = _outputs(net, feeds)
    logging.getLogger("onnxslim").setLevel(logging.ERROR)
    copied = ModelProto()
    copied.CopyFrom(net)
    for _ in range(config.rounds):
        before = len(copied.graph.node)
        with contextlib.redirect_stdout(io.StringIO()):
            copied = onnxslim.slim(copied)
        if len(copied.graph.node) == before:
            break
    del copied.graph.value_info[:]
    copied.producer_name, copied.producer_version = net.producer_name, net.producer_version
    operators = (len(net.graph.node), len(copied.graph.node))
    size = (net.ByteSize(), copied.ByteSize())
    context.record(operators=list(operators), size_bytes=list(size))
    if operators[1] >= operators[0]:
        raise UnfitError(f"simplify_graph: onnxslim takes none of the {operators[0]} operators out")
    if size[1] > size[0]:
        raise UnfitError(
            f"simplify_graph: the file would grow from {size[0]:,} to {size[1]:,} bytes: "
            "what was computed from constants is stored"
        )
    _check(wanted, _outputs(copied, feeds))
    return copied


def _outputs(model: ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    made: list[Any] = session.run(None, {n: x for n, x in feeds.items() if n in names})
    return made


def _check(wanted: list[np.ndarray], found: list[np.ndarray]) -> None:
    for i, (old, new) in enumerate(zip(wanted, found, strict=True)):
        scale = float(np.sqrt(np.mean(np.square(old, dtype=np.float64)))) or 1.0
        moved = float(np.sqrt(np.mean(np.square(new.astype(np.float64) - old)))) / scale
        if old.shape != new.shape or not moved <= _SAME:
            raise StepError(
                f"simplify_graph: output {i} would change by {moved:.2g} of its size; nothing is "
                "changed"
            )
