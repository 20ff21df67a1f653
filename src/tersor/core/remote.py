"""A runtime or source in a child process: in its own environment, or so that crashes stay there.

Nothing that runs in the child comes from a message: it says which of the plugin's functions to
call, and carries arrays. Times are taken in the child: what the way between costs is not in them.
"""

import contextlib
import select
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, cast

from tersor.core import errors
from tersor.core.errors import TargetError, TersorError
from tersor.core.hardware import probe
from tersor.core.runtime import (
    Arrays,
    OperatorTime,
    RanOperator,
    Runner,
    Runtime,
    Signature,
    Target,
)
from tersor.core.schema import to_plain
from tersor.core.wire import Message, receive, send

if TYPE_CHECKING:
    from tersor.core.model import Inputs

HandOver = Callable[[Any, Path, "Inputs"], Path]
"""Write a network into a folder so that another process can read it; return the file."""
_LAST_S = 5.0
"""Seconds in which a process that has closed its pipe ends."""
_LEAST, _SHARE = 1 << 30, 0.8
"""This share of the free memory, but so many bytes at least."""
_PACKAGE = Path(__file__).resolve().parent.parent
# the child imports tersor from this very folder and nothing else of this environment
_START = """
import importlib.util, sys
place = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location(
    "tersor", place + "/__init__.py", submodule_search_locations=[place])
sys.modules["tersor"] = made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
from tersor._remote import main
main(sys.argv[1:])
"""


def command(python: str | Path, *words: str) -> list[str]:
    """Return the command that starts this tersor's child program in another interpreter."""
    # -P: what lies in the current folder, beside a network for instance, is not imported
    return [str(python), "-P", "-c", _START, str(_PACKAGE), *words]


class ChildError(TargetError):
    """The process died, or took too long; not something that the runtime said."""


class Child:
    """A process that runs one runtime, and is asked one thing at a time."""

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    dropped: list[int]

    def __init__(
        self,
        name: str,
        python: str | Path,
        *,
        memory_bytes: int | None = None,
        kind: Literal["runtime", "source"] = "runtime",
    ) -> None:
        """Start it.

        Args:
            name: Of the runtime, or of the source.
            python: The interpreter.
            memory_bytes: Most memory it may allocate.
            kind: What `name` is.
        """
        self.name = name
        self.dropped = []
        # what it prints is kept for messages; a temporary file, so that it never blocks
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        words = ["serve" if kind == "runtime" else "convert", name] + (
            [] if memory_bytes is None else [str(memory_bytes)]
        )
        self.process = subprocess.Popen(
            command(python, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,  # an interrupt is for us, not for it
        )
        self._end = weakref.finalize(self, _kill, self.process, self.log)

    def ask(
        self,
        what: str,
        arrays: Arrays | None = None,
        *,
        seconds: float | None = None,
        **fields: Any,
    ) -> Message:
        """Let it do something, and wait for the answer.

        Raises:
            TersorError: what it raised. ChildError: it died, or took longer than `seconds`.
        """
        drop = [self.dropped.pop() for _ in range(len(self.dropped))]
        stdin, stdout = cast(BinaryIO, self.process.stdin), cast(BinaryIO, self.process.stdout)
        try:
            send(stdin, Message(fields={"do": what, "drop": drop, **fields}, arrays=arrays or {}))
            if seconds is not None and not select.select([stdout], [], [], seconds)[0]:
                self.close()
                raise ChildError(f"{self.name} did not finish within {seconds:g} s")
            answer = receive(stdout)
        except (OSError, ValueError):
            answer = None
        except TersorError:  # before anything was sent
            raise
        except BaseException:
            self.close()  # an answer may be on its way, which the next question would take for its
            raise
        if answer is None:
            raise ChildError(f"{self.name} {self._last_words()}")
        if "error" in answer.fields:
            kind = getattr(errors, str(answer.fields["error"]), TargetError)
            known = isinstance(kind, type) and issubclass(kind, TersorError)
            raise (kind if known else TargetError)(str(answer.fields["message"]))
        return answer

    def close(self) -> None:
        """End the process."""
        self._end()

    def _last_words(self) -> str:
        if self.log.closed:
            return "was ended before"
        try:
            code = self.process.wait(_LAST_S)
        except subprocess.TimeoutExpired:  # it lives, but what it says is not an answer
            self.process.kill()
            code = self.process.wait()
        self.log.seek(0)
        lines = [x.strip() for x in self.log.read().decode(errors="replace").splitlines()]
        last = next((x for x in reversed(lines) if x), "")
        how = (
            f"crashed ({signal.Signals(-code).name})"
            if code < 0
            else f"ended with exit code {code}"
        )
        return f"{how}{': ' + last[:300] if last else ''}"


def _kill(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    for stream in (process.stdin, process.stdout, log):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.kill()
    process.wait()


class _RemoteRunner:
    """A network that is loaded in a child."""

    def __init__(self, child: Child) -> None:
        self.child = child

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        return _Call(self.child, int(self.child.ask("bind", inputs).fields["call"]))

    def close(self) -> None:
        self.child.close()


class _Call:
    """A bound call in a child. `run_ns` and `cpu_ns` are what `core/timing.py` asks for."""

    def __init__(self, child: Child, number: int) -> None:
        self.child, self.number = child, number
        weakref.finalize(self, child.dropped.append, number)

    def __call__(self) -> Arrays:
        return self.child.ask("run", call=self.number).arrays

    def run_ns(self) -> int:
        """Run once, and return the nanoseconds that it took there."""
        return int(self.child.ask("time", call=self.number).fields["ns"])

    def cpu_ns(self) -> int:
        """Run once, and return the nanoseconds that all threads of the child spent on it."""
        return int(self.child.ask("time", call=self.number).fields["cpu_ns"])


def driven(
    name: str,
    found: Runtime,
    python: str | Path,
    hand_over: HandOver,
    *,
    export_too: bool = True,
    load_too: bool = True,
) -> Runtime:
    """Return a runtime whose work is done by children of another interpreter.

    Args:
        name: Of the runtime.
        found: As its file describes it.
        python: The interpreter that has its packages.
        hand_over: Writes a network of the form that the runtime takes.
        export_too: Export there.
        load_too: Load and run there.
    """

    def export(
        net: Any, folder: Path, inputs: "Inputs", target: Target | None = None
    ) -> Sequence[Path]:
        child = Child(name, python)
        try:
            with tempfile.TemporaryDirectory(prefix="tersor-") as aside:
                file = hand_over(net, Path(aside), inputs)
                answer = child.ask(
                    "export",
                    {n: t.detach().cpu().numpy() for n, t in inputs.example.items()},
                    form=found.takes,
                    file=str(file),
                    folder=str(folder.resolve()),
                    target=to_plain(target or Target(runtime=name)),
                    dynamic={
                        n: {str(a): w for a, w in d.items()} for n, d in inputs.dynamic.items()
                    },
                )
        finally:
            child.close()
        return [folder / str(file) for file in answer.fields["files"]]

    def load(path: Path, target: Target) -> Runner:
        child = Child(name, python)
        try:
            child.ask("load", **_about(path, target))
        except BaseException:
            child.close()
            raise
        return _RemoteRunner(child)

    def profile(path: Path, target: Target, batches: Sequence[Arrays]) -> Sequence[OperatorTime]:
        child = Child(name, python)
        try:
            arrays = {f"{i} {n}": a for i, batch in enumerate(batches) for n, a in batch.items()}
            made = child.ask("profile", arrays, **_about(path, target)).fields["operators"]
        finally:
            child.close()
        return [OperatorTime(**{**each, "weight": tuple(each["weight"])}) for each in made]

    def fused(path: Path, target: Target) -> Sequence[RanOperator]:
        child = Child(name, python)
        try:
            made = child.ask("fused", **_about(path, target)).fields["operators"]
        finally:
            child.close()
        return [RanOperator(**{**each, "covers": tuple(each["covers"])}) for each in made]

    def inputs(path: Path) -> Mapping[str, Signature]:
        child = Child(name, python)
        try:
            return signatures(child.ask("inputs", file=str(path.resolve())))
        finally:
            child.close()

    made = found
    if export_too:
        made = replace(made, export=export, to_export=())
    if load_too:
        made = replace(
            made,
            load=load,
            profile=profile if found.profile else None,
            fused=fused if found.fused else None,
            inputs=inputs if found.inputs else None,
            to_run=(),
        )
    return made


def converted(name: str, python: str | Path, place: Path, file: Path, *, seconds: float) -> None:
    """Let a source write what is at `place` as an ONNX file, in a child of another interpreter.

    Raises:
        TersorError: what the source raised. TargetError: the child died, or took too long.
    """
    child = Child(name, python, memory_bytes=usable_memory(), kind="source")
    try:
        child.ask("convert", seconds=seconds, place=str(place.resolve()), file=str(file.resolve()))
    finally:
        child.close()


def usable_memory() -> int | None:
    """Return the bytes that a child may allocate for what nobody vouches for; None: unknown."""
    free = probe().available_bytes
    return None if free is None else max(_LEAST, int(free * _SHARE))


def signatures(answer: Message) -> dict[str, Signature]:
    """Read what a child says of a network's inputs."""
    return {
        name: Signature(
            shape=tuple(each["shape"]),
            dtype=each["dtype"],
            usual=None if each["usual"] is None else tuple(each["usual"]),
        )
        for name, each in answer.fields["inputs"].items()
    }


def _about(path: Path, target: Target) -> dict[str, Any]:
    return {"file": str(path.resolve()), "target": to_plain(target)}
