"""Import what a user names: "file.py:function" or "package.module:function"."""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tersor.core.errors import ModelError, TersorError, suggest


def import_object(
    text: str, *, error: type[TersorError] = ModelError, what: str = "function"
) -> Any:
    """Import the object that `text` names.

    A script is imported once for each content of its file; its own folder is on the path meanwhile,
    so that it finds its siblings. A dotted module is also looked for in the current folder.

    Args:
        text: "path/file.py:name" or "package.module:name".
        error: Class of the error to raise.
        what: What the object should be, for messages.

    Raises:
        TersorError: of class `error`; there is no such file, module or name, or importing it fails
            (with file and line).
    """
    place, name = _split(text, error, what)
    module = _import(place, error)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise error(
                f"{place!r} has no {what} {name!r}.{suggest(name, _public(module))}"
                + _listing(_public(module))
            )
        found = getattr(found, part)
    return found


def call_object(text: str, *, error: type[TersorError] = ModelError, what: str = "function") -> Any:
    """Import a function that needs no argument, call it, and return what it returns.

    Raises:
        TersorError: of class `error`; as `import_object`, or it cannot be called without an
            argument, or it fails (with file and line).
    """
    function = import_object(text, error=error, what=what)
    place, name = _split(text, error, what)
    if not callable(function):
        raise error(f"{name!r} in {place!r} is {type(function).__name__}, not a {what} to call")
    _check_arguments(function, place, name, error, what)
    with _searched(place):
        return _guard(function, f"{what} {name!r} of {place!r} failed", place, error)


def _split(text: str, error: type[TersorError], what: str) -> tuple[str, str]:
    place, _, name = text.rpartition(":")
    if place and name.replace(".", "").isidentifier() and not place.endswith(":"):
        return place, name
    known = _functions(Path(text)) if text.endswith(".py") else []
    raise error(
        f"{text!r} does not name a {what}; write FILE.py:NAME or PACKAGE.MODULE:NAME."
        f"{_listing(known)}"
    )


def _import(place: str, error: type[TersorError]) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(place, error)
    if not all(part.isidentifier() for part in place.split(".")):
        raise error(f"{place!r} is neither a .py file nor the dotted name of a module")
    with _searched(place):
        try:
            found = importlib.util.find_spec(place)
        except ModuleNotFoundError:
            found = None
        except Exception as cause:
            raise error(f"{place!r} cannot be imported: {_tell(cause, place)}") from cause
        if found is None:
            raise error(
                f"there is no module {place!r} here; is its package installed, "
                "or should it be a path to a .py file?"
            )
        what = f"{place!r} cannot be imported"
        module: ModuleType = _guard(lambda: importlib.import_module(place), what, place, error)
        return module


def _import_file(place: str, error: type[TersorError]) -> ModuleType:
    file = Path(place).resolve()
    if not file.is_file():
        near = (
            suggest(file.name, [p.name for p in file.parent.glob("*.py")])
            if file.parent.is_dir()
            else ""
        )
        raise error(f"there is no file {place!r}.{near}")
    key = hashlib.sha256(f"{file}\0{file.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"tersor_user_{key}_{''.join(c if c.isalnum() else '_' for c in file.stem)}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        with _searched(place):
            _guard(
                lambda: loader.exec_module(module),
                f"{place!r} cannot be imported",
                place,
                error,
            )  # type: ignore[union-attr]  # asserted above
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextlib.contextmanager
def _searched(place: str) -> Iterator[None]:
    """Put the script's folder, or the current one, on the path."""
    folder = str(Path(place).resolve().parent if place.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _guard(call: Callable[[], Any], what: str, place: str, error: type[TersorError]) -> Any:
    """Call the user's code; turn whatever it raises into one line with file and line."""
    try:
        return call()
    except TersorError:
        raise
    except (Exception, SystemExit) as cause:
        raise error(f"{what}: {_tell(cause, place)}") from cause


def _tell(cause: BaseException, place: str) -> str:
    """Say what was raised, and at which line of the user's own folder (else of all)."""
    first = str(cause).strip().partition("\n")[0][:300]
    said = f"{type(cause).__name__}: {first}" if first else type(cause).__name__
    if isinstance(cause, SyntaxError) and cause.filename:
        return f"{cause.filename}:{cause.lineno}: SyntaxError: {cause.msg}"
    if isinstance(cause, SystemExit):
        said = (
            f"it ends the program (SystemExit: {cause.code}); "
            "put that under `if __name__ == '__main__':`"
        )
    frames = [
        f
        for f in traceback.extract_tb(cause.__traceback__)
        if f.filename != __file__ and not f.filename.startswith("<frozen")
    ]
    folder = str(Path(place).resolve().parent if place.endswith(".py") else Path.cwd())
    own = [f for f in frames if f.filename.startswith(folder)] or frames
    if not own:
        return said
    return f"{own[-1].filename}:{own[-1].lineno}: {said}" + (
        f" ({own[-1].line})" if own[-1].line else ""
    )


def _check_arguments(
    function: Any, place: str, name: str, error: type[TersorError], what: str
) -> None:
    import inspect

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    needed = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise error(
            f"{what} {name!r} of {place!r} needs the argument{'s' * (len(needed) > 1)} "
            f"{', '.join(needed)}; name one that needs none "
            "(wrap it in a function that fills them in)"
        )


def _public(module: ModuleType) -> list[str]:
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
    return [n for n in own if not n.startswith("_")]


def _functions(file: Path) -> list[str]:
    """List the functions of a script without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    return [
        n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
    ]


def _listing(names: list[str]) -> str:
    return f" It has {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else ""
