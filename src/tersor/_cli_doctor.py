"""`tersor doctor`: this machine, its packages, and what to do about them."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from tersor._cli_talk import colored, paragraph, show, show_json, table, tell
from tersor.core import environments, plugins
from tersor.core.hardware import Machine, environment, preflight, probe
from tersor.ops import native

_PACKAGES = ("torch", "onnxruntime", "onnx", "openvino", "safetensors", "scikit-learn", "pillow")
_IMPORTS = {"scikit-learn": "sklearn", "pillow": "PIL"}


def doctor(*, as_json: bool) -> int:
    """Look at the machine.

    Returns:
        The exit code: 1 where there is something to do.
    """
    machine = probe()
    packages = [_package(name) for name in _PACKAGES]
    findings = [*_findings(), *preflight(machine)]
    kernel = native.build()
    if as_json:
        show_json(
            {
                **environment(),
                "extras": packages,
                "environments": _environments(),
                "findings": findings,
                "usable_cores": machine.usable,
                "sparse_kernel": {"built": kernel.library is not None, "note": kernel.note},
            }
        )
        return 1 if findings else 0
    show(table(("machine", ""), [*_machine(machine), ("sparse kernel", _sparse(kernel))]))
    show()
    rows = [
        (p["name"], p["version"] or colored("missing"), p["install"] or "", ", ".join(p["for"]))
        for p in packages
    ]
    show(table(("package", "version", "", "for"), rows))
    show()
    apart = [
        (
            e["name"],
            colored(e["state"]) if e["state"] == "missing" else e["state"],
            e["create"] or "",
        )
        for e in _environments()
    ]
    if apart:
        show(table(("environment", "", ""), apart))
        show()
    for text in findings:
        show(paragraph(f"to do: {text}", ""))
    if not findings:
        show("all is well")
    return 1 if findings else 0


def create(names: Sequence[str], *, as_json: bool) -> int:
    """Make environments.

    Returns:
        The exit code, 0.
    """
    wanted = environments.known() if "all" in names else tuple(dict.fromkeys(names))
    made = {name: str(environments.create(name, tell)) for name in wanted}
    if as_json:
        show_json({"environments": made})
    else:
        show(table(("environment", "folder"), list(made.items())))
    return 0


def _environments() -> list[dict[str, Any]]:
    """Say which environments there are, and which are older than this version wants."""
    found = []
    for name in environments.known():
        here = environments.python(name) is not None
        state = "missing" if not here else "old" if environments.stale(name) else "ready"
        line = None if state == "ready" else f"tersor doctor --create {name}"
        found.append({"name": name, "state": state, "create": line})
    return found


def _package(name: str) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    module = _IMPORTS.get(name, name)
    install = None if version else plugins.install_line(name, name)
    return {"name": name, "version": version, "install": install, "for": _users(module)}


def _users(package: str) -> list[str]:
    """List what needs a package: runtimes by name, else the kind of thing."""
    from tersor._cli_catalog import needs

    users = []
    for name in plugins.names("runtimes"):
        found = plugins.runtime(name)
        words = [w for w, p in (("export", found.to_export), ("run", found.to_run)) if package in p]
        if words:
            users.append(f"{name} ({' and '.join(words)})")
    for kind in ("sources", "datasets"):
        users += [f"{kind[:-1]} {n}" for n in plugins.names(kind) if package in needs(kind, n)]
    if package == "torch":
        users.insert(0, "compress")
    return users


def _findings() -> list[str]:
    """Say what is missing for the main job."""
    found = []
    if not plugins.installed("torch"):
        line = plugins.install_line("torch", "torch")
        found.append(f"torch is missing: this machine can run artifacts, not make them; {line}")
    runnable = [
        name
        for name in plugins.names("runtimes")
        if all(plugins.installed(package) for package in plugins.runtime(name).to_run)
    ]
    if not runnable:
        line = plugins.install_line("onnxruntime", "onnxruntime")
        found.append(f"no runtime is installed, so nothing can be measured or run; {line}")
    return found


def _machine(machine: Machine) -> Sequence[tuple[str, str]]:
    from tersor.core.report_words import human

    caches = ", ".join(f"{name} {human(size, 'B')}" for name, size in machine.caches.items())
    memory = human(machine.memory_bytes, "B") if machine.memory_bytes else "unknown"
    free = f", {human(machine.available_bytes, 'B')} free" if machine.available_bytes else ""
    load = "unknown" if machine.load_1min is None else f"{machine.load_1min:.2f}"
    quota = "" if machine.quota is None else f", quota {machine.quota:g}"
    return [
        ("processor", f"{machine.cpu} ({machine.architecture})"),
        ("cores", f"{machine.usable} usable of {machine.cores}{quota}"),
        ("instructions", ", ".join(machine.flags) or "none that matter here"),
        ("int8", _int8(machine.flags)),
        ("caches", caches or "unknown"),
        ("memory", f"{memory}{free}"),
        ("load average", load),
    ]


def _sparse(kernel: native.Build) -> str:
    """Say what executes sparse layers."""
    if kernel.library is not None:
        return kernel.note
    return f"none, sparse layers run on torch's, which seldom pays: {kernel.note}"


def _int8(flags: Sequence[str]) -> str:
    """Say what the instructions mean for the most used number format."""
    fast = [f for f in ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp") if f in flags]
    if fast:
        return f"fast: {fast[0]}"
    return "no dot-product instructions: int8 gains less here, measure before you believe"
