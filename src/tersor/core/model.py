"""Model and Inputs: what goes in. Only the pipeline sees a Model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.core.runtime import FORMS, Form

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How to call the network."""

    example: Mapping[str, "Tensor"]
    """One batch of at least two samples, by the names of forward's parameters."""
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Dimensions that may change, by input: {"x": {0: "batch"}}."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network as a source loaded it."""

    net: Any
    """nn.Module, ExportedProgram or onnx.ModelProto."""
    form: Form
    """Which of the three."""
    origin: str
    """Where it came from: "module:file.py:factory", "exported:x.pt2", "onnx:x.onnx"."""
    inputs: Inputs | None = None
    """How to call it, where the source knows; else the first batch of the data tells."""
    notes: tuple[str, ...] = ()
    """What the source had to say: weights left out by a partial load, for instance."""
    processor: tuple[Path, ...] = ()
    """Files of the tokenizer or image processor, which travel to the artifact."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a file in `sources/` offers."""

    load: Callable[..., Model]
    """load(place, *, weights: Path | None, partial: bool) -> Model."""
    suffixes: tuple[str, ...] = ()
    """File endings this source reads without its name in front."""
    check: Callable[[Path], None] | None = None
    """Raise `ModelError` for a file that `load` would refuse, without torch; None: it cannot."""
    convert: Callable[[Path, Path], None] | None = None
    """convert(place, file): write what is at a place as an ONNX file. Called in a child process of
    an interpreter that has the packages (`plugins.converted`); None: `load` needs no such thing."""
    to_convert: tuple[str, ...] = ()
    """Packages that `convert` imports, by import name."""


def may_lower(form: Form, to: Form) -> bool:
    """Tell whether `form` can become `to`: module -> exported -> onnx, one way only."""
    return FORMS.index(form) <= FORMS.index(to)
