"""What compiled files of the runtimes need: a compiler here, and there a processor that fits."""

import contextlib
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.core.errors import DependencyError, TargetError
from tersor.core.hardware import probe

COMPILERS = ("g++", "clang++", "c++")
_INSTRUCTIONS = re.compile(
    r"(avx|amx|sse|ssse|fma|f16c|bmi|abm|popcnt|movbe|aes|vaes|sha|gfni|pclmul|vpclmul|adx|3dnow)"
    r"|(asimd|sve|sme|i8mm|bf16|fphp|atomics|crc32|pmull|lrcpc|dotprod)"
)
"""Beginnings of the names of instructions that compilers use; x86, then Arm."""


def cxx_compiler() -> str:
    """Return the C++ compiler: `CXX`, else the first of `COMPILERS`.

    Raises:
        DependencyError: there is none.
    """
    asked = os.environ.get("CXX")
    wanted = (asked,) if asked else COMPILERS
    found = next((path for word in wanted if (path := shutil.which(word))), None)
    if found is None:
        what = f"CXX is {asked!r}, which is not there" if asked else "there is none"
        raise DependencyError(
            f"torch_compile needs a C++ compiler to export, and {what}. Install g++ or clang++, or "
            "set CXX to one; or choose the runtime torch_export, which needs none"
        )
    return found


def processor(root: Path = Path("/")) -> dict[str, Any]:
    """Describe what code compiled here for this processor may use.

    Args:
        root: Where /proc is.
    """
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = [line.partition(":") for line in text.splitlines()]
    # the first core's: all cores of a machine that runs one program have the same instructions
    words = next((v for k, _, v in lines if k.strip() in ("flags", "Features")), "").split()
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": probe(root).cpu,
        "instructions": sorted(word for word in words if _INSTRUCTIONS.match(word)),
    }


def check_processor(name: str, made_for: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse code that this processor cannot run.

    Where instructions cannot be read, the model of the processor must be the same.

    Args:
        name: Of the file.
        made_for: What `processor` said where it was compiled.
        here: What it says here.

    Raises:
        TargetError: says what is missing.
    """
    again = "export the network again on this machine"
    for word in ("system", "architecture"):
        if made_for.get(word) != here[word]:
            raise TargetError(
                f"{name} was compiled for {made_for.get(word)}, this machine is {here[word]}; "
                f"{again}"
            )
    needed = list(made_for.get("instructions", ()))
    missing = sorted(set(needed) - set(here["instructions"]))
    if missing:
        raise TargetError(
            f"{name} was compiled for {made_for.get('cpu')}; this processor ({here['cpu']}) lacks "
            f"its instructions {', '.join(missing)}; {again}"
        )
    if not needed and made_for.get("cpu") != here["cpu"]:
        raise TargetError(
            f"{name} was compiled for {made_for.get('cpu')}, this processor is {here['cpu']}; "
            f"{again}"
        )


def blank_folders(made: Sequence[Path], aside: str) -> None:
    """Overwrite the folders of this machine that compiled files name in their error messages.

    Args:
        made: Files; those ending in .so are rewritten.
        aside: The folder that they were compiled in.
    """
    import torch

    for file in made:
        if file.suffix != ".so":
            continue
        data = file.read_bytes()
        for folder in (aside, str(Path(torch.__file__).parent)):
            # of the same length, so that nothing in the file moves
            data = data.replace(folder.encode(), b"." * len(folder.encode()))
        file.write_bytes(data)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Inductor."""
    log = logging.getLogger("torch._inductor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
