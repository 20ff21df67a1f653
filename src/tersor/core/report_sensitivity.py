"""What each layer loses with each setting, as a step recorded it, and the recipe that follows.

A step that tried every layer alone records `sensitivities`, {layer: {setting: loss}}, and `recipe`,
the step with its choice: entries "layer=setting". That is all a picture needs.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import yaml

from tersor.core.report import StageReport
from tersor.core.schema import to_plain


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The losses of one step, and what it chose."""

    technique: str
    losses: Mapping[str, Mapping[str, float | None]]
    """Layer -> setting -> loss; None: not a finite number."""
    recipe: Mapping[str, Any]
    """The step to paste; empty where the step recorded none."""

    @property
    def settings(self) -> list[str]:
        """Return the settings in their order; some layers may lack some."""
        longest = max(self.losses.values(), key=len)
        return list(dict.fromkeys([*longest, *(s for own in self.losses.values() for s in own)]))

    @cached_property
    def chosen(self) -> dict[str, str]:
        """Return what the recipe says about each layer; of several entries the first that fits."""
        rules = [_parse(entry) for entry in _entries(self.recipe)]
        return {
            layer: next(value for name, value in rules if _fits(layer, name))
            for layer in self.losses
            if any(_fits(layer, name) for name, _ in rules)
        }

    def marked(self, layer: str) -> tuple[str, bool] | None:
        """Return the setting next to what was chosen for a layer, and whether it is that."""
        taken = self.chosen.get(layer)
        if taken is None:
            return None
        far, nearest = min((_distance(taken, each), each) for each in self.losses[layer])
        return (nearest, far == 0) if far < math.inf else None

    @property
    def fragment(self) -> str:
        """Return the step as YAML, an item of `steps`; empty where there is none."""
        if not self.recipe:
            return ""
        settings: Any = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None}
        dumped: str = yaml.safe_dump([self.recipe], width=80, **settings)
        return dumped.rstrip()

    def heat(self, loss: float) -> float:
        """Place a loss between the smallest, 0, and the largest, 1, on a logarithmic scale."""
        if loss <= 0:
            return 0.0
        low, high = self._ends
        return (math.log(loss) - low) / (high - low) if high > low else 1.0

    @cached_property
    def _ends(self) -> tuple[float, float]:
        logs = [math.log(v) for own in self.losses.values() for v in own.values() if v and v > 0]
        return min(logs), max(logs)


def sensitivities(stage: StageReport) -> list[Sensitivity]:
    """List what the steps of a stage recorded; facts of another shape are left alone."""
    found = []
    for technique, facts in stage.facts.items():
        plain = to_plain(facts)
        losses = plain.get("sensitivities") if isinstance(plain, dict) else None
        if _are_losses(losses):
            recipe = plain.get("recipe")
            made = recipe if isinstance(recipe, dict) else {}
            found.append(Sensitivity(technique=technique, losses=losses, recipe=made))
    return found


def _distance(a: str, b: str) -> float:
    """Return how far two settings are apart: "0.5" is "0.50"; words are equal or not."""
    try:
        return abs(float(a) - float(b))
    except ValueError:
        return 0.0 if a == b else math.inf


def _are_losses(given: Any) -> TypeGuard[dict[str, dict[str, float | None]]]:
    if not isinstance(given, dict) or not given:
        return False
    if not all(isinstance(own, dict) and own for own in given.values()):
        return False
    losses = [loss for own in given.values() for loss in own.values()]
    return all(loss is None or isinstance(loss, int | float) for loss in losses)


def _entries(recipe: Mapping[str, Any]) -> list[str]:
    """Find the entries "layer=setting" among the settings of a step."""
    lists = [v for own in recipe.values() if isinstance(own, dict) for v in own.values()]
    items = [item for each in lists if isinstance(each, list) for item in each]
    return [item for item in items if isinstance(item, str) and "=" in item]


def _parse(entry: str) -> tuple[str, str]:
    name, _, value = entry.rpartition("=")
    return name, value


def _fits(layer: str, pattern: str) -> bool:
    return layer == pattern or fnmatch.fnmatchcase(layer, pattern)
