"""`tersor compress` on a real network: plan, report, limits, Ctrl-C and --resume."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import ROOT, failing, fresh, talk


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A user's own file: a network and data."""
    file = tmp_path / "mine.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests import networks\n\n"
        "def net():\n    return networks.tiny_cnn(trained=False)\n\n"
        "def data():\n    made = networks.data()\n"
        "    names = ('calibration', 'train', 'validation', 'test')\n"
        "    return {name: getattr(made, name) for name in names}\n"
    )
    (tmp_path / "quick.yaml").write_text("steps: [fuse_batch_norm, fuse_batch_norm]\ntarget: torch_eager\n")  # fmt: skip
    return file


def job(script: Path, *more: str) -> list[str]:
    folder = script.parent
    return [
        "compress", f"{script}:net", "--data", f"{script}:data", "--recipe", str(folder / "quick.yaml"),
        "--threads", "1", "--out", str(folder / "out"), *more,
    ]  # fmt: skip


def test_dry_run(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, raw, _ = talk(capsys, *job(script, "--dry-run", "--json", "--limit", "size=90%"))
    plan = json.loads(raw)["plan"]
    assert code == 0
    assert plan["stages"] == ["fuse_batch_norm", "fuse_batch_norm"]
    assert "size" in plan["metrics"]
    assert plan["disk_bytes"] > 0
    code, out, _ = talk(capsys, *job(script, "--dry-run"))
    assert "fuse_batch_norm > fuse_batch_norm" in out
    assert not (script.parent / "out").exists()


def test_a_recipe_without_a_target_takes_the_one_of_the_words(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (script.parent / "quick.yaml").write_text("steps: [fuse_batch_norm]\n")
    code, err = failing(capsys, *job(script, "--dry-run"))
    assert code == 2
    assert "quick.yaml:1:1: target: expected a target such as onnxruntime:cpu" in err
    code, _, _ = talk(capsys, *job(script, "--dry-run", "--target", "torch_eager"))
    assert code == 0


@pytest.mark.slow
def test_compress_prints_the_report_and_repeats_itself(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = script.parent / "out"
    code, raw, err = talk(capsys, *job(script, "--json", "--metric", "accuracy", "--seed", "5"))
    assert code == 0, err
    found = json.loads(raw)
    assert found == json.loads((out / "report.json").read_text())
    assert found["schema"] == 1
    assert [stage["verdict"] for stage in found["stages"]] == ["applied", "applied"]
    assert {m["metric"] for m in found["before"]} >= {"size", "latency", "fidelity", "accuracy"}
    assert set(found["stages"][0]) >= {"name", "verdict", "reason", "measurements", "seconds"}
    assert found["command"].endswith("--metric accuracy --seed 5")
    assert (out / "report.html").is_file()
    again = ["compress", f"{script}:net", "--data", f"{script}:data", "--again", str(out)]
    code, raw, err = talk(capsys, *again, "--out", str(script.parent / "second"), "--json")
    assert code == 0, err
    assert json.loads(raw)["recipe"] == found["recipe"]
    first = (out / "weights.safetensors").read_bytes()
    assert (script.parent / "second" / "weights.safetensors").read_bytes() == first


@pytest.mark.slow
def test_a_missed_limit_ends_with_1_and_the_artifact_is_there(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = talk(capsys, *job(script, "--best", "size", "--limit", "size=1 kB"))
    assert code == 1
    assert "limit size 1 kB: not reached" in out
    assert (script.parent / "out" / "manifest.json").is_file()


@pytest.mark.slow
def test_ctrl_c_stops_where_little_is_lost_and_says_how_to_go_on(script: Path) -> None:
    words = job(script)
    process = subprocess.Popen(
        [sys.executable, "-m", "tersor", *words, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    work = script.parent / "out.work"
    deadline = time.monotonic() + 120
    while not (work / "original").exists():  # the handler is in place by then
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    said = json.loads(out)
    assert said["interrupted"]
    assert said["resume"].startswith("tersor compress")
    assert said["resume"].endswith("--resume")
    assert "waiting for: " in err
    assert "Ctrl-C again stops at once; --resume then goes on" in err
    assert "interrupted; go on with:\ntersor compress" in err
    assert err.rstrip().endswith("--resume")
    assert (work / "fingerprint.json").is_file()
    assert not (script.parent / "out").exists()
    resumed = fresh(*words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (script.parent / "out" / "report.html").is_file()


def test_a_teacher_from_the_words(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = script.parent
    (folder / "quick.yaml").write_text(
        "steps: [{distill_logits: {epochs: 0.2}}]\ntarget: torch_eager\ntraining: {ema: 0.9}\n"
    )
    with script.open("a") as file:
        file.write("\ndef teacher():\n    return networks.tiny_cnn(16, trained=False)\n")
    code, err = failing(capsys, *job(script, "--teacher-weights", "x.safetensors"))
    assert (code, err) == (2, "--teacher-weights are those of a teacher; give it with --teacher\n")
    code, _, _ = talk(capsys, *job(script, "--teacher", f"{script}:teacher"))
    assert code == 0
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["teacher"].endswith("mine.py:teacher")
    assert manifest["recipe"]["training"] == {"ema": 0.9}
    words = job(script)
    at = words.index("--recipe")
    again = [*words[:at], "--again", str(folder / "out"), *words[at + 2 :]]
    code, err = failing(capsys, *again)
    assert code == 2
    assert err.startswith(f"the run in {folder / 'out'} learnt from ")
    assert err.endswith("mine.py:teacher; give it again with --teacher\n")
