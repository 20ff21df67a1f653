"""write(): hand a report to the tools in which a team compares its runs."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tersor.core.artifact import Artifact
from tersor.core.errors import ArtifactError, DependencyError, RecipeError, suggest
from tersor.core.report import Report
from tersor.core.report_text import to_markdown
from tersor.core.report_view import find, headline, originals, stage_figures

EXPERIMENT = "tersor"
_TEXTS = ("report.html", "report.md", "report.zh-CN.md", "report.json")
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def write(artifact: str | Path | Artifact, to: str) -> Path:
    """Write the report of an artifact as a run of TensorBoard or MLflow, into a local folder.

    The metrics of a run are a series: step 0 is the original, step N the network after stage N; a
    stage that was dropped leaves the network as it was.

    Args:
        artifact: A folder that `compress` made.
        to: "tensorboard:FOLDER" or "mlflow:FOLDER". An earlier run of the folder stays.

    Returns:
        The folder, or the file, that the tool is to open.

    Raises:
        RecipeError: `to` is something else. ArtifactError: not an artifact, or nothing can be
            written there. DependencyError: the tool is not installed.
    """
    name, colon, place = to.partition(":")
    if name not in _WRITERS or not colon:
        raise RecipeError(
            f"a report is written to {' or '.join(f'{w}:FOLDER' for w in _WRITERS)}, got {to!r}."
            f"{suggest(name, _WRITERS)}"
        )
    if not place or "://" in place:
        raise RecipeError(f"{name} is written to a folder here, such as {name}:runs; got {to!r}")
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    _require(name)
    folder = Path(place).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _WRITERS[name](opened, folder)
    except OSError as error:
        raise ArtifactError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error


def series(report: Report) -> list[dict[str, float]]:
    """Return the metrics of the network at each step: of the original, and after each stage."""
    current = {m.metric: m.value for m in originals(report)}
    steps = [current]
    for stage, shown in zip(report.stages, stage_figures(report), strict=True):
        if stage.verdict != "dropped":
            current = {m.metric: m.value for m in shown}
        steps.append(current)
    return steps


def ends(report: Report) -> dict[str, float]:
    """Return the figures before and after, on the samples that no decision has seen."""
    found = {f"before.{m.metric}": m.value for m in report.before}
    found |= {f"after.{m.metric}": m.value for m in report.after}
    ratios = (r for r in report.ratios if find(report.after, r.metric))
    return {**found, **{f"times_better.{r.metric}": r.value for r in ratios}}


def facts(report: Report) -> dict[str, str]:
    """Return what was done, as texts: network, target, goal, steps and verdicts."""
    goal = report.recipe.get("goal")
    made = {"origin": report.origin, "target": report.target, "reached": str(report.reached)}
    if isinstance(goal, Mapping):
        made["best"] = str(goal.get("best", "latency"))
        made |= {f"limit.{name}": str(text) for name, text in dict(goal.get("limits", {})).items()}
    for number, stage in enumerate(report.stages, 1):
        made[f"stage.{number}"] = f"{stage.name}: {stage.verdict}"
    return made


def _tensorboard(artifact: Artifact, folder: Path) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    report = artifact.report
    with SummaryWriter(str(folder / _name(artifact))) as writer:
        for step, values in enumerate(series(report)):
            for name, value in values.items():
                writer.add_scalar(f"stages/{name}", value, step)
        for name, value in ends(report).items():
            writer.add_scalar(name.replace(".", "/"), value, 0)
        writer.add_text("report", to_markdown(report), 0)
    return folder


def _mlflow(artifact: Artifact, folder: Path) -> Path:
    """Write a run into MLflow's database; it refuses plain folders since version 3."""
    report = artifact.report
    database = folder / "mlflow.db"
    with _environment(_QUIET):
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{database}")
        found = client.get_experiment_by_name(EXPERIMENT)
        place = (folder / "artifacts").as_uri()
        known = found.experiment_id if found else client.create_experiment(EXPERIMENT, place)
        run = client.create_run(known, run_name=_name(artifact)).info.run_id
        client.set_tag(run, "mlflow.note.content", headline(report))
        for name, text in facts(report).items():
            client.log_param(run, name, text)
        for name, value in ends(report).items():
            client.log_metric(run, name, value)
        for step, values in enumerate(series(report)):
            for name, value in values.items():
                client.log_metric(run, f"stage.{name}", value, step=step)
        for text in _TEXTS:
            if (artifact.path / text).is_file():
                client.log_artifact(run, str(artifact.path / text))
        client.set_terminated(run)
    return database


_WRITERS: Mapping[str, Callable[[Artifact, Path], Path]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}


def _name(artifact: Artifact) -> str:
    return artifact.path.resolve().name


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "torch"),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}


def _require(name: str) -> None:
    for package in _NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            raise DependencyError(
                f"writing for {name} needs the package {package!r}. Install it with: "
                f"pip install 'tersor[{name}]'"
            )


@contextlib.contextmanager
def _environment(values: Mapping[str, Any]) -> Iterator[None]:
    """Set variables, and leave the environment as it was."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
