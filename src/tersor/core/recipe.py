"""Recipe and Stage: YAML and Python are the same thing.

steps:
  - [drop_layers: {latency: 0.5}, distill_logits: {epochs: 3}]     # one stage: cut and recover
  - fuse_batch_norm
  - static: {calibrator: entropy}
target: onnxruntime:cpu
goal: {best: latency, limits: {accuracy: -1pt}}
training: {ema: 0.999}
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tersor.core import plugins
from tersor.core.errors import RecipeError, TargetError, suggest
from tersor.core.goal import Goal
from tersor.core.runtime import Target
from tersor.core.schema import Mistake, Mistakes, changed, from_plain
from tersor.core.training import Training

Stage = tuple[Any, ...]
"""Configs judged together, e.g. (Channels(...), DistillLogits(...))."""
FOLDER = Path(__file__).resolve().parent.parent / "recipes"
_LARGEST, _DEEPEST = 1_000_000, 50
_NEVER_ZERO = ("ms", "s", "B", "J")
"""Units of what running and storing takes."""
_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do. Model and data are not in it; they are arguments."""

    stages: tuple[Stage, ...]
    """In order; a single step is a stage of one."""
    target: Target
    """Where the result runs."""
    goal: Goal | None = None
    """Without a goal every stage is applied as written."""
    training: Training = field(default_factory=Training)
    """How the steps that train do it."""
    file: str = field(default="recipe", compare=False)
    """What it was read from, as mistakes name it."""
    places: "Places" = field(default_factory=dict, compare=False, repr=False)
    """Line and column of what stands in that file."""

    def at(self, stage: int, step: int, text: str, *inside: str) -> str:
        """Say what is wrong with a step, and where that is: "x.yaml:3:5: step 2 (static): ...".

        Args:
            stage: Its number, from 0.
            step: Its number in the stage, from 0.
            text: What is wrong.
            inside: The setting that is wrong.
        """
        name = step_name(self.stages[stage][step])
        path: tuple[Any, ...] = ("steps", stage, step)
        if path not in self.places:  # a stage of one step is no list
            path = ("steps", stage)
        return located(
            self.file, Mistake((*path, name, *inside), text, (*path, name, *inside)), self.places
        )

    @staticmethod
    def load(path: str | Path, target: Target | None = None) -> "Recipe":
        """Read a recipe file, or a recipe of the package by its name.

        Args:
            path: Of the file, or the name.
            target: Where the recipe says none.

        Raises:
            RecipeError: `mistakes` lists every mistake with file, line and nearest name.
        """
        file = find(path)
        raw, places = read_yaml(file)
        if target is not None and isinstance(raw, Mapping):
            raw = {"target": _plain_target(target), **raw}
        return _build(raw, file.name, places)

    @staticmethod
    def parse(raw: Mapping[str, Any], where: str = "recipe") -> "Recipe":
        """Build a recipe from plain data.

        Raises:
            RecipeError: with all mistakes; `where` is named in each.
        """
        return _build(raw, where, {})

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain data, which `parse` reads back to an equal recipe."""
        plain: dict[str, Any] = {
            "steps": [
                plain_step(stage[0]) if len(stage) == 1 else [plain_step(c) for c in stage]
                for stage in self.stages
            ],
            "target": _plain_target(self.target),
        }
        if self.goal is not None:
            plain["goal"] = {"best": self.goal.best, "limits": dict(self.goal.limits)}
        if self.training != Training():
            plain["training"] = changed(self.training)
        return plain


def find(path: str | Path) -> Path:
    """Return the file of a recipe given by path or by name.

    Raises:
        RecipeError: there is neither.
    """
    return packaged(path, FOLDER, "recipe")


def recipes() -> list[str]:
    """List the names of the package's recipes."""
    return names_in(FOLDER)


def packaged(place: str | Path, folder: Path, word: str) -> Path:
    """Return a YAML file given by path, or by its name in a folder of the package.

    Args:
        place: The path or the name.
        folder: Of the package.
        word: What the files are: "recipe".

    Raises:
        RecipeError: there is neither.
    """
    file = Path(place)
    if file.suffix in (".yaml", ".yml") or file.is_file():
        if not file.is_file():
            raise RecipeError(f"{word} file {str(place)!r} does not exist")
        return file
    known = names_in(folder)
    if str(place) not in known:
        raise RecipeError(
            f"unknown {word} {str(place)!r}.{suggest(str(place), known)} "
            f"Give a .yaml file or a name that `tersor list {word}s` shows"
        )
    return folder / f"{place}.yaml"


def names_in(folder: Path) -> list[str]:
    """List the YAML files of a folder of the package by name."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def step_name(config: Any) -> str:
    """Return the name of the technique that a config belongs to."""
    return plugins.technique_of(config).name


def stage_name(stage: Stage) -> str:
    """Return a stage's name: its techniques joined by " + "."""
    return " + ".join(step_name(config) for config in stage)


def plain_step(config: Any) -> Any:
    """Return a step as it stands in a recipe: its name, or name and settings."""
    fields = changed(config)
    return {step_name(config): fields} if fields else step_name(config)


Places = Mapping[tuple[Any, ...], tuple[int, int]]
KEY = "(key)"
"""After the path of a value in `Places`: where its key is."""


def _build(raw: Any, where: str, places: Places) -> Recipe:
    mistakes = Mistakes()
    recipe = _read(raw, mistakes)
    if mistakes.found:
        raise RecipeError(*(located(where, mistake, places) for mistake in mistakes.found))
    assert recipe is not None
    return replace(recipe, file=where, places=places)


def located(where: str, mistake: Mistake, places: Places) -> str:
    """Say where a mistake is: "file.yaml:3:5: step 2 (static): bits: ..."."""
    path, text, near = mistake
    if text.startswith("unknown field"):
        near = (*near, KEY)
    while near and near not in places:
        near = near[:-1]
    at = ":{}:{}".format(*places[near]) if near in places else ""
    words = []
    rest = list(path)
    if rest[:1] == ["steps"] and len(rest) > 1:
        words.append(f"step {rest[1] + 1}")
        rest = rest[2:]
        names = [str(part) for part in rest if not isinstance(part, int)]
        if names:
            words[0] += f" ({names[0]})"
            words += names[1:]
    else:
        words += [str(part) for part in rest]
    if words and text.startswith("unknown field"):
        words = words[:-1]
    return f"{where}{at}: " + "".join(f"{word}: " for word in words) + text


def _read(raw: Any, mistakes: Mistakes) -> Recipe | None:
    if not isinstance(raw, Mapping):
        mistakes.add((), "a recipe has the keys steps, target and goal")
        return None
    known = ("steps", "target", "goal", "training")
    for key in raw:
        if key not in known:
            mistakes.add((key,), f"unknown field {key!r}.{suggest(str(key), known)}")
    steps = raw.get("steps")
    stages: list[Stage] = []
    if not isinstance(steps, (list, tuple)) or not steps:
        mistakes.add(("steps",), "expected a list of steps")
    else:
        stages = [_stage(step, ("steps", i), mistakes) for i, step in enumerate(steps)]
    target = _target(raw.get("target"), mistakes)
    goal = None
    if raw.get("goal") is not None:
        goal = from_plain(Goal, raw["goal"], ("goal",), mistakes)
        if goal is not None:
            _known_metrics(goal, mistakes)
    given = {} if raw.get("training") is None else raw["training"]
    training = from_plain(Training, given, ("training",), mistakes)
    if mistakes.found:
        return None
    assert target is not None
    assert training is not None
    return Recipe(stages=tuple(stages), target=target, goal=goal, training=training)


def _stage(raw: Any, path: tuple[Any, ...], mistakes: Mistakes) -> Stage:
    if isinstance(raw, (list, tuple)):
        if not raw:
            mistakes.add(path, "a stage needs at least one step")
        return tuple(_step(step, (*path, i), mistakes) for i, step in enumerate(raw))
    return (_step(raw, path, mistakes),)


def _step(raw: Any, path: tuple[Any, ...], mistakes: Mistakes) -> Any:
    name: Any
    fields: Any
    if isinstance(raw, str):
        name, fields = raw, {}
    elif isinstance(raw, Mapping) and len(raw) == 1:
        ((name, fields),) = raw.items()
        fields = {} if fields is None else fields
    else:
        mistakes.add(path, "a step is a name, or one name with its settings: `static: {bits: 8}`")
        return None
    try:
        found = plugins.technique(str(name))
    except RecipeError as error:
        mistakes.add(path, str(error))
        return None
    return from_plain(found.config, fields, (*path, name), mistakes)


def _target(raw: Any, mistakes: Mistakes) -> Target | None:
    if raw is None:
        mistakes.add(("target",), "expected a target such as onnxruntime:cpu")
        return None
    target: Target | None = None
    if isinstance(raw, str):
        try:
            target = Target.parse(raw)
        except ValueError as error:
            mistakes.add(("target",), str(error))
    else:
        target = from_plain(Target, raw, ("target",), mistakes)
    if target is not None:
        for at, text in _target_mistakes(target):
            mistakes.add(("target",), text, ("target", *at))
    return target


def _plain_target(target: Target) -> Any:
    if not target.options:
        return str(target)
    options = dict(target.options)
    return {"runtime": target.runtime, "device": target.device, "options": options}


def read_target(text: str | None) -> Target | None:
    """Read and check RUNTIME[:DEVICE][,OPTION=VALUE...], as the command line takes it.

    Raises:
        RecipeError: it has another form, or does not exist.
    """
    if text is None:
        return None
    try:
        made = Target.parse(text)
    except ValueError as error:
        raise RecipeError(f"--target: {error}") from error
    if ":" not in text.split(",")[0] and made.runtime in plugins.names("runtimes"):
        devices = plugins.own_runtime(made.runtime).devices
        made = made if made.device in devices else replace(made, device=devices[0])
    check_target(made)
    return made


def check_target(target: Target) -> None:
    """Refuse a target whose runtime, device or options do not exist.

    Raises:
        RecipeError: with the nearest name.
    """
    for _, text in _target_mistakes(target):
        raise RecipeError(text)


def _target_mistakes(target: Target) -> Iterator[tuple[tuple[str, ...], str]]:
    """Find what is wrong with a target; with the path of each inside it."""
    try:
        known = plugins.runtime(target.runtime)
    except RecipeError as error:
        yield ("runtime",), str(error)
        return
    if target.device not in known.devices:
        near = suggest(target.device, known.devices) or f" It has: {', '.join(known.devices)}"
        yield ("device",), f"runtime {target.runtime!r} has no device {target.device!r}.{near}"
    for name in target.options:
        if name not in known.options:
            near = suggest(name, known.options) or f" It has: {', '.join(known.options)}"
            at = ("options", name, KEY)
            yield at, f"runtime {target.runtime!r} has no option {name!r}.{near}"
    check = plugins.own_runtime(target.runtime).check
    if check is not None and target.device in known.devices:
        try:
            check(target)
        except TargetError as error:
            yield ("options",), f"{target.runtime}: {error}"
    threads = target.options.get("threads", 0)
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 0:
        place = ("options", "threads")
        yield place, f"threads must be a whole number, 0 for all cores; got {threads!r}"


def _known_metrics(goal: Goal, mistakes: Mistakes) -> None:
    known = plugins.names("metrics")
    for place, name in [("best", goal.best), *(("limits", name) for name in goal.limits)]:
        if name not in known:
            at = ("goal", place, name, KEY) if place == "limits" else ("goal", place)
            mistakes.add(("goal", place), f"unknown metric {name!r}.{suggest(name, known)}", at)
    for name, text in impossible(goal):
        mistakes.add(("goal", "limits"), text, ("goal", "limits", name))


def impossible(goal: Goal) -> Iterator[tuple[str, str]]:
    """Find limits that no network can keep, or that do not fit their metric.

    Yields:
        The metric, and what is wrong. Metrics that do not exist are passed over.
    """
    known = plugins.names("metrics")
    for name, limit in goal.parsed().items():
        if name not in known:
            continue
        metric = plugins.metric(name)
        try:
            bound = limit.bound(1.0, metric.unit, metric.better)
        except ValueError as error:
            yield name, f"limit on {name}: {error}"
            continue
        if bound <= 0 and metric.better == "lower" and metric.unit in _NEVER_ZERO:
            yield (
                name,
                f"limit on {name}: {goal.limits[name]!r} cannot be kept, since no network has a "
                f"{name} of 0; write what is allowed, such as 50% of what it has now",
            )


def read_yaml(file: Path) -> tuple[Any, dict[tuple[Any, ...], tuple[int, int]]]:
    """Read a YAML file as plain data, with the line and column of each value.

    Only plain scalars, lists and mappings: no tags, anchors, aliases or repeated keys.

    Raises:
        RecipeError: with file, line and column.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file.name}: cannot be read: {error}") from error
    if len(text) > _LARGEST:
        raise RecipeError(f"{file.name}: {len(text)} characters is too long for a recipe")
    loader = yaml.SafeLoader(text)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            at = f"{file.name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError(f"{at}: anchors and aliases are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RecipeError(f"{at}: nested too deeply")
        node = loader.get_single_node()
        places: dict[tuple[Any, ...], tuple[int, int]] = {}
        return (None if node is None else _plain(loader, node, (), places, file.name)), places
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{file.name}{at}: {problem}") from error


def _plain(
    loader: yaml.SafeLoader,
    node: Any,
    path: tuple[Any, ...],
    places: dict[tuple[Any, ...], tuple[int, int]],
    name: str,
) -> Any:
    places[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    at = f"{name}:{places[path][0]}:{places[path][1]}"
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _TAGS:
        raise RecipeError(f"{at}: the tag {node.tag!r} is not allowed")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, i), places, name) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        plain: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{at}: a key must be a plain word")
            if key.value in plain:
                line, column = key.start_mark.line + 1, key.start_mark.column + 1
                raise RecipeError(f"{name}:{line}:{column}: {key.value!r} is given twice")
            places[(*path, key.value, KEY)] = (key.start_mark.line + 1, key.start_mark.column + 1)
            plain[key.value] = _plain(loader, item, (*path, key.value), places, name)
        return plain
    if node.tag == "tag:yaml.org,2002:timestamp" or (
        isinstance(node, yaml.ScalarNode) and node.style is None and ":" in node.value
    ):
        return node.value  # 2:4 is a pattern, not 124, a number to the base of 60
    if node.tag not in _TAGS:
        raise RecipeError(f"{at}: the tag {node.tag!r} is not allowed")
    try:
        return loader.construct_object(node)
    except (ValueError, yaml.YAMLError):
        return node.value
