"""The command line: words, help, messages, exit codes, JSON, and what it imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tersor import _cli_talk
from tersor._cli_talk import KINDS
from tersor.cli import VERBS
from tests.command import ROOT, failing, talk

# help and words


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_ends_with_an_example(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = talk(capsys, verb, "--help")
    lines = out.rstrip().splitlines()
    assert code == 0
    assert len(lines) <= 40
    assert "  Example:" in lines
    assert lines[-1].startswith("    tersor ")
    assert "--json" in out
    assert max(map(len, lines)) <= 82


def test_every_verb_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = talk(capsys, "--help")
    assert code == 0
    shown = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line[:3] == "  " + line[2:3] and line.strip()]  # fmt: skip
    assert [word for word in shown if word in VERBS] == list(VERBS)


def test_the_words_of_compress_are_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts are written against them."""
    _, out, _ = talk(capsys, "compress", "--help")
    fixed = ["data", "recipe", "target", "best", "limit", "metric", "threads", "seed"]
    for word in [*fixed, "resume", "dry-run", "batch", "out"]:
        assert f"--{word} " in out, word


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(capsys, "--version") == (0, "tersor 0.1.0\n", "")


def test_help_and_import_are_light_and_fast() -> None:
    """No torch, no numpy, no rich; the bound of 0.5 s is checked in benchmarks/startup.py."""
    for words in ([], ["--help"], ["compress", "--help"], ["--version"]):
        code = (
            "import sys\nfrom tersor.__main__ import run\n"
            f"run({words!r})\n"
            "heavy = [n for n in ('torch', 'numpy', 'rich', 'yaml', 'onnx') if n in sys.modules]\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_completion_knows_recipes_and_metrics() -> None:
    words = {"COMP_WORDS": "tersor compress x --best lat", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-c", "from tersor.__main__ import main; main()"],
        env={**os.environ, **words, "_TERSOR_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["latency"]


# mistakes in the words: 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compres"], "No such command 'compres'"),
        (["compress", "x.py:f"], "Missing option '--data'"),
        (["compress", "x.py:f", "--data", "digits", "--wrong"], "No such option: --wrong"),
        (["compress", "x.py:f", "--data", "digits", "--batch", "0"], "'--batch'"),
        (["compress", "x.py:f", "--data", "digits"], "give either --recipe or --again"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "cnn-int8"], "unknown recipe 'cnn-int8'. Did you mean 'cnn-int8-cpu'?"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--limit", "accuracy"], "--limit 'accuracy' must be METRIC=LIMIT, such as accuracy=-1pt"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--limit", "accuracy=1pt"], "--limit: limit on accuracy: '1pt': points are a loss allowed; write -1pt"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--best", "latncy"], "--best: unknown metric 'latncy'. Did you mean 'latency'?"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--target", "onnxrt"], "unknown runtime 'onnxrt'. Did you mean 'onnxruntime'?"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--target", "onnxruntime:"], "--target: target must be RUNTIME or RUNTIME:DEVICE, and may go on with ,OPTION=VALUE; got 'onnxruntime:'"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--target", "openvino:tpu"], "runtime 'openvino' has no device 'tpu'"),
        (["compress", "x.py:f", "--data", "digits", "--recipe", "nothing.yaml"], "recipe file 'nothing.yaml' does not exist"),
        (["compress", "x.py:f", "--data", "digits", "--again", "nowhere"], "artifact 'nowhere' does not exist"),
        (["measure", "x.onnx", "--metric", "latncy"], "unknown metric 'latncy'. Did you mean 'latency'?"),
        (["measure", "x.onnx"], "'x.onnx' does not exist"),
        (["compare", "a"], "give a second artifact or model file, or --aa N"),
        (["compare", "a", "b", "--gate", "quicker"], "--gate 'quicker' is neither faster nor not-slower"),
        (["compare", "a", "b"], "'a' does not exist"),
        (["run", "nowhere", "--input", "x.npz"], "artifact 'nowhere' does not exist"),
        (["list", "technique"], "unknown kind 'technique'. Did you mean 'techniques'?"),
        (["show"], "give a name that `tersor list` shows, or --schema"),
        (["show", "statik"], "there is nothing called 'statik'. Did you mean 'static'?"),
        (["inspect", "x.onnx", "--verify"], "--verify is for artifacts; 'x.onnx' is not a folder"),
        (["inspect", "x.py:f", "--data", "digits"], "--data is for --groups; give that, too"),
        (["inspect", "x.py:f", "--out", "g.svg"], "--out is for --groups; give that, too"),
        (["inspect", "x.py:f", "--groups", "--out", "g.png"], "--out 'g.png' must end in .svg, which is what is drawn"),
        (["inspect", ".", "--groups", "--data", "digits"], "--groups follows the channels of a network in Python, such as FILE.py:FACTORY; '.' is a folder"),
        (["inspect", "tersor.demo.network:trained", "--groups"], "--groups runs the network once; give --data, such as digits or FILE.py:FUNCTION"),
    ],
)  # fmt: skip
def test_mistakes_end_with_2_and_say_what_to_do(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, err = failing(capsys, *words)
    assert message in err
    assert code == 2


def test_all_unknown_metrics_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--metric", "acuracy"]
    code, err = failing(capsys, *words, "--limit", "sizes=2 MB")
    assert code == 2
    assert "--metric: unknown metric 'acuracy'. Did you mean 'accuracy'?" in err
    assert "--limit: unknown metric 'sizes'. Did you mean 'size'?" in err


def test_an_error_is_one_json_document_where_json_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, kind in [(["show", "statik"], "RecipeError"), (["list", "--x"], "NoSuchOption")]:
        code, out, err = talk(capsys, *words, "--json")
        found = json.loads(out)
        assert found["schema"] == 1
        assert found["error"]["class"] == kind
        assert found["error"]["exit_code"] == code == 2
        assert err == f"error: {found['error']['message']}\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = talk(capsys, "show", "statik", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "RecipeError" in err


def test_a_mistake_of_ours_is_told_in_two_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor import _cli_catalog

    def broken(*_: object, **__: object) -> int:
        raise KeyError("a\nb")

    monkeypatch.setattr(_cli_catalog, "listing", broken)
    code, err = failing(capsys, "list")
    assert code == 4
    assert "KeyError: 'a\\nb'\nthis is not foreseen; --debug shows where" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 4, "out of memory; use smaller batches"),
        (OSError(28, "No space left on device", "out"), 4, "No space left on device"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_failures_while_running(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tersor import _cli_catalog

    def broken(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(_cli_catalog, "listing", broken)
    found, _, err = talk(capsys, "list")
    assert found == code
    assert message in err
    assert "Traceback" not in err


def test_long_messages_are_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from tersor import _cli_catalog
    from tersor.core.errors import ModelError

    def broken(*_: object, **__: object) -> int:
        raise ModelError("one\ntwo\nthree\nfour\nfive")

    monkeypatch.setattr(_cli_catalog, "listing", broken)
    code, err = failing(capsys, "list")
    assert (code, err) == (2, "one\ntwo\n... (3 more lines; --debug shows them)\n")


# list, show, doctor


@pytest.mark.parametrize("kind", [*KINDS, ""])
def test_list(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["list", kind] if kind else ["list"]
    code, out, _ = talk(capsys, *words)
    assert code == 0
    code, raw, _ = talk(capsys, *words, "--json")
    found = json.loads(raw)
    assert found.pop("schema") == 1
    assert set(found) == ({kind} if kind else set(KINDS))
    for rows in found.values():
        assert rows
        for row in rows:
            assert row["name"] in out
            assert row["summary"]
            assert row["installed"] is (row["install"] is None)


def test_show_a_technique(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = talk(capsys, "show", "distill_logits")
    assert code == 0
    for wanted in ("family: distillation", "needs: train", "paper: arXiv:1503.02531", "epochs"):
        assert wanted in out
    _, raw, _ = talk(capsys, "show", "distill_logits", "--json")
    (found,) = json.loads(raw)["found"]
    settings = {row["name"]: row for row in found["settings"]}
    assert settings["epochs"]["default"] == 1.0
    assert settings["epochs"]["type"] == "number"
    assert all(row["description"] for row in settings.values())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cnn-int8-cpu", "steps:"),
        ("onnxruntime", "devices: cpu, cuda"),
        ("accuracy", "better: higher"),
        ("onnx", "suffixes: .onnx"),
        ("digits", "digits: dataset"),
    ],
)
def test_show_other_things(name: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = talk(capsys, "show", name)
    assert code == 0
    assert wanted in out


def test_the_schema_of_recipes_knows_techniques_and_refuses_unknown_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = talk(capsys, "show", "--schema")
    schema = json.loads(out)
    assert code == 0
    assert schema["additionalProperties"] is False
    step = schema["properties"]["steps"]["items"]["anyOf"][0]["anyOf"]
    assert "static" in step[0]["enum"]
    static = step[1]["properties"]["static"]["anyOf"][0]
    assert static["additionalProperties"] is False
    assert static["properties"]["calibrator"]["default"] == "min_max"
    assert static["properties"]["calibrator"]["description"]
    assert "onnxruntime:cpu" in schema["properties"]["target"]["anyOf"][0]["enum"]
    assert schema["properties"]["goal"]["properties"]["best"]["type"] == "string"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, raw, _ = talk(capsys, "doctor", "--json")
    found = json.loads(raw)
    assert code == (1 if found["findings"] else 0)
    assert found["usable_cores"] >= 1
    assert {row["name"] for row in found["extras"]} >= {"torch", "onnxruntime", "openvino"}
    code, out, _ = talk(capsys, "doctor")
    assert "usable of" in out
    assert ("to do: " in out) == (code == 1)


def test_doctor_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.core import plugins

    monkeypatch.setattr(plugins, "installed", lambda package: False)
    code, out, _ = talk(capsys, "doctor")
    assert code == 1
    assert "no runtime is installed" in out
    assert "pip install 'tersor[torch]'" in out


# talking


def test_colors_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert _cli_talk.colored("kept", file=Terminal()) == "\033[32mkept\033[0m"
    assert _cli_talk.colored("kept") == "kept"
    monkeypatch.setenv("NO_COLOR", "1")
    assert _cli_talk.colored("kept", file=Terminal()) == "kept"


def test_a_reader_that_goes_away_is_no_failure() -> None:
    done = subprocess.run(
        f"{sys.executable} -m tersor list | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_reference_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
