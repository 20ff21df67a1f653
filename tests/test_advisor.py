"""advise(): every suggestion was tried; ranges, what is left out and why, and what follows it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor import _advice, advisor
from tersor._advice import facts_of, packers, quantizers
from tersor._cli_advise import nothing
from tersor._trying import Brief, Refusal, _behind
from tersor.advisor import advise, together, usual_goal
from tersor.core.context import Data
from tersor.core.errors import DataError, ModelError, RecipeError
from tersor.core.goal import Goal
from tersor.core.model import Model
from tersor.core.recipe import Recipe, stage_name
from tersor.core.runtime import Target
from tersor.trainer import fit
from tests import networks
from tests.command import failing, talk

EAGER = Target(runtime="torch_eager", options={"threads": 1})
SIZE = Goal(best="size", limits={"accuracy": "-5pt"})


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisor, "TRIED_S", 0.5)


def module(net: nn.Module | None = None) -> Model:
    return Model(net=net or networks.tiny_cnn(), form="module", origin="test")


def loss(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(net(batch["x"]), batch["labels"])


def test_ranges_multiply_and_their_halves_add_as_errors_do() -> None:
    low, high = together([(1.0, 4.0), (1.0, 4.0)])
    assert low * high == pytest.approx(4.0 * 4.0)
    assert math.log(high / low) == pytest.approx(math.sqrt(2) * math.log(4.0))
    assert together([]) == (1.0, 1.0)


def test_a_brief_training_stops_in_time_and_knows_how_long_a_pass_takes() -> None:
    taken: list[float] = []

    def counting(net: nn.Module, given: Any, *, batches: Any, epochs: float, **more: Any) -> Any:
        taken.append(epochs * len(batches))
        return fit(net, given, batches=batches, epochs=epochs, threads=1, **more)

    net, batches = networks.tiny_cnn(trained=False), networks.split(0, 1200) * 50
    brief = Brief(counting, seconds=0.2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    made = brief(net, loss, batches=batches, epochs=3.0, checkpoint=Path("not written"))
    assert taken[0] == 3  # timed on these, with a copy
    assert 1 <= taken[1] < 3 * len(batches)
    assert brief.epoch_s > 0
    assert brief.epochs == pytest.approx(taken[1] / len(batches))
    assert any(not torch.equal(before[k], v) for k, v in made.state_dict().items())


def test_the_usual_goal_depends_on_the_labels() -> None:
    assert usual_goal(networks.data()).limits == {"accuracy": "-1pt"}
    bare = Data(test=[{"x": networks.digits()[0][:8]}])
    assert usual_goal(bare).limits == {"fidelity": "99"}
    assert usual_goal(bare).best == "latency"


def test_smaller_files_without_training() -> None:
    found = advise(module(), networks.data(), target=EAGER, goal=SIZE, minutes=0)
    assert any("--minutes leaves no time" in each.reason for each in found.refusals)
    data = replace(networks.data(), train=None)
    found = advise(module(), data, target=EAGER, goal=SIZE)
    *_, fewer, last = found.suggestions
    assert [stage_name(each.stage) for each in (fewer, last)] == ["weight_only", "pack"]
    assert 1.5 < fewer.gain[0] < fewer.gain[1] <= 2 * fewer.gain[0]
    assert 1.0 < last.gain[0] < last.gain[1]
    assert "size" in fewer.seen
    assert "size" in last.seen
    reasons = [each.reason for each in found.refusals]
    assert "a smaller network needs training, and the data have no train batches" in reasons
    assert any("size is " in text and "x worse than what is taken" in text for text in reasons)
    parsed = Recipe.parse(found.recipe)
    assert parsed.stages == tuple(each.stage for each in found.suggestions)
    assert parsed.goal == SIZE
    assert len(found.predicted) == len(parsed.stages)


@pytest.mark.slow
def test_a_limit_on_size_is_reached_whatever_is_to_improve() -> None:
    goal = Goal(best="latency", limits={"size": "60%"})
    found = advise(module(), replace(networks.data(), train=None), target=EAGER, goal=goal)
    steps = [stage_name(each.stage) for each in found.suggestions]
    tried = [stage_name(each.stage) for each in (*found.suggestions, *found.refusals)]
    assert tried.count("weight_only") >= 2
    assert {"weight_only", "static", "dynamic"} & set(steps)


def test_a_limit_on_size_asks_for_fewer_bits_and_packing() -> None:
    def steps(goal: Goal) -> set[str]:
        facts = facts_of(
            networks.tiny_cnn(trained=False),
            networks.inputs(),
            {},
            EAGER,
            networks.data(),
            goal,
            1.0,
        )
        return {stage_name(idea.stage) for idea in (*quantizers(facts), *packers(facts))}

    assert {"weight_only", "static", "pack"} <= steps(Goal(limits={"size": "50%"}))
    assert {"weight_only", "static", "pack"} <= steps(Goal(best="size"))
    assert not {"weight_only", "pack"} & steps(Goal())


def test_what_is_left_out_is_compared_with_what_there_is() -> None:
    assert _behind("latency", False, 0.0, 1.134) == "latency is 1.13x worse than without it"
    assert _behind("latency", True, 0.0, 1.134) == "latency is 1.13x worse than what is taken"
    assert _behind("size", True, 0.0, 1.001) == "size is no better than what is taken"
    assert _behind("latency", True, 0.2, 0.5) == "further from the limits than what is taken"


def test_nothing_that_pays_is_told_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = tuple(
        Refusal(stage=(_advice.config(name, **more),), reason=f"no {name}")
        for name, more in (("static", {}), ("weight_only", {"bits": 4}))
    )
    advice = advisor.Advice(
        subject="x", target="onnxruntime:cpu", goal=Goal(limits={"size": "50%"}), batch=1, threads=1,
        words=(), suggestions=(), refusals=refusals, recipe={}, gain=(1.0, 1.0), seconds=1.0,
    )  # fmt: skip
    error = nothing(advice)
    assert str(error) == (
        "advise found nothing that pays for the goal {'best': 'latency', 'limits': {'size': '50%'}}; "
        "what was tried is above. Allow more by --limit, or time for training by --minutes"
    )
    told = capsys.readouterr().err.splitlines()
    assert told == ["  static: no static", "  weight_only (bits 4): no weight_only"]


@pytest.mark.slow
def test_a_smaller_network_that_recovers_comes_first() -> None:
    goal = Goal(best="latency", limits={"accuracy": "-10pt"})
    target = Target(runtime="onnxruntime", options={"threads": 1})
    found = advise(module(networks.tiny_cnn(16)), networks.data(), target=target, goal=goal)
    names = [stage_name(each.stage) for each in found.suggestions]
    assert names[0] in ("drop_layers + distill_logits", "channels + distill_logits")
    assert "static" in names
    assert found.words
    assert all(low < high <= 2 * low for low, high in found.predicted)


def test_what_cannot_be_asked() -> None:
    data = networks.data()
    with pytest.raises(RecipeError, match=r"latency, throughput, size, not accuracy"):
        advise(module(), data, target=EAGER, goal=Goal(best="accuracy"))
    with pytest.raises(ModelError, match=r"takes a network in Python; .* form 'onnx'"):
        advise(Model(net=None, form="onnx", origin="x"), data, target=EAGER)
    with pytest.raises(DataError, match="no split 'test'"):
        advise(module(), replace(data, test=None), target=EAGER)


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    root = Path(__file__).resolve().parent.parent
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(root)!r})\n"
        "from tests import networks\n\ndef net():\n    return networks.tiny_cnn()\n\n"
        "def data():\n    made = networks.data()\n"
        "    return {n: getattr(made, n) for n in ('calibration', 'validation', 'test')}\n"
    )
    return str(file)


def job(script: str) -> list[str]:
    words = [f"{script}:net", "--data", f"{script}:data", "--threads", "1"]
    return [*words, "--target", "torch_eager"]


def test_the_verb_and_the_recipe_auto(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = job(script)
    words += ["--best", "size", "--limit", "accuracy=-5pt"]
    file = tmp_path / "found.yaml"
    code, raw, _ = talk(capsys, "advise", *words, "--out", str(file), "--json")
    assert code == 0
    advice = json.loads(raw)["advice"]
    fewer, packed = advice["suggestions"][-2:]
    assert "weight_only" in str(fewer["stage"])
    assert packed["stage"] == ["pack"]
    assert Recipe.load(file).plain() == advice["recipe"]
    code, out, _ = talk(capsys, "advise", *words)
    assert "weight_only: " in out
    assert "together: " in out
    assert "--recipe auto" in out
    out_dir = tmp_path / "out"
    code, out, err = talk(capsys, "compress", *words, "--recipe", "auto", "--out", str(out_dir))
    assert code == 0
    assert "trying what may help" in err
    assert "was predicted" in out
    assert not (tmp_path / "out.advice.json").exists()
    report = json.loads((out_dir / "report.json").read_text())
    (stage,) = [s for s in report["stages"] if s["name"] == "weight_only"]
    assert stage["predicted"] == pytest.approx(fewer["gain"], rel=0.05)
    code, out, err = talk(capsys, "compress", *words, "--recipe", "auto", "--out", str(out_dir), "--resume")  # fmt: skip
    assert code == 0  # done already: nothing is tried again
    assert "trying" not in err
    other = [*words[:-1], "accuracy=-4pt"]
    code, err = failing(capsys, "compress", *other, "--recipe", "auto", "--out", str(out_dir), "--resume")  # fmt: skip
    assert code == 2
    assert (
        "was given for another goal or target (target torch_eager:cpu, goal {'best': 'size'" in err
    )


def test_a_resumed_run_follows_the_same_advice(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = job(script)
    target = {"runtime": "torch_eager", "device": "cpu", "options": {"threads": 1}}
    recipe = {"steps": ["fuse_batch_norm"], "target": target, "goal": {"best": "size"}}
    words += ["--best", "size"]
    kept = {"recipe": recipe, "predicted": [[1.0, 1.5]], "minutes": 3.0}
    (tmp_path / "out.advice.json").write_text(json.dumps(kept))
    out = tmp_path / "out"
    (tmp_path / "bad.advice.json").write_text("{")
    code, err = failing(capsys, "compress", *words, "--recipe", "auto", "--out", str(tmp_path / "bad"), "--resume")  # fmt: skip
    assert code == 2
    assert "bad.advice.json is damaged; run again without --resume" in err
    auto = ["compress", *words, "--recipe", "auto", "--out", str(out), "--resume"]
    code, err = failing(capsys, *auto, "--minutes", "9")
    assert code == 2
    assert "was given for --minutes 3, not 9. Leave --minutes out" in err
    code, _, err = talk(capsys, *auto)
    assert code == 0
    assert "trying" not in err
    report = json.loads((out / "report.json").read_text())
    assert report["command"].endswith("--minutes 3")
    (stage,) = report["stages"]
    assert (stage["name"], stage["predicted"]) == ("fuse_batch_norm", [1.0, 1.5])
    code, _, err = talk(capsys, *auto, "--minutes", "9")
    assert code == 0
    assert "had ended; --minutes 9 changes nothing" in err


def test_only_auto_takes_minutes(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = failing(capsys, "compress", *job(script), "--recipe", "demo", "--minutes", "5")
    assert code == 2
    assert "--minutes is what --recipe auto may train; a recipe says it by its epochs" in err


def test_it_stops_between_trials() -> None:
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 1

    data = replace(networks.data(), train=None)
    with pytest.raises(KeyboardInterrupt):
        advise(module(), data, target=EAGER, goal=SIZE, should_stop=should_stop)
    assert len(asked) == 2


def test_the_verb_says_what_is_wrong(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["advise", f"{script}:net", "--data", f"{script}:data"]
    code, err = failing(capsys, *words, "--out", str(tmp_path / "x.json"))
    assert (code, err) == (2, f"--out '{tmp_path / 'x.json'}' must end in .yaml\n")
    code, err = failing(capsys, *words, "--machine", "l4", "--best", "size")
    assert code == 2
    assert "with --machine nothing is tried, so that --best has no meaning" in err
    code, err = failing(capsys, words[0], words[1])
    assert code == 2
    assert "give --data DATA, or a --machine to predict for" in err
    code, err = failing(capsys, *words, "--best", "accuracy")
    assert code == 2
    assert "advise knows how to improve latency, throughput, size, not accuracy" in err
