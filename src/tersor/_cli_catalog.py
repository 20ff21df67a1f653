"""`tersor list` and `tersor show`: what there is, and all about one name."""

import ast
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from tersor._cli_talk import KINDS, colored, show, show_json, table
from tersor.core import environments, plugins
from tersor.core.errors import RecipeError, suggest


def listing(kind: str | None, *, as_json: bool) -> int:
    """List one kind of thing, or all."""
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"unknown kind {kind!r}.{suggest(kind, KINDS)} One of {', '.join(KINDS)}")
    found = {each: entries(each) for each in ([kind] if kind else KINDS)}
    if as_json:
        show_json(found)
        return 0
    blocks = []
    for name, rows in found.items():
        head = (name, "here", "")
        lines = [(row["name"], _state(row), row["summary"]) for row in rows]
        blocks.append(table(head, lines) if lines else f"{name}: none")
    show("\n\n".join(blocks))
    return 0


def _state(row: Mapping[str, Any]) -> str:
    return "installed" if row["installed"] else colored(row["install"], "missing")


def entries(kind: str) -> list[dict[str, Any]]:
    """Describe the plugins of a kind; imports none of their packages."""
    if kind in ("recipes", "machines"):
        return [_file_entry(kind, name) for name in _names(kind)]
    rows = []
    for entry in plugins.catalog()[kind]:
        missing = [p for p in needs(kind, entry["name"]) if not plugins.installed(p)]
        line = plugins.install_line(entry["name"], missing[0]) if missing else None
        if kind == "deployments":
            line = line or _create_line(entry["name"])
        rows.append({**entry, "installed": line is None, "install": line})
    return rows


def _create_line(deployment: str) -> str | None:
    """Say how to make the environment that a deployment needs, where it is not there."""
    name = plugins.deployment(deployment).environment
    return f"tersor doctor --create {name}" if name and not environments.python(name) else None


def needs(kind: str, name: str) -> list[str]:
    """List the packages that a plugin imports, read off its file without running it."""
    if kind == "runtimes":
        found = plugins.runtime(name)
        return list(dict.fromkeys([*found.to_export, *found.to_run]))
    spec = importlib.util.find_spec(plugins.names(kind)[name])
    if spec is None or spec.origin is None:
        return []
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    # sources and data sets import their libraries where they use them
    inside = kind in ("sources", "datasets")
    packages: dict[str, None] = {}
    for node in _imports(tree, inside):
        for dotted in _imported(node):
            top = "torch" if dotted.startswith(("tersor.ops", "tersor.trainer")) else dotted
            packages.setdefault(top.partition(".")[0])
    own = {"tersor", "numpy", "yaml", *sys.stdlib_module_names}
    return [package for package in packages if package not in own]


def _imports(tree: ast.Module, inside: bool) -> list[ast.AST]:
    if not inside:
        return list(tree.body)
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    return [node for node in ast.walk(tree) if id(node) not in skipped]


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _names(kind: str) -> list[str]:
    if kind == "recipes":
        from tersor.core.recipe import recipes

        return recipes()
    if kind == "machines":
        from tersor.core.machine import machines

        return machines()
    return list(plugins.names(kind))


def _text(kind: str, name: str) -> str:
    """Read the file of a recipe or a machine."""
    if kind == "recipes":
        from tersor.core.recipe import find

        return find(name).read_text(encoding="utf-8")
    from tersor.core.machine import file_of

    return file_of(name).read_text(encoding="utf-8")


def _file_entry(kind: str, name: str) -> dict[str, Any]:
    if kind == "machines":
        from tersor.core.machine import find

        return {"name": name, "summary": find(name).what, "installed": True, "install": None}
    lines = _text(kind, name).splitlines()
    summary = lines[0].lstrip("# ").rstrip() if lines and lines[0].startswith("#") else ""
    return {"name": name, "summary": summary, "installed": True, "install": None}


def show_name(name: str | None, *, schema: bool, as_json: bool) -> int:
    """Show all about a name, or the schema of recipes."""
    if schema:
        from tersor.core.recipe_schema import recipe_schema

        show(json.dumps(recipe_schema(), indent=1))
        return 0
    if name is None:
        raise RecipeError("give a name that `tersor list` shows, or --schema")
    known = {kind: _names(kind) for kind in KINDS}
    kinds = [kind for kind, names in known.items() if name in names]
    if not kinds:
        everything = [each for names in known.values() for each in names]
        raise RecipeError(
            f"there is nothing called {name!r}.{suggest(name, everything)} `tersor list` shows all"
        )
    found = [about(kind, name) for kind in kinds]
    if as_json:
        show_json({"found": found})
    else:
        show("\n\n".join(_written(each) for each in found))
    return 0


def about(kind: str, name: str) -> dict[str, Any]:
    """Return as plain data all that is known of a name.

    Raises:
        DependencyError: the file imports a package that is missing.
    """
    if kind in ("recipes", "machines"):
        return {"kind": kind.removesuffix("s"), "name": name, "text": _text(kind, name)}
    made: dict[str, Any] = {"kind": kind.removesuffix("s"), "name": name}
    doc = (plugins.module(kind, name).__doc__ or "").strip()
    packages = needs(kind, name)
    if kind == "techniques":
        found = plugins.technique(name)
        facts: dict[str, Any] = {
            "family": found.family,
            "form": found.form,
            "needs": list(found.needs),
            "paper": found.paper,
            "settings": settings(found.config),
        }
    elif kind == "runtimes":
        runtime = plugins.runtime(name)
        facts = {
            "form": runtime.takes,
            "devices": list(runtime.devices),
            "options": list(runtime.options),
            "to_export": list(runtime.to_export),
            "to_run": list(runtime.to_run),
        }
    elif kind == "metrics":
        metric = plugins.metric(name)
        facts = {"unit": metric.unit, "better": metric.better, "needs": list(metric.needs)}
    elif kind == "deployments":
        deployment = plugins.deployment(name)
        facts = {
            "runtimes": list(deployment.runtimes),
            "environment": deployment.environment or None,
            "check": deployment.check,
            "settings": settings(deployment.options),
        }
    elif kind == "sources":
        facts = {"suffixes": list(plugins.source(name).suffixes)}
    else:
        facts = {"packages": packages}
    missing = [package for package in packages if not plugins.installed(package)]
    install = plugins.install_line(name, missing[0]) if missing else None
    if kind == "deployments":
        install = install or _create_line(name)
    return {**made, **facts, "install": install, "text": doc}


def settings(config: type[Any]) -> list[dict[str, Any]]:
    """List the fields of a technique's config: name, type, default, description."""
    from tersor.core.recipe_schema import default_of
    from tersor.core.schema import describe, field_docs, to_plain

    docs, hints = field_docs(config), get_type_hints(config)
    return [
        {
            "name": each.name,
            "type": describe(hints[each.name]),
            "default": to_plain(default_of(each)),
            "description": docs.get(each.name, ""),
        }
        for each in dataclasses.fields(config)
    ]


def _written(found: Mapping[str, Any]) -> str:
    """Write what is known of a name for a terminal."""
    if found["kind"] in ("recipe", "machine"):
        return str(found["text"]).rstrip()
    facts = [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in found.items()
        if key not in ("kind", "name", "text", "settings") and value not in (None, [], ())
    ]
    parts = [f"{found['name']}: {found['kind']}", "", found["text"]]
    if facts:
        parts += ["", "\n".join(f"{key}: {text}" for key, text in facts)]
    if "settings" in found:
        parts += ["", _settings_table(found["settings"])]
    return "\n".join(parts)


def _settings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no settings"
    head = ("setting", "default", "type", "")
    return table(
        head,
        [(r["name"], json.dumps(r["default"]), r["type"], r["description"]) for r in rows],
    )
