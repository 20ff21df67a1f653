"""Described machines on the command line: tables, JSON, and words that do not go together."""

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from tersor._cli_described import described
from tersor.core.errors import DataError, ModelError, RecipeError
from tests.command import failing, talk
from tests.runners import linear_onnx

CHIP = """\
name: chip
kind: microcontroller
what: a chip for this test
gops: {int8: 1}
memory_gb_s: 1
memory_bytes: 100
needs_full_int8: true
sources: [this test]
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(linear_onnx(tmp_path / "linear.onnx", width=64, classes=16))


def asked(model: str, *machines: str, **more) -> int:
    about = {"data": None, "link": None, "deadline": None, "server": None, "batch": 1}
    return described(model, machines=machines, **{**about, "as_json": False, **more})


def test_all_machines_in_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(model, "all", deadline="1s") == 0
    out = capsys.readouterr().out
    for wanted in ("raspberry-pi-5", "coral-edge-tpu", "in 1000 ms", "what buys most there"):
        assert wanted in out
    assert "1024" not in out  # 64 x 16 multiply-accumulates are told in millions
    assert "0.0 million multiply-accumulates in 1 operators" in out


def test_json_and_a_machine_of_ones_own(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chip.yaml"
    file.write_text(CHIP, encoding="utf-8")
    assert asked(model, "cortex-m7", str(file), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert [each["machine"]["name"] for each in found["machines"]] == ["cortex-m7", "chip"]
    assert found["machines"][1]["reason"].startswith("weights and activations need 0.00 MB")
    assert asked(model, str(file)) == 1
    told = capsys.readouterr()
    assert "none of these machines can run it" in told.err
    assert "chip" in told.out
    assert "cannot: weights and activations need" in told.out


def test_a_needed_step_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(model, "coral-edge-tpu") == 0
    out = capsys.readouterr().out
    assert "PCIe, up to 2 W" in out
    assert "needs static: it computes in 8-bit integers alone" in out
    assert "export for it: litert" in out


def test_a_deadline_that_nothing_meets(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(model, "cortex-m7", deadline="1us") == 1
    assert "nothing meets 0.001 ms" in capsys.readouterr().err


def test_where_to_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"link": "50Mbit,30ms", "server": "l4", "deadline": "20ms"}
    assert asked(model, "raspberry-pi-5", edge="h100", edge_link="1Gbit,1ms", **words) == 0
    out = capsys.readouterr().out
    for wanted in ("local", "cloud", "edge", "in 20 ms", "run it on the device", "nothing leaves"):
        assert wanted in out
    assert "Starting an operator is not in the figures" in " ".join(out.split())
    assert asked(model, "raspberry-pi-5", as_json=True, **words) == 0
    found = json.loads(capsys.readouterr().out)["offloading"]
    assert found["options"][0]["where"] == "local"
    assert "is not known (raspberry-pi-5)" in found["unknown"]
    assert found["deadline_ms"] == 20.0


@pytest.mark.parametrize(
    ("machines", "more", "said"),
    [
        ((), {}, "--machine names none; `tersor list machines` shows them, all takes all"),
        (("l5",), {}, "unknown machine 'l5'. Did you mean 'l4'?"),
        (("l4",), {"server": "h100"}, "--server and --edge need --link, such as"),
        (("l4",), {"link": "50Mbit,30ms"}, "--link needs --server, the machine at its other end"),
        (
            ("l4", "h100"),
            {"link": "50Mbit,30ms", "server": "h100"},
            "--link is between one device and a server; 2 machines given",
        ),
        (
            ("l4",),
            {"link": "50Mbit,30ms", "server": "h100", "edge_link": "1Gbit,1ms"},
            "--edge and --edge-link go together",
        ),
    ],
)
def test_words_that_do_not_go_together(machines, more, said: str, model: str) -> None:
    with pytest.raises(RecipeError) as caught:
        asked(model, *machines, **more)
    assert said in str(caught.value)


def test_networks_that_cannot_be_counted(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        asked(str(tmp_path / "none.onnx"), "l4")
    with pytest.raises(DataError, match="give --data"):
        asked("tersor.demo.network:trained", "l4")


def test_machines_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = talk(capsys, "list", "machines")
    assert code == 0
    assert "Raspberry Pi 5, 8 GB" in out
    code, out, _ = talk(capsys, "show", "tpu-v5e")
    assert code == 0
    assert "https://docs.cloud.google.com/tpu/docs/v5e" in out
    code, said = failing(capsys, "show", "tpu-v5")
    assert code == 2
    assert "Did you mean 'tpu-v5e'?" in said
