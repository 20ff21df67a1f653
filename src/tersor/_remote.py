"""The program of a child process: one runtime or source, asked over a pipe.

`core/remote.py` starts it. It needs numpy, PyYAML and the packages of its plugin, nothing else.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core import loops, plugins
from tersor.core.errors import TersorError
from tersor.core.model import Inputs, Source
from tersor.core.runtime import Arrays, Form, Runner, Runtime, Target
from tersor.core.schema import to_plain
from tersor.core.wire import Message, receive, send

_WATCH_S = 0.5
"""How often a look is taken at whether the process that asks is still there."""


def main(words: Sequence[str]) -> None:
    """Run `memory FOLDER`, `saved_model FOLDER`, or answer until the other side closes the pipe.

    `serve RUNTIME [BYTES]` runs networks; `convert SOURCE [BYTES]` writes them as ONNX.
    """
    if words[0] == "memory":
        from tersor.metrics import _child

        _child.main(Path(words[1]))
        return
    if words[0] == "saved_model":
        from tersor.deployments import _savedmodel

        _savedmodel.main(Path(words[1]))
        return
    _end_with_parent()
    if len(words) > 2:
        _limit(int(words[2]))
    # libraries print what they like; the pipe is for answers
    with os.fdopen(os.dup(0), "rb") as stdin, os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        served: _Served | _Converting
        if words[0] == "convert":
            served = _Converting(plugins.source(words[1]))
        else:
            served = _Served(words[1], plugins.own_runtime(words[1]))
        while (asked := receive(stdin)) is not None:
            try:
                answer = served.answer(asked)
            except Exception as error:
                answer = Message(fields=_said(words[1], error))
            try:
                send(stdout, answer)
            except TersorError as error:
                send(stdout, Message(fields=_said(words[1], error)))


def _end_with_parent() -> None:
    """Be killed when the process that asks is gone, even in the middle of a run.

    Linux could do that by itself (PR_SET_PDEATHSIG), but takes the thread that started this process
    for its parent.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, daemon=True).start()


def _limit(most: int) -> None:
    """Let the process allocate so many bytes; what does not fit is an error in it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _said(name: str, error: Exception) -> dict[str, str]:
    if isinstance(error, TersorError):
        return {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, ModuleNotFoundError):
        return {"error": "DependencyError", "message": f"{name}: {error}"}
    if isinstance(error, MemoryError):
        return {"error": "TargetError", "message": f"{name} needs more memory than is free"}
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{name}: {type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
    return {"error": "TargetError", "message": text}


class _Converting:
    """A source that writes networks as ONNX."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def answer(self, asked: Message) -> Message:
        """Write one."""
        assert self.source.convert is not None
        self.source.convert(Path(asked.fields["place"]), Path(asked.fields["file"]))
        return Message(fields={})


class _Served:
    """What the process holds: a loaded network and its bound calls."""

    def __init__(self, name: str, runtime: Runtime) -> None:
        self.name, self.runtime = name, runtime
        self.runner: Runner | None = None
        self.calls: dict[int, Callable[[], Arrays]] = {}
        self.bound = 0

    def answer(self, asked: Message) -> Message:
        """Do what is asked."""
        for number in asked.fields["drop"]:
            self.calls.pop(number, None)
        do: Mapping[str, Callable[[Message], Message]] = {
            "export": self.export,
            "load": self.load,
            "bind": self.bind,
            "run": self.run,
            "time": self.time,
            "closed": self.closed,
            "opened": self.opened,
            "profile": self.profile,
            "fused": self.fused,
            "inputs": self.inputs,
        }
        return do[asked.fields["do"]](asked)

    def export(self, asked: Message) -> Message:
        """Read a network that was handed over, and write the runtime's files."""
        fields = asked.fields
        folder = Path(fields["folder"])
        dynamic = {n: {int(a): w for a, w in d.items()} for n, d in fields["dynamic"].items()}
        inputs = Inputs(example=_tensors(asked.arrays), dynamic=dynamic)
        net = _network(fields["form"], Path(fields["file"]), inputs)
        files = self.runtime.write(net, folder, inputs, _target(asked))
        return Message(fields={"files": [str(f.relative_to(folder)) for f in files]})

    def load(self, asked: Message) -> Message:
        """Load a network."""
        self.runner = self.runtime.open(Path(asked.fields["file"]), _target(asked))
        return Message(fields={})

    def bind(self, asked: Message) -> Message:
        """Bind arrays to the loaded network; answer with the number of the call."""
        assert self.runner is not None
        self.bound += 1
        self.calls[self.bound] = self.runner.bind(asked.arrays)
        return Message(fields={"call": self.bound})

    def run(self, asked: Message) -> Message:
        """Run a bound call; answer with its outputs."""
        made = self.calls[asked.fields["call"]]()
        return Message(fields={}, arrays={name: np.asarray(array) for name, array in made.items()})

    def time(self, asked: Message) -> Message:
        """Run a bound call; answer with its nanoseconds only, of the clock and of the processor."""
        call = self.calls[asked.fields["call"]]
        cpu = time.process_time_ns()
        began = time.perf_counter_ns()
        made = call()
        spent = time.perf_counter_ns() - began
        cpu = time.process_time_ns() - cpu
        del made
        return Message(fields={"ns": spent, "cpu_ns": cpu})

    def closed(self, asked: Message) -> Message:
        """Run bound calls one after the other; answer with when each began and ended."""
        fields = asked.fields
        made = loops.closed(
            [self.calls[number] for number in fields["calls"]],
            seconds=fields["for_s"],
            fewest=fields["fewest"],
            start_ns=fields["start_ns"],
        )
        return Message(fields={}, arrays=vars(made))

    def opened(self, asked: Message) -> Message:
        """Run bound calls as requests arrive; answer with when each began and ended."""
        calls = [self.calls[number] for number in asked.fields["calls"]]
        return Message(fields={}, arrays=vars(loops.opened(calls, asked.arrays["arrivals_s"])))

    def profile(self, asked: Message) -> Message:
        """Run batches under the runtime's own profiler."""
        assert self.runtime.profile is not None
        batches: dict[str, dict[str, np.ndarray]] = {}
        for key, array in asked.arrays.items():
            number, _, name = key.partition(" ")
            batches.setdefault(number, {})[name] = array
        file = Path(asked.fields["file"])
        found = self.runtime.profile(file, _target(asked), list(batches.values()))
        return Message(fields={"operators": to_plain(list(found))})

    def fused(self, asked: Message) -> Message:
        """Tell what the network is executed as."""
        assert self.runtime.fused is not None
        found = self.runtime.fused(Path(asked.fields["file"]), _target(asked))
        return Message(fields={"operators": to_plain(list(found))})

    def inputs(self, asked: Message) -> Message:
        """Tell what the network takes."""
        assert self.runtime.inputs is not None
        found = self.runtime.inputs(Path(asked.fields["file"]))
        return Message(fields={"inputs": {n: to_plain(s) for n, s in found.items()}})


def _target(asked: Message) -> Target:
    return Target(**asked.fields["target"])


def _tensors(arrays: Arrays) -> dict[str, Any]:
    """Make tensors where there is torch; else leave arrays."""
    if not plugins.installed("torch"):
        return dict(arrays)
    import torch

    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _network(form: Form, file: Path, inputs: Inputs) -> Any:
    """Read a network in the form that `plugins.hand_over` wrote it in."""
    if form == "onnx":
        import onnx

        return onnx.load(file)
    if form == "exported":
        from tersor.ops import pt2

        program = pt2.read(file)
        program._example_inputs = ((), dict(inputs.example))
        return program
    from tersor.ops import edits

    return edits.replay(file.parent, None)
