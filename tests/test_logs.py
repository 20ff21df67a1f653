"""write(): runs that the tools themselves can read back; bad words refused before anything is made."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from tersor import logs
from tersor.core.artifact import Artifact
from tersor.core.errors import ArtifactError, DependencyError, RecipeError
from tests.command import failing, talk
from tests.core.artifacts import write
from tests.core.report_sample import report

ABSENT = [n for n in ("tensorboard", "mlflow") if importlib.util.find_spec(n) is None]


@pytest.fixture
def made(tmp_path: Path) -> Artifact:
    return write(tmp_path / "out", report=report())


def test_a_dropped_stage_leaves_the_series_where_it_was() -> None:
    steps = logs.series(report())
    assert len(steps) == 5
    assert steps[0] == {"latency": 2.28, "size": 3_460_000, "accuracy": 89.0}
    assert steps[3] == steps[2]  # weight_only was dropped
    assert steps[4]["size"] == 690_000
    assert steps[4]["latency"] == pytest.approx(2.28 / 1.64 / 1.02 / 2.25)


def test_ends_and_facts() -> None:
    found = logs.ends(report())
    assert found["before.accuracy"] == 88.86
    assert found["after.size"] == 690_000
    assert found["times_better.latency"] == 3.85
    said = logs.facts(report())
    assert said["stage.3"] == "weight_only: dropped"
    assert said["limit.accuracy"] == "-1pt"


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("tensorbord:x", "got 'tensorbord:x'. Did you mean 'tensorboard'?"),
        ("tensorboard", "a report is written to tensorboard:FOLDER or mlflow:FOLDER, got"),
        ("mlflow:", "mlflow is written to a folder here, such as mlflow:runs; got 'mlflow:'"),
        ("mlflow:http://x", "mlflow is written to a folder here, such as mlflow:runs; got"),
    ],
)
def test_bad_places(to: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        logs.write(tmp_path / "nothing", to)
    assert words in str(caught.value)


def test_a_folder_that_holds_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    code, err = failing(
        capsys, "log", str(tmp_path / "empty"), "--to", f"tensorboard:{tmp_path / 'runs'}"
    )
    assert code == 2
    assert "empty' is not an artifact or is incomplete: it has no manifest.json" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not ABSENT, reason="both tools are installed")
def test_a_tool_that_is_not_installed(made: Artifact, tmp_path: Path) -> None:
    for name in ABSENT:
        with pytest.raises(DependencyError) as caught:
            logs.write(made, f"{name}:{tmp_path / 'runs'}")
        assert str(caught.value) == (
            f"writing for {name} needs the package {name!r}. Install it with: "
            f"pip install 'tersor[{name}]'"
        )
    assert not (tmp_path / "runs").exists()


def test_tensorboard_reads_it_back(
    made: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = f"tensorboard:{tmp_path / 'runs'}"
    code, out, _ = talk(capsys, "log", str(made.path), "--to", place, "--json")
    assert code == 0
    assert json.loads(out)["log"]["look"] == f"tensorboard --logdir {tmp_path / 'runs'}"
    events = EventAccumulator(str(tmp_path / "runs" / "out"))
    events.Reload()
    accuracy = [(each.step, each.value) for each in events.Scalars("stages/accuracy")]
    assert accuracy == [(n, pytest.approx(v)) for n, v in enumerate((89, 88.4, 88.4, 88.4, 88.3))]
    assert events.Scalars("after/size")[0].value == 690_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")
def test_mlflow_reads_it_back(made: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    before = dict(os.environ)
    database = logs.write(made, f"mlflow:{tmp_path / 'runs'}")
    logs.write(made, f"mlflow:{tmp_path / 'runs'}")  # a second run beside the first
    assert dict(os.environ) == before
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    known = client.get_experiment_by_name(logs.EXPERIMENT)
    first, second = client.search_runs([known.experiment_id])
    assert first.data.params == second.data.params == logs.facts(report())
    assert first.data.metrics["after.accuracy"] == 88.1
    history = client.get_metric_history(first.info.run_id, "stage.accuracy")
    assert [each.value for each in history] == [89.0, 88.4, 88.4, 88.4, 88.3]


def test_a_place_that_cannot_be_written(made: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write '.*file/runs': Not a directory"):
        logs.write(made, f"tensorboard:{tmp_path / 'file' / 'runs'}")
