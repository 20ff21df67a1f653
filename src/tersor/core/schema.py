"""Plain data <-> frozen dataclasses: strict, with a place for each mistake.

Plain data are None, bool, int, float, str, lists and dicts with string keys. A dataclass becomes a
dict, a tuple a list. Reading back refuses unknown fields, wrong types and values that the class's
`__post_init__` refuses, and collects all of them.
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from tersor.core.errors import suggest
from tersor.core.layers import Layers

T = TypeVar("T")


class Mistake(NamedTuple):
    """What is wrong with plain data."""

    path: tuple[Any, ...]
    """Of the value: ("steps", 2, "bits")."""
    text: str
    at: tuple[Any, ...]
    """Of the part of that value which the text is about: where a reader should look."""


class Mistakes:
    """Mistakes found so far."""

    def __init__(self) -> None:
        self.found: list[Mistake] = []

    def add(self, path: tuple[Any, ...], text: str, at: tuple[Any, ...] | None = None) -> None:
        """Note a mistake; `at` where it is about a part of what is at `path`."""
        self.found.append(Mistake(path, text, path if at is None else at))


def to_plain(value: Any) -> Any:
    """Turn dataclasses, tuples, mappings and numpy scalars into plain data."""
    if isinstance(value, Layers):
        return list(value.patterns)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (str, bool)) or value is None:
        return value
    if isinstance(value, (Sequence, set, frozenset)):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def changed(config: Any) -> dict[str, Any]:
    """Return as plain data the fields of a dataclass that differ from their default."""
    default = type(config)()
    return {
        f.name: to_plain(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(default, f.name)
    }


def from_plain(cls: type[T], raw: Any, path: tuple[Any, ...], mistakes: Mistakes) -> T | None:
    """Build `cls` from a mapping; None where there were mistakes."""
    if not isinstance(raw, Mapping):
        mistakes.add(path, f"expected fields of {cls.__name__}, got {_kind(raw)}")
        return None
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is always a dataclass here
    values: dict[str, Any] = {}
    before = len(mistakes.found)
    for key, item in raw.items():
        if key not in fields:
            mistakes.add((*path, key), f"unknown field {key!r}.{suggest(str(key), fields)}")
        else:
            values[key] = _read(hints[key], item, (*path, key), mistakes)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in raw:
            mistakes.add(path, f"field {name!r} is missing")
    if len(mistakes.found) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        mistakes.add(path, str(error), (*path, *_named(raw, str(error))))
        return None


def _named(raw: Mapping[str, Any], text: str) -> tuple[str, ...]:
    """Find the field, or the key inside one, whose name comes first in what a class said."""
    for word in re.findall(r"\w+", text):
        if word in raw:
            return (word,)
        for key, item in raw.items():
            if isinstance(item, Mapping) and word in item:
                return (key, word)
    return ()


def _read(hint: Any, raw: Any, path: tuple[Any, ...], mistakes: Mistakes) -> Any:
    """Read one value of the type `hint`; on a mistake, note it and return None."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return raw
    if hint is Layers:
        patterns = [raw] if isinstance(raw, str) else raw
        if isinstance(patterns, list) and patterns and all(isinstance(p, str) for p in patterns):
            return Layers(patterns=tuple(patterns))
        mistakes.add(path, f"expected a list of layer name patterns, got {_kind(raw)}")
        return None
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, raw, path, mistakes)  # type: ignore[arg-type]  # a dataclass type
    if origin in (Union, types.UnionType):
        if raw is None and type(None) in arguments:
            return None
        return _read_union([a for a in arguments if a is not type(None)], raw, path, mistakes)
    if origin is Literal:
        if raw in arguments and type(raw) in {type(a) for a in arguments}:
            return raw
        names = ", ".join(repr(a) for a in arguments)
        near = suggest(str(raw), [str(a) for a in arguments])
        mistakes.add(path, f"expected one of {names}, got {raw!r}{'.' if near else ''}{near}")
        return None
    if origin is tuple:
        if not isinstance(raw, (list, tuple)):
            mistakes.add(path, f"expected a list, got {_kind(raw)}")
            return None
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_read(arguments[0], x, (*path, i), mistakes) for i, x in enumerate(raw))
        if len(arguments) != len(raw):
            mistakes.add(path, f"expected {len(arguments)} values, got {len(raw)}")
            return None
        pairs = enumerate(zip(arguments, raw, strict=True))
        return tuple(_read(a, x, (*path, i), mistakes) for i, (a, x) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, Mapping):
            mistakes.add(path, f"expected a mapping, got {_kind(raw)}")
            return None
        inner = arguments[1] if arguments else Any
        return {str(k): _read(inner, x, (*path, k), mistakes) for k, x in raw.items()}
    return _read_scalar(hint, raw, path, mistakes)


def _read_union(hints: list[Any], raw: Any, path: tuple[Any, ...], mistakes: Mistakes) -> Any:
    for hint in sorted(hints, key=lambda hint: type(raw) is not hint):  # 1 stays a number, not "1"
        attempt = Mistakes()
        value = _read(hint, raw, path, attempt)
        if not attempt.found:
            return value
    if len(hints) == 1:
        return _read(hints[0], raw, path, mistakes)
    kinds = " or ".join(describe(hint) for hint in hints)
    mistakes.add(path, f"expected {kinds}, got {_kind(raw)}")
    return None


def _read_scalar(hint: Any, raw: Any, path: tuple[Any, ...], mistakes: Mistakes) -> Any:
    if hint is float and isinstance(raw, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            raw = float(raw)
        except ValueError:
            raw = str(raw)
    if hint is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        if math.isfinite(raw):
            return float(raw)
        mistakes.add(path, f"expected a finite number, got {raw}")
        return None
    if hint is str and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return str(raw)
    if hint is Path and isinstance(raw, str):
        return Path(raw)
    if isinstance(raw, bool) != (hint is bool) or not isinstance(raw, hint):
        mistakes.add(path, f"expected {describe(hint)}, got {_kind(raw)}")
        return None
    return raw


def describe(hint: Any) -> str:
    """Say a type as a reader of a recipe would: "whole number", "one of 'a', 'b'"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else describe(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is tuple:
        return f"list of {describe(arguments[0])}"
    if origin is not None:
        return "mapping"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        Layers: "list of layer patterns",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def json_schema(hint: Any) -> dict[str, Any]:
    """Describe a type as JSON Schema."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [json_schema(a) for a in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if hint is Layers:
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    if origin is tuple:
        return {"type": "array", "items": json_schema(arguments[0])}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object"}
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {f.name: json_schema(hints[f.name]) for f in dataclasses.fields(hint)},
        }
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {"type": kinds[hint]} if hint in kinds else {}


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Return the string below each field of a dataclass, by field name."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    docs: dict[str, str] = {}
    assert isinstance(body, ast.ClassDef)
    for line, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[line.target.id] = " ".join(str(after.value.value).split())
    return docs


def _kind(raw: Any) -> str:
    """Say what a plain value is, with the value where it is short."""
    if isinstance(raw, Mapping):
        return "a mapping"
    if isinstance(raw, list):
        return "a list"
    return "nothing" if raw is None else repr(raw)[:60]
