"""The command line: exit codes, messages, JSON, help, and what it imports."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor import _cli_talk
from tersor.__main__ import run
from tersor.cli import KINDS, VERBS

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = str(ROOT / "tests" / "networks.py")


def talk(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command line here; returns exit code, stdout, stderr."""
    code = run(words)
    done = capsys.readouterr()
    return code, done.out, done.err


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run words that fail; returns exit code and message, checked to be short and no traceback."""
    code, out, err = talk(capsys, *words)
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    return code, err.removeprefix("error: ")


def fresh(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a new interpreter."""
    command = [sys.executable, "-m", "tersor", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=more.pop("cwd", ROOT), **more
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact: a tiny network exported to ONNX Runtime, with a report."""
    from tersor.core.artifact import write_artifact
    from tersor.core.runtime import Target
    from tersor.ops.lower import lower
    from tersor.runtimes.onnxruntime import RUNTIME
    from tests import networks
    from tests.core.report_sample import report

    folder = tmp_path_factory.mktemp("cli")
    net, inputs = networks.tiny_cnn(trained=False), networks.inputs()
    files = RUNTIME.export(lower(net, "onnx", inputs), folder, inputs)
    entry = {"shape": [2, 1, 8, 8], "dtype": "float32", "dynamic": {"0": "batch"}}
    out = folder / "out"
    manifest = {
        "recipe": {"steps": ["fuse_batch_norm"], "target": "onnxruntime:cpu"},
        "target": Target(runtime="onnxruntime", options={"threads": 1}),
        "origin": "module:tests",
        "inputs": {"x": entry},
        "seed": 3,
    }
    write_artifact(out, files=files, manifest=manifest, report=report())
    return out


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
    for (
        word
    ) in "data recipe target best limit metric threads seed resume dry-run batch out".split():
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
        (["compress", "x.py:f", "--data", "digits", "--recipe", "demo", "--target", "onnxruntime:"], "--target: target must be RUNTIME or RUNTIME:DEVICE, got 'onnxruntime:'"),
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


def test_a_missing_package_ends_with_3_and_the_line_to_paste(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:  # fmt: skip
    from tersor.core import plugins

    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), np.float32))
    there = plugins.installed
    monkeypatch.setattr(plugins, "installed", lambda p: p != "onnxruntime" and there(p))
    code, err = failing(capsys, "run", str(artifact), "--input", str(tmp_path / "x.npz"))
    assert code == 3
    assert "pip install 'tersor[onnxruntime]'" in err
    _, out, _ = talk(capsys, "list", "runtimes", "--json")
    states = {row["name"]: row["installed"] for row in json.loads(out)["runtimes"]}
    assert states["onnxruntime"] is False
    assert states["torch_eager"] is True


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


# run, inspect, measure, compare on a real artifact


def test_run(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    words = ["run", str(artifact), "--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz")]  # fmt: skip
    code, out, err = talk(capsys, *words, "--json")
    assert (code, err) == (0, "")
    (entry,) = json.loads(out)["outputs"]
    assert entry["shape"] == [5, 10]
    with np.load(tmp_path / "y.npz", allow_pickle=False) as made:
        y = made[entry["name"]]
    from tersor.core.artifact import Artifact

    expected = next(iter(Artifact.open(artifact).load(threads=1).bind({"x": x})().values()))
    np.testing.assert_array_equal(y, expected)


def test_run_works_where_torch_is_not_installed(artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), np.float32))
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'safetensors', 'sklearn'): sys.modules[name] = None\n"
        "from tersor.__main__ import main\n"
        f"main(['run', {str(artifact)!r}, '--input', {str(tmp_path / 'x.npz')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1x10" in done.stdout


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((1, 1, 8, 8), "f")}, "the network takes x; the file holds y."),
        ({}, "the file holds nothing"),
        ({"x": np.zeros((1, 3, 8, 8), "f")}, "input 'x' must have the shape (batch, 1, 8, 8), got (1, 3, 8, 8)"),
        ({"x": np.zeros((64,), "f")}, "input 'x' must have the shape (batch, 1, 8, 8), got (64,)"),
        ({"x": np.zeros((1, 1, 8, 8), "complex64")}, "input 'x' must be of type float32, got complex64"),
    ],
)  # fmt: skip
def test_run_refuses_arrays_that_do_not_fit(
    arrays: dict[str, np.ndarray], message: str, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    code, err = failing(capsys, "run", str(artifact), "--input", str(tmp_path / "x.npz"))
    assert code == 2
    assert message in err


def test_run_refuses_pickles_bombs_and_other_files(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zipfile

    np.savez(tmp_path / "objects.npz", x=np.array([print], dtype=object))
    (tmp_path / "text.npz").write_text("<html>")
    (tmp_path / "empty.npz").write_bytes(b"")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"  # fmt: skip
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as pack:
        pack.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name, message in [
        ("objects.npz", "holds Python objects; save plain arrays"),
        ("text.npz", "is not a .npz file of plain arrays"),
        ("empty.npz", "is not a .npz file of plain arrays"),
        ("huge.npz", "claims the shape (1000000, 1000000), more than it holds"),
        ("absent.npz", "does not exist"),
    ]:
        code, err = failing(capsys, "run", str(artifact), "--input", str(tmp_path / name))
        assert code == 2
        assert message in err, name


def test_run_leaves_no_half_written_output(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), "f"))
    words = ["run", str(artifact), "--input", str(tmp_path / "x.npz"), "--output"]
    code, err = failing(capsys, *words, str(tmp_path / "no" / "y.npz"))
    assert code == 2
    assert "the folder of --output" in err
    (tmp_path / "y.npz").mkdir()
    code, err = failing(capsys, *words, str(tmp_path / "y.npz"))
    assert code == 2
    assert "cannot be written" in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.npz", "y.npz"]


def test_inspect_an_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = talk(capsys, "inspect", str(artifact))
    assert code == 0
    assert "x float32 (batch, 1, 8, 8)" in out
    assert "dropped" in out
    _, raw, _ = talk(capsys, "inspect", str(artifact), "--verify", "--json")
    found = json.loads(raw)
    assert found["schema"] == 1
    assert found["verified"] is True
    assert sum(layer["parameters"] for layer in found["layers"]) == found["numbers"] > 5000
    assert all(0 <= layer["sparsity"] <= 1 for layer in found["layers"])


def test_inspect_finds_an_altered_file(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    file = copy / json.loads((copy / "manifest.json").read_text())["model"][0]
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    code, err = failing(capsys, "inspect", str(copy), "--verify")
    assert code == 2
    assert "was altered" in err


def test_inspect_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    code, raw, _ = talk(capsys, "inspect", f"{NETWORKS}:TinyCnn", "--json")
    found = json.loads(raw)
    assert code == 0
    first = found["layers"][0]
    assert (first["name"], first["kind"], first["shape"]) == ("conv1", "Conv2d", [8, 1, 3, 3])
    assert first["parameters"] == 72
    assert found["form"] == "module"


def test_constants_of_openvino_and_safetensors_files(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from tersor._cli_tensors import of_file

    weight = torch.tensor([[0.0, 1.0], [-0.0, 2.0]])
    save_file({"a.weight": weight.bfloat16(), "a.bias": weight[0].clone()}, tmp_path / "w.safetensors")  # fmt: skip
    found = {(c.layer, c.dtype): c for c in of_file(tmp_path / "w.safetensors")}
    assert found["a", "bfloat16"].zeros == 2
    assert found["a", "float32"].size_bytes == 8
    (tmp_path / "m.bin").write_bytes(np.array([0, 3, 0, 4], np.int8).tobytes())
    layer = '<layer id="0" name="w" type="Const"><data element_type="i8" shape="2,2" offset="{}" size="4"/></layer>'  # fmt: skip
    (tmp_path / "m.xml").write_text(f"<net><layers>{layer.format(0)}</layers></net>")
    (only,) = of_file(tmp_path / "m.xml")
    assert (only.layer, only.shape, only.dtype, only.zeros) == ("w", (2, 2), "int8", 2)
    (tmp_path / "m.xml").write_text(f"<net><layers>{layer.format(1)}</layers></net>")
    from tersor.core.errors import ModelError

    with pytest.raises(ModelError, match=r"m\.xml: constant 'w' lies outside the \.bin"):
        of_file(tmp_path / "m.xml")


def test_measure_an_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, raw, _ = talk(capsys, "measure", str(artifact), "--metric", "size", "--json")
    (size,) = json.loads(raw)["measurements"]
    assert code == 0
    assert size["value"] == (artifact / "model.onnx").stat().st_size
    _, out, _ = talk(capsys, "measure", str(artifact), "--metric", "size")
    assert "kB" in out


def test_measure_refuses_another_runtime(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    code, err = failing(capsys, "measure", str(artifact), "--target", "openvino")
    assert code == 4
    assert "was made for onnxruntime:cpu" in err


def test_measuring_a_network_in_python_asks_for_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = failing(capsys, "measure", f"{NETWORKS}:TinyCnn")
    assert code == 2
    assert "give --data" in err


def test_compare(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(artifact), str(artifact), "--budget", "0.2", "--threads", "1"]
    code, raw, _ = talk(capsys, *words, "--json", "--min-effect", "0.9")
    found = json.loads(raw)["comparison"]
    assert code == 0
    assert found["verdict"] == "no difference"
    assert found["low"] <= found["speedup"] <= found["high"]
    assert len(found["samples"]["a"]) == found["blocks"]
    code, out, _ = talk(capsys, *words, "--gate", "faster", "--min-effect", "0.9")
    assert code == 1
    assert "no difference: B is" in out


# the whole job


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A user's own file: a network and data."""
    file = tmp_path / "mine.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests import networks\n\n"
        "def net():\n    return networks.tiny_cnn()\n\n"
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
    assert "quick.yaml: target: expected a target such as onnxruntime:cpu" in err
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
def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(script: Path) -> None:
    words = job(script)
    process = subprocess.Popen(
        [sys.executable, "-m", "tersor", *words], stderr=subprocess.PIPE, text=True
    )
    work = script.parent / "out.work"
    deadline = time.monotonic() + 120
    while not (work / "original").exists():  # the handler is in place by then
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopping after this step; Ctrl-C again stops now" in err
    assert "interrupted; go on with:\ntersor compress" in err
    assert err.rstrip().endswith("--resume")
    assert (work / "00").is_dir()
    assert not (work / "01").exists()
    resumed = fresh(*words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (script.parent / "out" / "report.html").is_file()


# talking


def test_ctrl_c_once_asks_and_twice_stops(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with _cli_talk.interruptible() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step; Ctrl-C again stops now" in capfd.readouterr().err


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    track = _cli_talk.Progress()
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_runs_no_thread_and_clears_up() -> None:
    code = (
        "import sys, threading\n"
        "sys.stderr.isatty = lambda: True\n"
        "from tersor._cli_talk import Progress\n"
        "track = Progress()\n"
        "for outer in track(range(2), 'stages'):\n"
        "    for inner in track(iter(range(3)), 'batches', 3):\n"
        "        assert threading.active_count() == 1, threading.enumerate()\n"
        "assert track.live is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TERM": "xterm"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


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
        f"{sys.executable} -m tersor show --schema | head -c 10",
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
