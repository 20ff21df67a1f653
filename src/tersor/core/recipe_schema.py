"""JSON Schema of recipe files, so that an editor completes and checks them."""

import dataclasses
from typing import Any, get_type_hints

from tersor.core import plugins
from tersor.core.goal import Goal
from tersor.core.schema import field_docs, json_schema, to_plain
from tersor.core.training import Training


def recipe_schema() -> dict[str, Any]:
    """Describe a recipe with every technique that can be imported here."""
    configs = {}
    for name in plugins.names("techniques"):
        found = plugins.technique(name)
        configs[name] = {**config_schema(found.config), "description": found.summary}
    step = {
        "anyOf": [
            {"enum": list(configs)},
            {
                "type": "object",
                "properties": {name: _or_nothing(schema) for name, schema in configs.items()},
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
        ]
    }
    stage = {"anyOf": [step, {"type": "array", "items": step, "minItems": 1}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tersor recipe",
        "type": "object",
        "required": ["steps", "target"],
        "additionalProperties": False,
        "properties": {
            "steps": {"type": "array", "items": stage, "minItems": 1},
            "target": _target(),
            "goal": config_schema(Goal),
            "training": config_schema(Training),
        },
    }


def config_schema(config: type[Any]) -> dict[str, Any]:
    """Describe a frozen dataclass, with the description and default of each field."""
    docs, hints = field_docs(config), get_type_hints(config)
    properties = {}
    for each in dataclasses.fields(config):
        made = json_schema(hints[each.name])
        if each.name in docs:
            made["description"] = docs[each.name]
        default = default_of(each)
        if default is not dataclasses.MISSING:
            made["default"] = to_plain(default)
        properties[each.name] = made
    return {"type": "object", "properties": properties, "additionalProperties": False}


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """Return a field's default, or dataclasses.MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _or_nothing(schema: dict[str, Any]) -> dict[str, Any]:
    """Allow `- name:` with nothing after it."""
    return {"anyOf": [schema, {"type": "null"}]}


def _target() -> dict[str, Any]:
    runtimes = {name: plugins.runtime(name) for name in plugins.names("runtimes")}
    short = [*runtimes, *(f"{name}:{d}" for name, r in runtimes.items() for d in r.devices)]
    options = sorted({option for runtime in runtimes.values() for option in runtime.options})
    return {
        "anyOf": [
            {"enum": short},
            {
                "type": "object",
                "required": ["runtime"],
                "additionalProperties": False,
                "properties": {
                    "runtime": {"enum": list(runtimes)},
                    "device": {"type": "string"},
                    "options": {
                        "type": "object",
                        "properties": {option: {} for option in options},
                        "additionalProperties": False,
                    },
                },
            },
        ]
    }
