"""What ONNX Runtime's profiler costs: it adds microseconds to the time of every operator.

Between the two looks at the clock it writes down the shapes of what goes in and out. Chains of
small operators tell how much that is: the time of one under the profiler, less what a longer chain
takes more without. It grows with the number of inputs, along a line.
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.loops import closed
from tersor.core.timing import middle_mean

_SHAPE = (1, 4, 2, 2)
_INPUTS = (2, 3, 4, 6)
"""Of the operators that are tried; times are whole microseconds, which several average out."""
_SHORT, _LONG = 50, 250
_TURNS = 4
_PROFILED = 20
_TURN_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the profiler adds to the time of an operator, in milliseconds."""

    fixed: float
    each_input: float

    def of(self, event: Mapping[str, Any]) -> float:
        """Return what it added to one that a profile tells of."""
        inputs = len(event["args"].get("input_type_shape", ()))
        return max(0.0, self.fixed + self.each_input * inputs)


NOTHING = Cost(fixed=0.0, each_input=0.0)


def kernel_events(file: Path) -> list[dict[str, Any]]:
    """Return the executions of operators that a profile tells of; `dur` is in microseconds."""
    events = json.loads(file.read_text(encoding="utf-8"))
    return [
        event
        for event in events
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time")
    ]


def measure_cost(session: Callable[[Path, Path | None], Any]) -> Cost:
    """Measure what the profiler costs.

    Args:
        session: Loads a file, with the profiler on if it is told where to write.
    """
    costs = [_cost_ms(inputs, session) for inputs in _INPUTS]
    each_input, fixed = np.polyfit(_INPUTS, costs, 1)
    return Cost(fixed=float(fixed), each_input=float(each_input))


def _cost_ms(inputs: int, session: Callable[[Path, Path | None], Any]) -> float:
    """Measure it for operators of so many inputs."""
    batch = {"x": np.zeros(_SHAPE, np.float32)}
    with tempfile.TemporaryDirectory(prefix="tersor-") as name:
        folder = Path(name)
        files = [_chain(length, inputs, folder) for length in (_SHORT, _LONG)]
        calls = [partial(session(file, None).run, None, batch) for file in files]
        turns = [
            [float(np.median(closed([c], seconds=_TURN_S, fewest=5).service_ms)) for c in calls]
            for _ in range(_TURNS)
        ]
        short, long = np.min(turns, axis=0)
        profiled = session(files[-1], folder / "profile")
        for _ in range(_PROFILED):
            profiled.run(None, batch)
        events = kernel_events(Path(profiled.end_profiling()))
    under = middle_mean([event["dur"] / 1e3 for event in events])
    return under - float(long - short) / (_LONG - _SHORT)


def _chain(length: int, inputs: int, folder: Path) -> Path:
    """Write a network of so many sums, one after the other."""
    from onnx import TensorProto, helper, save

    names = ["x", *(f"y{number}" for number in range(length))]
    ones = ["one"] * (inputs - 1)
    nodes = [
        helper.make_node("Sum", [before, *ones], [after], name=after)
        for before, after in itertools.pairwise(names)
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, _SHAPE) for n in ("x", names[-1])]
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [one])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file = folder / f"chain-{length}.onnx"
    save(made, file)
    return file
