"""Our own C, compiled for the processor at hand by its compiler, when it is first needed.

A build is kept in the user's cache folder under a name made of what it was built from and for, and
of its own content: a build for another processor, of another source, or damaged, is not loaded.
Without a compiler there is no build, and whoever asks goes another way.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tersor.core import files

SOURCE = Path(__file__).with_name("sparse.c")
COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-shared", "-fPIC")
# the second is how Arm spells it; the last builds for any processor of the kind
_TUNED: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_S = 120
_MOST_KEPT = 8


@dataclass(frozen=True, kw_only=True)
class Build:
    """What came of compiling."""

    library: ctypes.CDLL | None
    """None: there is none, for the reason given."""
    note: str
    """Where it comes from, or why there is none and what to do."""


def cache_folder() -> Path:
    """Return where tersor keeps what can be made again: `tersor` in XDG_CACHE_HOME.

    A user without a home gets a place where nothing is, and nothing can be written.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersor"
    except RuntimeError:
        return Path(os.devnull) / "tersor"


@cache
def build() -> Build:
    """Load the compiled kernels, compiling them where they are not in the cache."""
    try:
        name = f"sparse-{_built_for()}"
        kept = _kept(cache_folder(), name)
        if kept is not None:
            return Build(library=kept, note="compiled before for this processor")
        compiler = _compiler()
        if compiler is None:
            return Build(library=None, note="no C compiler here: install gcc or clang")
        return _compiled(compiler, name)
    except OSError as error:
        return Build(library=None, note=f"cannot be built or loaded: {error}")


def trim(folder: Path, pattern: str) -> None:
    """Remove all but the newest few files of a kind: those of old versions and other machines."""
    kept = sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime)
    for file in kept[: -_MOST_KEPT + 1]:
        file.unlink(missing_ok=True)


def _built_for() -> str:
    """Hash the source, the flags and what is known of the processor."""
    parts = [SOURCE.read_bytes(), repr((_FLAGS, _TUNED)).encode(), platform.machine().encode()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    told = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    # the first core's: all cores of a machine that runs one program have the same instructions
    parts += [next((x.encode() for x in lines if x.startswith(word)), b"") for word in told]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _compiler() -> str | None:
    wanted = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    return next((found for word in wanted if (found := shutil.which(word))), None)


def _kept(folder: Path, name: str) -> ctypes.CDLL | None:
    """Load a build from the cache: ours alone to write, and as it was written."""
    for file in sorted(folder.glob(f"{name}-*.so")):
        if _others_may_write(folder) or _others_may_write(file):
            continue
        if file.stem == f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}":
            return _opened(file)
        files.unlink(file)
    return None


def _others_may_write(place: Path) -> bool:
    if not hasattr(os, "getuid"):  # Windows
        return False
    about = place.stat()
    return about.st_uid != os.getuid() or bool(about.st_mode & 0o022)


def _compiled(compiler: str, name: str) -> Build:
    with tempfile.TemporaryDirectory(prefix="tersor-") as aside:
        made = Path(aside) / "sparse.so"
        said = ""
        for tuned in _TUNED:
            command = [compiler, *_FLAGS, *tuned, "-o", str(made), str(SOURCE)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired:
                said = f"not done after {_TIMEOUT_S} s"
                continue
            if done.returncode == 0:
                break
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0][:200]
        else:
            return Build(library=None, note=f"{compiler} cannot compile it: {said}")
        data = made.read_bytes()
        note = f"compiled by {compiler}"
        try:
            kept = _keep(data, name)
        except OSError as error:
            return Build(library=_opened(made), note=f"{note}, each time anew ({error})")
        return Build(library=_opened(kept), note=note)


def _keep(data: bytes, name: str) -> Path:
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _others_may_write(folder):
        raise OSError(f"others may write to {folder}")
    trim(folder, "sparse-*.so")
    file = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:32]}.so"
    files.replace_file(file, data)
    file.chmod(0o600)
    return file


def _opened(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.tersor_sparse_linear.argtypes = [pointer, *[number] * 3, *[pointer] * 5]
    library.tersor_sparse_conv2d.argtypes = [pointer, *[number] * 3, *[pointer] * 7]
    return library
