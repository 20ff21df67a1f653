"""Environments: where runtimes live whose packages cannot be installed beside each other.

Each is a virtual environment of its own, named after the runtime or source, with the versions that
were seen to work (`tersor/environments/NAME.txt`). `tersor doctor --create NAME` makes one; from
then on the runtime is driven there in a child process, as if it were installed here.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tersor.core import files
from tersor.core.errors import ArtifactError, DependencyError, RecipeError, suggest

VARIABLE = "TERSOR_ENVIRONMENTS"
"""Names another folder for them."""
_PINS = Path(__file__).resolve().parent.parent / "environments"
_DONE = "installed"
_TORCH = "torch=="
_LONGEST_S = 3600.0
"""That another process may take: some are gigabytes."""


def folder() -> Path:
    """Return where environments are kept; it may not exist.

    Raises:
        DependencyError: nothing says where, and this user has no home.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    try:
        return (Path(data) if data else Path("~/.local/share").expanduser()) / "tersor/environments"
    except RuntimeError as error:
        raise DependencyError(
            f"this user has no home directory for environments; set {VARIABLE} to a folder"
        ) from error


def known() -> tuple[str, ...]:
    """List the environments that can be made."""
    return tuple(sorted(file.stem for file in _PINS.glob("*.txt")))


def pins(name: str) -> tuple[str, ...]:
    """List the packages of an environment, each with its version."""
    lines = (_PINS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def python(name: str) -> Path | None:
    """Return the interpreter of an environment, where it is there and whole."""
    try:
        place = folder() / name
    except DependencyError:
        return None
    return _interpreter(place) if (place / _DONE).is_file() else None


def create(name: str, tell: Callable[[str], None]) -> Path:
    """Make an environment, anew where an older one is there; needs the network.

    Where another process is making it, that is waited for.

    Args:
        name: One of `known()`.
        tell: Told what happens.

    Returns:
        Its folder.

    Raises:
        RecipeError: there is none of that name. DependencyError: packages cannot be installed, or
            a folder of that name is there that is no environment.
    """
    if name not in known():
        raise RecipeError(
            f"no environment is called {name!r}.{suggest(name, known())} "
            f"There are {', '.join(known())}"
        )
    place = folder() / name
    wanted = pins(name)
    with _alone(place, tell) as waited:
        if waited and python(name) and not stale(name):
            tell(f"{place} was made by it")
            return place
        if place.exists() and not (place / "pyvenv.cfg").is_file() and any(place.iterdir()):
            raise DependencyError(
                f"{place} is there and is no environment; move it away, or set {VARIABLE} to "
                "another folder"
            )
        shutil.rmtree(place, ignore_errors=True)
        tell(f"making {place}")
        _install(place, name, wanted, tell)
    return place


@contextlib.contextmanager
def _alone(place: Path, tell: Callable[[str], None]) -> Iterator[bool]:
    """Keep other processes from making the same environment.

    Yields:
        Whether another one had to be waited for.

    Raises:
        DependencyError: the folder cannot be written, or the other takes too long.
    """
    waited = False
    with contextlib.ExitStack() as held:
        try:
            try:
                held.enter_context(files.lock(place))
            except ArtifactError as error:
                if error.__cause__ is not None:  # of the disk, not of another process
                    raise
                tell(f"another process is making {place}; waiting for it")
                waited = True
                held.enter_context(files.lock(place, wait_s=_LONGEST_S))
        except ArtifactError as error:
            raise DependencyError(
                f"{error}; or set {VARIABLE} to another folder that can be written"
            ) from error
        yield waited


def _install(place: Path, name: str, wanted: Sequence[str], tell: Callable[[str], None]) -> None:
    _run([sys.executable, "-m", "venv", str(place)], name)
    pip = [str(_interpreter(place)), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    # torch comes first and alone, so that the build that this machine has is taken as it is
    for packages in ([p for p in wanted if p.startswith(_TORCH)], list(wanted)):
        if packages:
            tell(f"installing {len(packages)} package{'s' * (len(packages) > 1)}")
            _run([*pip, *packages], name)
    (place / _DONE).write_text("\n".join(wanted) + "\n", encoding="utf-8")


def stale(name: str) -> bool:
    """Tell whether an environment was made with other versions than are wanted now."""
    done = folder() / name / _DONE
    return done.is_file() and tuple(done.read_text(encoding="utf-8").split()) != pins(name)


def _interpreter(place: Path) -> Path:
    return place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise DependencyError(
            f"the environment {name!r} cannot be made: {lines[-1] if lines else 'no reason given'}"
        )
