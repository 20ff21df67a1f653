"""Find techniques, runtimes, metrics, sources ... by file name, or by entry point.

In a plugin folder every file without a leading underscore is one plugin and its name is the
registration. Outside the package an entry point in the group `tersor.techniques` (`runtimes`,
`metrics`, `sources`, `datasets`, `deployments`) whose name is the plugin's and whose value is its
module does the same. Names of the package win. Listing imports nothing.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, requires
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from tersor.core import environments, remote
from tersor.core.deployment import Deployment
from tersor.core.errors import DependencyError, RecipeError, TargetError, TersorError, suggest
from tersor.core.metric import Metric
from tersor.core.model import Inputs, Source
from tersor.core.runtime import Form, Runtime, Target
from tersor.core.technique import Technique

FAMILIES = (
    "pruning",
    "quantization",
    "distillation",
    "decomposition",
    "weight_sharing",
    "fusion",
    "adaptive",
    "distributed",
)
KINDS: Mapping[str, tuple[str, ...]] = {
    "techniques": FAMILIES,
    "runtimes": ("runtimes",),
    "metrics": ("metrics",),
    "sources": ("sources",),
    "datasets": ("datasets",),
    "deployments": ("deployments",),
}
_ROOT = Path(__file__).resolve().parent.parent


def names(kind: str) -> dict[str, str]:
    """Map the name of each plugin of a kind to its module's dotted name, in alphabetical order."""
    found = {p.name: p.value for p in entry_points(group=f"tersor.{kind}")}
    for folder in KINDS[kind]:
        for file in (_ROOT / folder).glob("[!_]*.py"):
            found[file.stem] = f"tersor.{folder}.{file.stem}"
    return dict(sorted(found.items()))


def module(kind: str, name: str) -> ModuleType:
    """Import a plugin's file.

    Raises:
        RecipeError: there is no plugin of that name; the nearest one is suggested.
        DependencyError: the file imports a package that is missing.
    """
    known = names(kind)
    if name not in known:
        raise RecipeError(
            f"unknown {kind[:-1]} {name!r}.{suggest(name, known)} `tersor list {kind}` shows all"
        )
    try:
        return importlib.import_module(known[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "tersor":
            raise
        raise missing(kind, name, error.name) from error


def missing(kind: str, name: str, package: str) -> DependencyError:
    """Build the error that says which package to install for a plugin."""
    package = package.partition(".")[0]
    return DependencyError(
        f"{kind[:-1]} {name!r} needs the package {package!r}. "
        f"Install it with: {install_line(name, package)}"
    )


def install_line(name: str, package: str) -> str:
    """Say how to install a package that the plugin `name` imports.

    An environment of the plugin's own where there is one to make; else the extra named like the
    plugin where it brings the package, else the one that does; the package alone where none does.
    """
    if name in environments.known():
        return f"tersor doctor --create {name}"
    brought = {extra: _named(lines) for extra, lines in _extras().items()}
    close = [extra for extra in (name, package) if package in brought.get(extra, ())]
    other = [extra for extra, packages in brought.items() if package in packages]
    own = [name] if name in brought else []
    found = [*close, *other, *own]
    return f"pip install 'tersor[{found[0]}]'" if found else f"pip install {package}"


def _named(lines: list[str]) -> set[str]:
    return {line.partition(">")[0].partition("=")[0].partition("[")[0] for line in lines}


@cache
def _extras() -> dict[str, list[str]]:
    """Read the extras from the installed package's own description; not those for developers."""
    try:
        lines = requires("tersor") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        package, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip().strip("\"'")
        if extra and extra not in ("dev", "docs"):
            found.setdefault(extra, []).append(package.strip())
    return found


@cache
def technique(name: str) -> Technique:
    """Load a technique.

    Raises:
        RecipeError: unknown name. DependencyError: its package is missing.
    """
    loaded = module("techniques", name)
    apply = getattr(loaded, name, None)
    if apply is None or not hasattr(apply, "__technique__"):
        raise TersorError(f"{loaded.__name__} has no function {name!r} marked with @technique")
    hints = list(get_type_hints(apply).values())
    return Technique(
        name=name,
        family=loaded.__name__.split(".")[-2] if "." in loaded.__name__ else "techniques",
        form=_form(hints[0]),
        config=hints[1],
        summary=(loaded.__doc__ or "").strip().partition("\n")[0],
        apply=apply,
        **apply.__technique__,
    )


def technique_of(config: Any) -> Technique:
    """Find the technique that a config belongs to, by the config's module.

    Raises:
        RecipeError: the object is no technique's config.
    """
    where = type(config).__module__
    for name, dotted in names("techniques").items():
        if dotted == where and technique(name).config is type(config):
            return technique(name)
    raise RecipeError(f"{type(config).__name__} is not the config of a technique")


@cache
def runtime(name: str) -> Runtime:
    """Load a runtime's description; its packages are not imported.

    Where its packages are missing but it has an environment of its own, what it does is done there.
    """
    found = own_runtime(name)
    export_too, load_too = (
        not all(installed(package) for package in packages)
        for packages in (found.to_export, found.to_run)
    )
    python = environments.python(name) if export_too or load_too else None
    if python is None:
        return found
    return remote.driven(
        name, found, python, hand_over(found.takes), export_too=export_too, load_too=load_too
    )


@cache
def own_runtime(name: str) -> Runtime:
    """Load a runtime's description as its file has it, for this process."""
    found = module("runtimes", name).RUNTIME
    assert isinstance(found, Runtime)
    return found


def check_device(target: Target) -> None:
    """Refuse a device that the target's runtime does not have.

    Raises:
        TargetError: the nearest one is suggested.
    """
    devices = own_runtime(target.runtime).devices
    if target.device not in devices:
        raise TargetError(
            f"runtime {target.runtime!r} has no device {target.device!r}."
            f"{suggest(target.device, devices)} It has {', '.join(devices)}"
        )


def interpreter(name: str, *, export: bool = False) -> Path:
    """Return the Python that has the packages which a runtime runs with, and exports with."""
    found = own_runtime(name)
    packages = (*found.to_export, *found.to_run) if export else found.to_run
    here = all(installed(package) for package in packages)
    return (None if here else environments.python(name)) or Path(sys.executable)


def apart(name: str) -> Runtime:
    """Return a runtime that does all its work in child processes, so that crashes stay there."""
    found = own_runtime(name)
    return remote.driven(name, found, interpreter(name, export=True), hand_over(found.takes))


def hand_over(form: Form) -> remote.HandOver:
    """Return what writes a network of that form for another process."""

    def write(net: Any, folder: Path, inputs: Inputs) -> Path:
        if form == "onnx":
            file = folder / "network.onnx"
            file.write_bytes(net.SerializeToString(deterministic=True))
            return file
        writer = own_runtime("torch_export" if form == "exported" else "torch_eager")
        return writer.export(net, folder, inputs)[0]

    return write


@cache
def metric(name: str) -> Metric:
    """Load a metric."""
    loaded = module("metrics", name)
    measure = getattr(loaded, name)
    return Metric(
        name=name,
        summary=(loaded.__doc__ or "").strip().partition("\n")[0],
        measure=measure,
        **measure.__metric__,
    )


@cache
def source(name: str) -> Source:
    """Load a source."""
    found = module("sources", name).SOURCE
    assert isinstance(found, Source)
    return found


def converted(name: str, place: Path, file: Path, *, seconds: float) -> None:
    """Let a source write what is at `place` as an ONNX file, in a child process.

    Raises:
        DependencyError: its packages are missing, and it has no environment of its own here.
        TersorError: what the source raised. TargetError: the child died, or took too long.
    """
    found = source(name)
    here = all(installed(package) for package in found.to_convert)
    python = sys.executable if here else environments.python(name)
    if python is None:
        require("sources", name, found.to_convert)
        raise AssertionError("all packages are there")
    remote.converted(name, python, place, file, seconds=seconds)


@cache
def deployment(name: str) -> Deployment:
    """Load a deployment."""
    found = module("deployments", name).DEPLOYMENT
    assert isinstance(found, Deployment)
    return found


def require(kind: str, name: str, packages: tuple[str, ...]) -> None:
    """Refuse, with the line that installs it, when a package is missing.

    Raises:
        DependencyError: one of `packages` (import names) is not installed.
    """
    for package in packages:
        if not installed(package):
            raise missing(kind, name, package)


def installed(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package.partition(".")[0]) is not None


def catalog() -> dict[str, tuple[dict[str, Any], ...]]:
    """List what exists, by kind: name, module, first line of its description; imports nothing."""
    return {
        kind: tuple(
            {"name": name, "module": dotted, "summary": _summary(dotted), "family": _family(dotted)}
            for name, dotted in names(kind).items()
        )
        for kind in KINDS
    }


def _family(dotted: str) -> str:
    return dotted.split(".")[-2] if dotted.count(".") else ""


def _summary(dotted: str) -> str:
    """Read the first line of a module's docstring without running it."""
    if dotted.startswith("tersor."):
        file: Path | None = _ROOT.joinpath(*dotted.split(".")[1:]).with_suffix(".py")
    else:
        spec = importlib.util.find_spec(dotted)
        file = Path(spec.origin) if spec and spec.origin else None
    if file is None or not file.exists():
        return ""
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def _form(hint: Any) -> Form:
    """Read a technique's form off the type of its first parameter."""
    forms: dict[str, Form] = {
        "Module": "module",
        "GraphModule": "module",
        "ExportedProgram": "exported",
        "ModelProto": "onnx",
    }
    return forms[hint.__name__]
