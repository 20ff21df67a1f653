"""Runtime, Target, Runner: where a network runs.

A runtime is one file with an `export`, a `load` and, as its last line, a `RUNTIME`. Its packages
are imported inside those functions: exporting and running happen on different machines.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from tersor.core import packing

if TYPE_CHECKING:
    from tersor.core.model import Inputs

Arrays = Mapping[str, np.ndarray]
Form = Literal["module", "exported", "onnx"]
FORMS: tuple[Form, ...] = ("module", "exported", "onnx")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What we compress for; written "onnxruntime:cpu", or with options "openvino,shapes=fixed"."""

    runtime: str
    """Name of a file in `runtimes/`."""
    device: str = "cpu"
    """A device of that runtime."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the runtime: `threads` (0: all usable cores), `precision` where it has one."""

    @staticmethod
    def parse(text: str) -> "Target":
        """Read "RUNTIME[:DEVICE][,OPTION=VALUE...]".

        Raises:
            ValueError: it has another form.
        """
        place, *pairs = text.split(",")
        runtime, _, device = place.partition(":")
        parts = [pair.partition("=") for pair in pairs]
        if not runtime or (":" in place and not device) or not all(n and v for n, _, v in parts):
            raise ValueError(
                f"target must be RUNTIME or RUNTIME:DEVICE, and may go on with ,OPTION=VALUE; got "
                f"{text!r}"
            )
        options = {name: _value(value) for name, _, value in parts}
        if len(options) < len(parts):
            raise ValueError(f"target {text!r} gives an option twice")
        return Target(runtime=runtime, device=device or "cpu", options=options)

    @property
    def threads(self) -> int:
        """Threads of one run; 0 means all usable cores."""
        return int(self.options.get("threads", 0))

    @property
    def text(self) -> str:
        """As it is written with its options, but for the threads, which are told apart."""
        own = {k: v for k, v in self.options.items() if k != "threads"}
        words = (f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in own.items())
        return ",".join([str(self), *words])

    def __str__(self) -> str:
        return f"{self.runtime}:{self.device}"


def _value(text: str) -> Any:
    """Read a number, true or false, or else take the word as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, (bool, int, float)) else text


class Runner(Protocol):
    """A loaded network. Bind inputs once, then call as often as you like."""

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        """Copy `inputs` in; the returned call computes, and returns when its outputs are ready."""
        ...

    def close(self) -> None:
        """Free what was loaded."""
        ...


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One input of a network."""

    shape: tuple[int | str, ...]
    """A word where the size is free; the first one is then the batch."""
    dtype: str
    """numpy's name."""
    usual: tuple[int, ...] | None = None
    """A shape it was called with."""


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """What a runtime's own profiler says of one operator."""

    name: str
    kind: str
    """The runtime's word for it, such as QLinearConv."""
    ms: float
    """Of one run."""
    weight: tuple[int, ...] = ()
    """Shape of its second tensor, where the runtime tells it."""


@dataclass(frozen=True, kw_only=True)
class RanOperator:
    """An operator that a runtime executes after optimizing a network."""

    kind: str
    """The runtime's word for it, such as FusedConv."""
    covers: tuple[str, ...]
    """Names of the network's operators, or of their outputs, that it computes."""
    name: str = field(default="", compare=False)
    """What the runtime's profiler calls it."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a file in `runtimes/` offers."""

    takes: Form
    """The form of network that `export` is given."""
    devices: tuple[str, ...]
    """Device names of a target."""
    export: Callable[..., Sequence[Path]]
    """Write a network of form `takes` into a folder; return the files, the one to load first. It is
    given the network, the folder and how to call it (`Inputs`); where `targeted`, the target."""
    load: Callable[[Path, Target], Runner]
    """Load the first of those files."""
    profile: Callable[[Path, Target, Sequence[Arrays]], Sequence[OperatorTime]] | None = None
    """Run the batches and tell where the time went; None: the runtime has no such means."""
    fused: Callable[[Path, Target], Sequence[RanOperator]] | None = None
    """Tell what an exported network is executed as; None: the runtime has no such means."""
    inputs: Callable[[Path], Mapping[str, Signature]] | None = None
    """Read what a file takes, by name; None: only artifacts of this runtime are run."""
    suffixes: tuple[str, ...] = ()
    """Endings of files that it runs outside an artifact, too; the first runtime of an ending is the
    one that is taken where none is named."""
    native: bool = True
    """Whether `load` is native code that a damaged file could crash: what is no artifact is then
    tried in a child process first."""
    runs_code: bool = False
    """Whether its files are compiled code, which does whatever is in it: an artifact that was not
    made by this user is then loaded only when they say that they trust it."""
    fixed_batch: bool = False
    """Whether an exported file takes batches of one size only: that of the inputs at export. Its
    runner takes other batches in pieces (`core/pieces.py`)."""
    targeted: bool = False
    """Whether options change what `export` writes."""
    options: tuple[str, ...] = ("threads",)
    """Names allowed in `Target.options`."""
    check: Callable[[Target], object] | None = None
    """Raise `TargetError` for values of options that cannot be, wherever it is run."""
    present: Callable[[Target], object] | None = None
    """Raise `DependencyError` where this machine lacks what the device needs."""
    half_on: tuple[str, ...] | None = None
    """Devices that compute in 16 bits, of those with the option `precision`; None: all."""
    autocasts: bool = False
    """Whether it computes in 16 bits by PyTorch's autocast, which a layer can leave."""
    weights: tuple[str, ...] = ()
    """Formats of weights that it reads beside fp32 and integers, as `half` names them."""
    own_operators: bool = False
    """Whether it runs operators that only tersor has: sparse products."""
    system: str = ""
    """`sys.platform` where its files run; "": anywhere."""
    to_export: tuple[str, ...] = ()
    """Packages that `export` imports, by import name."""
    to_run: tuple[str, ...] = ()
    """Packages that `load` imports, by import name."""

    def halves(self, device: str) -> bool:
        """Tell whether it computes in 16 bits there."""
        able = self.devices if self.half_on is None else self.half_on
        return "precision" in self.options and device in able

    def write(self, net: Any, folder: Path, inputs: "Inputs", target: Target) -> Sequence[Path]:
        """Export a network for a target.

        Raises:
            TargetError: the runtime, or an option, does not fit it.
        """
        about = (net, folder, inputs)
        return self.export(*about, target) if self.targeted else self.export(*about)

    def open(self, path: Path, target: Target) -> Runner:
        """Load a file that `export` wrote, packed or not.

        Raises:
            ArtifactError: a packed file is damaged. TargetError: the runtime cannot load it.
        """
        with packing.unpacked(path) as file:
            return self.load(file, target)
