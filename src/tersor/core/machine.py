"""Machine: a kind of hardware that need not be here, described by what its vendor documents.

name: raspberry-pi-5
kind: cpu
what: Raspberry Pi 5, four Cortex-A76 cores at 2.4 GHz
gops: {fp32: 153.6, fp16: 307.2, int8: 614.4}
memory_gb_s: 17
runtimes: [onnxruntime, litert]
sources: ["https://..."]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tersor.core import plugins
from tersor.core.errors import RecipeError, suggest
from tersor.core.recipe import located, names_in, packaged, read_yaml
from tersor.core.schema import Mistakes, from_plain

Kind = Literal["cpu", "gpu", "npu", "tpu", "fpga", "microcontroller"]
WIDTHS: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of a number, by format."""
FOLDER = Path(__file__).resolve().parent.parent / "machines"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What bounds a network's speed on a kind of hardware: peaks, not what is reached."""

    name: str
    """As the command line takes it."""
    kind: Kind
    what: str
    """One line for a reader."""
    gops: Mapping[str, float]
    """Number format (fp32, fp16, bf16, int8) -> billions of operations a second, dense; a
    multiply-accumulate is two. A format that is absent the hardware does not have."""
    memory_gb_s: float
    """Billions of bytes a second from where weights are kept."""
    memory_bytes: int = 0
    """For weights and activations; 0: the memory of a host, whose size is not known."""
    working_bytes: int = 0
    """For activations, where that is another memory than the one for weights; 0: the same one."""
    cache_bytes: int = 0
    """On the chip, where weights can stay from one run to the next; 0: none, or not documented."""
    start_us: float = 0.0
    """Microseconds that starting one operator costs; 0: not known."""
    watts: float = 0.0
    """That the vendor names as the most drawn; 0: not known."""
    runtimes: tuple[str, ...] = ()
    """Those of tersor that export for it."""
    needs_full_int8: bool = False
    """Whether it runs nothing but integers."""
    sparse_2_4: bool = False
    """Whether it multiplies twice as fast where two of four neighboring weights are zero."""
    sources: tuple[str, ...] = field(default=())
    """Documents that the numbers come from."""

    def __post_init__(self) -> None:
        for name, speed in self.gops.items():
            if name not in WIDTHS:
                raise ValueError(
                    f"unknown number format {name!r} in gops.{suggest(name, WIDTHS)} "
                    f"One of {', '.join(WIDTHS)}"
                )
            _positive(f"gops of {name}", speed)
        if not self.gops:
            raise ValueError("gops names no number format")
        _positive("memory_gb_s", self.memory_gb_s)
        for name in ("memory_bytes", "working_bytes", "cache_bytes", "start_us", "watts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.needs_full_int8 and "int8" not in self.gops:
            raise ValueError("needs_full_int8, but gops has no int8")
        known = plugins.names("runtimes")
        for name in self.runtimes:
            if name not in known:
                raise ValueError(f"unknown runtime {name!r}.{suggest(name, known)}")
        if not self.sources:
            raise ValueError("sources is empty; say which documents the numbers come from")

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that a network can run in, the widest first."""
        able = ("int8",) if self.needs_full_int8 else tuple(WIDTHS)
        return tuple(name for name in able if name in self.gops)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be more than 0, got {value:g}")


def find(place: str | Path) -> Machine:
    """Read a machine's file, or a machine of the package by its name.

    Raises:
        RecipeError: there is none; or every mistake in the file, with line and nearest name.
    """
    file = file_of(place)
    raw, places = read_yaml(file)
    mistakes = Mistakes()
    found = from_plain(Machine, raw, (), mistakes)
    if mistakes.found:
        raise RecipeError(*(located(file.name, mistake, places) for mistake in mistakes.found))
    assert found is not None
    return found


def file_of(place: str | Path) -> Path:
    """Return the file of a machine given by path or by name.

    Raises:
        RecipeError: there is neither.
    """
    return packaged(place, FOLDER, "machine")


def machines() -> list[str]:
    """List the names of the package's machines."""
    return names_in(FOLDER)
