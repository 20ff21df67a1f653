import copy
import dataclasses
import itertools
import json
import time

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tersor import workspace
from tersor.core.artifact import Artifact
from tersor.core.context import SPLITS, Data
from tersor.core.errors import (
    ArtifactError,
    DataError,
    ModelError,
    RecipeError,
    StepError,
    TargetError,
)
from tersor.core.model import Model
from tersor.core.recipe import Recipe
from tersor.pipeline import compress, load, load_data, plan
from tests import networks

EAGER = {"runtime": "torch_eager", "options": {"threads": 1}}


def recipe(*steps, goal=None, target=EAGER):
    return Recipe.parse(
        {"steps": list(steps), "target": target, **({"goal": goal} if goal else {})}
    )


def run(tmp_path, *steps, net=None, data=None, goal=None, target=EAGER, **more):
    more.setdefault("metrics", ("size", "fidelity"))
    return compress(
        net if net is not None else networks.tiny_cnn(),
        recipe(*steps, goal=goal, target=target),
        data=data or networks.data(),
        out=tmp_path / "out",
        **more,
    )


def test_without_a_goal_every_stage_is_applied(tmp_path):
    made = run(tmp_path, "fuse_batch_norm")
    (stage,) = made.report.stages
    assert (stage.name, stage.verdict) == ("fuse_batch_norm", "applied")
    assert made.report.reached
    assert not (tmp_path / "out.work").exists()
    assert Artifact.open(tmp_path / "out", check="hashes").report == made.report
    original = Artifact.open(tmp_path / "out" / "original")
    assert original.load().bind({"x": networks.digits()[0][:2].numpy()})()["output"].shape == (
        2,
        10,
    )


class Positions(nn.Module):
    """The digits' classes as those of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.net = networks.tiny_cnn()

    def forward(self, x):
        return self.net(x)[:, None]


def positions():
    whole = networks.data()
    splits = {
        name: [{**batch, "labels": batch["labels"][:, None]} for batch in getattr(whole, name)]
        for name in SPLITS
    }
    return Data(**splits)


@pytest.mark.parametrize("net", ["classes", "positions"])
def test_every_quality_metric_is_compared_on_the_same_samples(tmp_path, net):
    one = net == "positions"
    rises = {"perplexity": "+50%"} if one else {}
    made = run(
        tmp_path,
        {"static": {"weight_bits": 4}},
        goal={"best": "size", "limits": {"f1": "-20pt", **rises}},
        metrics=() if one else ("accuracy", "auc", "quality"),
        net=Positions().eval() if one else None,
        data=positions()
        if one
        else dataclasses.replace(
            networks.data(), quality=lambda o, y: float((o.argmax(1) == y).double().mean())
        ),
    ).report
    ratios = {r.metric: r for r in made.ratios}
    before, after = ({m.metric: m for m in side} for side in (made.before, made.after))
    tests = {
        "accuracy": "McNemar's exact test",
        "auc": "normal test of the samples' differences",
        "f1": "paired bootstrap of 1000 draws",
        "perplexity": "paired bootstrap of 1000 draws",
        "quality": "paired bootstrap of 200 draws",
    }
    assert tests.keys() & before.keys() == ({"f1", *rises} if one else {*tests} - {"perplexity"})
    for name, test in tests.items():
        if name not in before:
            continue
        found = ratios[name]
        assert found.how.startswith(f"paired on the same samples: {test}, p = ")
        difference, low, high = found.difference
        assert difference == pytest.approx(after[name].value - before[name].value)
        assert low <= difference <= high
        assert found.low <= found.value <= found.high
        assert 0 < found.p <= 1
    assert (ratios["size"].difference, ratios["size"].p) == (None, None)
    for limit in made.limits:
        low, high = limit.interval
        assert low <= limit.value <= high
        wanted = before[limit.metric].value + ratios[limit.metric].difference[1]
        assert low == pytest.approx(max(0, wanted))
    bound = {limit.metric: limit.bound for limit in made.limits}
    if one:
        assert bound["perplexity"] == pytest.approx(1.5 * before["perplexity"].value)
    assert Artifact.open(tmp_path / "out").report == made


def test_a_metric_that_means_nothing_for_the_labels_is_refused(tmp_path):
    goal = {"best": "size", "limits": {"perplexity": "+2%"}}
    said = (
        r"the metric 'perplexity', 'mse' means nothing for these data: the network answers "
        r"\(2, 10\) for 2 samples, with labels \(2,\) of type int64, which are classes. Metrics "
        r"that fit: accuracy, auc, f1, top_k"
    )
    with pytest.raises(DataError, match=said):
        run(tmp_path, "fuse_batch_norm", goal=goal, metrics=("mse", "accuracy"))
    assert not list(tmp_path.iterdir())


def test_a_goal_on_energy_that_cannot_be_counted_is_refused(tmp_path, monkeypatch):
    from tersor.metrics import _counters, cpu_seconds

    monkeypatch.setattr(_counters, "_rapl", _no_counter)
    monkeypatch.setattr(cpu_seconds, "SECONDS", 0.05)
    with pytest.raises(
        TargetError,
        match=r"the goal speaks of energy; energy: unavailable: none here; in its place CPU-seconds "
        r".*\. Set the goal on cpu_seconds",
    ):
        run(tmp_path, "fuse_batch_norm", goal={"best": "energy"})
    made = run(tmp_path, "fuse_batch_norm", metrics=("size", "energy")).report
    assert [m.metric for m in made.after] == ["size", "cpu_seconds"]
    assert made.after[1].conditions["energy"] == "unavailable"
    assert any(line.startswith("energy: unavailable: none here") for line in made.warnings)


def _no_counter(powercap):
    from tersor.metrics._counters import NoCounterError

    raise NoCounterError("none here")


def test_the_callers_network_is_untouched(tmp_path):
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    modules = [type(m) for m in net.modules()]
    run(tmp_path, "fuse_batch_norm", {"finetune": {"epochs": 0.2}}, net=net)
    assert [type(m) for m in net.modules()] == modules
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_size_limit_not_reached_ends_below_the_limit(tmp_path):
    made = run(tmp_path, "fuse_batch_norm", goal={"best": "size", "limits": {"size": "1%"}})
    assert not made.report.reached
    (limit,) = made.report.limits
    assert not limit.holds
    assert limit.text == "1%"


def test_the_same_run_gives_the_same_bytes(tmp_path):
    steps = ("fuse_batch_norm", {"finetune": {"epochs": 0.5}})
    one, two = run(tmp_path / "a", *steps), run(tmp_path / "another", *steps)
    names = [file.name for file in one.model_files]
    assert names == [file.name for file in two.model_files]
    for a, b in zip(one.model_files, two.model_files, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_stopped_after_a_stage_and_resumed(tmp_path):
    steps = ("fuse_batch_norm", {"finetune": {"epochs": 0.5}})
    whole = run(tmp_path / "whole", *steps)
    state = tmp_path / "out.work" / "00" / "state.json"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *steps, should_stop=state.exists)
    assert state.exists()
    assert not (tmp_path / "out").exists()
    resumed = run(tmp_path, *steps, resume=True)
    for a, b in zip(whole.model_files, resumed.model_files, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert [s.name for s in resumed.report.stages] == ["fuse_batch_norm", "finetune"]


def test_stopped_while_training_and_resumed_from_that_step(tmp_path):
    steps = ({"finetune": {"epochs": 1.0}},)
    whole = run(tmp_path / "whole", *steps)
    asked = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *steps, should_stop=lambda: next(asked) == 4)
    (checkpoint,) = (tmp_path / "out.work" / "00.partial").rglob("finetune.safetensors")
    with safe_open(checkpoint, framework="pt") as file:
        assert file.metadata()["step"] == "3"  # asked before: the run, the stage, two steps
    resumed = run(tmp_path, *steps, resume=True)
    for a, b in zip(whole.model_files, resumed.model_files, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_run_that_fails_keeps_what_is_finished_and_says_so(tmp_path):
    def fails(net, loss, **settings):
        raise RuntimeError("no such thing")

    steps = ("fuse_batch_norm", {"finetune": {"epochs": 0.1}})
    with pytest.raises(StepError, match="no such thing") as caught:
        run(tmp_path, *steps, fit=fails)
    (note,) = caught.value.__notes__
    assert note.startswith(f"what is finished is kept in {tmp_path / 'out.work'}: once the cause")
    assert (tmp_path / "out.work" / "00" / "state.json").exists()
    run(tmp_path, *steps, resume=True)
    with pytest.raises(StepError, match="no such thing") as caught:
        run(tmp_path / "other", *steps[1:], fit=fails)
    assert not hasattr(caught.value, "__notes__")
    assert not list((tmp_path / "other").iterdir())


def test_resuming_a_run_that_ended_returns_its_artifact(tmp_path):
    made = run(tmp_path, "fuse_batch_norm")
    inode = (tmp_path / "out").stat().st_ino
    assert run(tmp_path, "fuse_batch_norm", resume=True).report == made.report
    assert (tmp_path / "out").stat().st_ino == inode


def test_resuming_into_another_finished_run_is_refused(tmp_path):
    made = run(tmp_path, "fuse_batch_norm")
    other = dataclasses.replace(networks.data(), test=networks.data().validation)
    for field, change in {
        "seed": {"seed": 1},
        "model": {"net": networks.tiny_cnn(trained=False)},
        "test": {"data": other},
    }.items():
        with pytest.raises(ArtifactError) as caught:
            run(tmp_path, "fuse_batch_norm", resume=True, **change)
        assert str(caught.value) == (
            f"cannot resume: {str(tmp_path / 'out')!r} is finished, and {field} differ from those "
            "it was made with. Choose another --out, or run without --resume to replace it"
        )
    with pytest.raises(ArtifactError, match="is finished, and recipe differ from"):
        run(tmp_path, {"finetune": {"epochs": 0.1}}, resume=True)
    assert Artifact.open(tmp_path / "out", check="hashes").report == made.report
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "fuse_batch_norm", seed=1, should_stop=lambda: True)
    replaced = run(tmp_path, "fuse_batch_norm", seed=1, resume=True)  # begun to replace it
    assert replaced.manifest["seed"] == 1


def test_resuming_something_else_names_the_field(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "fuse_batch_norm", should_stop=lambda: True)
    with pytest.raises(ArtifactError, match=r"cannot resume: seed differ from"):
        run(tmp_path, "fuse_batch_norm", resume=True, seed=1)
    with pytest.raises(ArtifactError, match=r"cannot resume: recipe differ"):
        run(tmp_path, {"finetune": {"epochs": 0.1}}, resume=True)
    with pytest.raises(ArtifactError, match=r"cannot resume: model differ"):
        run(tmp_path, "fuse_batch_norm", resume=True, net=networks.tiny_cnn(trained=False))


def test_an_altered_stage_is_found(tmp_path):
    file = tmp_path / "out.work" / "00" / "weights.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "fuse_batch_norm", should_stop=file.exists)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="was altered since it was written"):
        run(tmp_path, "fuse_batch_norm", resume=True)


def test_without_validation_half_of_test_decides(tmp_path):
    whole = networks.data()
    data = Data(calibration=whole.calibration, train=whole.train, test=whole.test)
    made = run(tmp_path, "fuse_batch_norm", data=data)
    assert any("148 of the 297 test samples" in w for w in made.report.warnings)
    assert any("only 149 samples" in w for w in made.report.warnings)


def test_a_leak_is_reported(tmp_path):
    whole = networks.data()
    data = Data(
        calibration=whole.test, train=whole.train, validation=whole.validation, test=whole.test
    )
    made = run(tmp_path, "fuse_batch_norm", data=data)
    assert any("'calibration' and 'test' hold the same samples" in w for w in made.report.warnings)


def test_missing_split_is_refused_before_work(tmp_path):
    data = Data(calibration=networks.split(0, 64), test=networks.split(1500, 1797))
    with pytest.raises(DataError, match=r"step 1 \(finetune\) needs train batches"):
        run(tmp_path, "finetune", data=data)
    assert not (tmp_path / "out.work").exists()


def test_no_labels_no_accuracy(tmp_path):
    def bare(batches):
        return [{"x": b["x"]} for b in batches]

    whole = networks.data()
    data = Data(calibration=bare(whole.calibration), test=bare(whole.test))
    with pytest.raises(DataError, match="metric 'accuracy' needs labels"):
        run(
            tmp_path,
            "fuse_batch_norm",
            data=data,
            goal={"best": "size", "limits": {"accuracy": "-1pt"}},
        )


def test_wrong_names_of_inputs(tmp_path):
    data = Data(test=[{"image": networks.digits()[0][:8], "labels": networks.digits()[1][:8]}])
    with pytest.raises(DataError, match="forward takes x; the batches hold image; missing: x"):
        run(tmp_path, "fuse_batch_norm", data=data)


def test_forward_that_fails(tmp_path):
    class Wrong(nn.Module):
        def forward(self, x):
            return x @ torch.zeros(3, 3)

    with pytest.raises(
        ModelError,
        match=r"forward of Wrong fails on the first batch \(x \(2, 1, 8, 8\)\): RuntimeError",
    ):
        run(tmp_path, "fuse_batch_norm", net=Wrong())


def test_nan_outputs_are_refused(tmp_path):
    net = networks.tiny_cnn()
    net.fc.bias.data[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        run(tmp_path, "fuse_batch_norm", net=net)


def test_a_technique_that_fails_is_named(tmp_path):
    with pytest.raises((StepError, RecipeError, ModelError, DataError), match="nothing_like_this"):
        run(tmp_path, {"static": {"layers": ["nothing_like_this"]}})


class Plain(nn.Module):
    """No residual block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean(dim=(2, 3)))


def test_a_step_that_does_not_fit_is_dropped_where_there_is_a_goal(tmp_path):
    goal = {"best": "size", "limits": {"fidelity": "-50pt"}}
    steps = ({"drop_layers": {"blocks": 1}}, "fuse_batch_norm")
    with pytest.raises(StepError, match="no residual block"):
        run(tmp_path / "no-goal", *steps, net=Plain())
    made = run(tmp_path / "goal", *steps, net=Plain(), goal=goal)
    dropped, kept = made.report.stages
    assert (dropped.verdict, dropped.attempts, dropped.measurements) == ("dropped", (), ())
    assert dropped.reason.startswith("cannot be applied: Plain has no residual block")
    assert kept.verdict == "kept"
    assert (tmp_path / "goal" / "out" / "report.html").read_text().count("cannot be applied")


def test_a_step_that_asks_too_much_is_tried_weaker(tmp_path):
    goal = {"best": "macs", "limits": {"fidelity": "-100pt"}}
    asked = {"channels": {"macs": 0.02, "multiple": 4}}
    made = run(tmp_path, asked, goal=goal, metrics=("macs", "fidelity"))
    (stage,) = made.report.stages
    assert stage.verdict == "weakened"
    assert "would empty layers" in stage.attempts[0]["reason"]


def test_repair_stands_in_the_stage_that_rounds(tmp_path):
    repaired = [{"static": {"weight_bits": 4}}, "bias_correction", {"adaround": {"steps": 20}}]
    made = run(tmp_path, "equalize", repaired, target="onnxruntime:cpu")
    levelled, rounded = made.report.stages
    assert rounded.facts["bias_correction"]["layers"] == rounded.facts["adaround"]["layers"] == 9
    assert min(m.value for m in rounded.measurements if m.metric == "fidelity") > 80
    assert levelled.facts["equalize"]["pairs"] == 3
    with pytest.raises(StepError, match=r"write them as one stage: \[static, adaround\]"):
        run(tmp_path / "apart", "static", "adaround")


def test_unknown_metric(tmp_path):
    with pytest.raises(RecipeError, match="unknown metric 'latancy'\\. Did you mean 'latency'"):
        run(tmp_path, "fuse_batch_norm", metrics=("latancy",))


def test_output_that_is_not_an_artifact_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        run(tmp_path, "fuse_batch_norm")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "out.work").exists()


def test_the_plan_does_nothing(tmp_path):
    made = plan(
        load_model(),
        recipe("fuse_batch_norm", {"finetune": {"epochs": 1}}),
        data=networks.data(),
        out=tmp_path / "o",
    )
    assert made.stages == ("fuse_batch_norm", "finetune")
    assert 0 < made.seconds[0] < made.seconds[1]
    assert made.memory_bytes > 0
    assert made.disk_bytes > 0
    assert not list(tmp_path.iterdir())


def test_the_forecast_is_of_a_warm_network_on_the_threads_asked_for(tmp_path):
    seen = []

    class Cold(nn.Module):
        """Slow for two calls: the one that tries it, and the first one that is timed."""

        def forward(self, x):
            seen.append(torch.get_num_threads())
            if len(seen) < 3:
                time.sleep(0.3)
            return x.flatten(1)[:, :10]

    before = torch.get_num_threads()
    made = plan(
        Model(net=Cold(), form="module", origin="module:test"),
        recipe("half"),
        data=networks.data(),
        metrics=("size",),
        threads=3,
        out=tmp_path / "o",
    )
    assert set(seen[1:]) == {3}
    assert torch.get_num_threads() == before
    assert made.notes[0].startswith("predicted from ")
    assert made.notes[0].endswith((" us a sample in this process", " ns a sample in this process"))


def load_model():
    from tersor.core.model import Model

    return Model(net=networks.tiny_cnn(), form="module", origin="module:test")


def test_load_and_load_data(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def net():\n    return nn.Linear(4, 2)\n\n"
        "def data():\n    b = [{'input': torch.randn(8, 4), 'labels': torch.zeros(8, dtype=torch.long)}]\n"
        "    return {'calibration': b, 'train': b, 'test': b}\n"
    )
    assert isinstance(load(f"{script}:net").net, nn.Linear)
    assert load_data(f"{script}:data").test is not None
    assert load_data("digits").train is not None
    with pytest.raises(DataError, match=r"unknown data 'digit'\. Did you mean 'digits'\?"):
        load_data("digit")


def test_fingerprint_is_of_every_field():
    net, data = networks.tiny_cnn(), networks.data()
    base = workspace.fingerprint(net, data, recipe("fuse_batch_norm"), 0, 1, 1)
    assert json.loads(json.dumps(base)) == base
    other = workspace.fingerprint(net, data, recipe("fuse_batch_norm"), 0, 8, 1)
    assert [k for k in base if base[k] != other[k]] == ["batch"]
    changed = Data(
        calibration=data.calibration,
        train=data.train,
        validation=data.validation,
        test=data.calibration,
    )
    other = workspace.fingerprint(net, changed, recipe("fuse_batch_norm"), 0, 1, 1)
    assert [k for k in base if base[k] != other[k]] == ["test"]


def stored_bytes(artifact):
    return b"".join(file.read_bytes() for file in artifact.model_files)


DISTILLED = {"distill_logits": {"epochs": 0.3}}


def test_a_teacher_of_ones_own(tmp_path):
    """It changes what is learnt, not what fidelity is measured against; it stays as it was."""
    teacher, student = networks.tiny_cnn(16), networks.tiny_cnn(8)
    before = copy.deepcopy(teacher.state_dict())
    own = run(tmp_path / "own", DISTILLED, net=copy.deepcopy(student))
    other = run(tmp_path / "other", DISTILLED, net=student, teacher=teacher, metrics=("fidelity",))
    assert stored_bytes(own) != stored_bytes(other)
    assert other.report.before[0].value == 100
    assert other.manifest["teacher"] == "module:TinyCnn"
    assert "teacher" not in own.manifest
    assert {"teacher"} <= set(other.manifest["fingerprint"])
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_a_teacher_that_does_not_fit(tmp_path):
    with pytest.raises(RecipeError, match="a teacher was given, but no step of the recipe learns"):
        run(tmp_path, "fuse_batch_norm", teacher=networks.tiny_cnn())
    fewer = networks.tiny_cnn()
    fewer.fc = torch.nn.Linear(16, 3)
    with pytest.raises(
        ModelError, match=r"TinyCnn answers in shape \(2, 3\), the network in \(2, 10\)"
    ):
        run(tmp_path, DISTILLED, teacher=fewer)
    with pytest.raises(DataError, match="forward takes input; the batches hold x; missing: input"):
        run(tmp_path, DISTILLED, teacher=torch.nn.Sequential(fewer))
    exported = Model(net=None, form="exported", origin="test")
    with pytest.raises(ModelError, match="the teacher is of form 'exported'; steps that train"):
        run(tmp_path, DISTILLED, teacher=exported)
    assert not (tmp_path / "out.work").exists()


def trained_as(tmp_path, training, **more):
    made = Recipe.parse(
        {"steps": [{"finetune": {"epochs": 0.3}}], "target": EAGER, "training": training}
    )
    found = compress(
        Model(net=networks.tiny_cnn(), form="module", origin="test"),
        made,
        data=networks.data(),
        out=tmp_path / "out",
        metrics=("size",),
        **more,
    )
    return stored_bytes(found), found


def test_settings_of_the_recipe_reach_the_trainer(tmp_path):
    plain, _ = trained_as(tmp_path / "0", {})
    for number, training in enumerate(
        (
            {"ema": 0.9},
            {"accumulate": 2},
            {"label_smoothing": 0.2},
            {"optimizer": "adamw"},
            {"clip": 0.01},
            {"decay": 0.1},
            {"warm_up": 1.0},
        )
    ):
        found, artifact = trained_as(tmp_path / f"{number + 1}", training)
        assert found != plain, training
        assert artifact.recipe["training"] == training


def test_settings_that_nothing_would_read(tmp_path):
    def own(net, loss, **_):
        return net

    with pytest.raises(
        RecipeError, match="training: ema, accumulate: these are settings of tersor"
    ):
        trained_as(tmp_path, {"ema": 0.9, "accumulate": 2}, fit=own)
    trained_as(tmp_path, {"label_smoothing": 0.1}, fit=own)  # it is in the loss
    made = Recipe.parse(
        {"steps": ["finetune"], "target": EAGER, "training": {"label_smoothing": 0.1}}
    )
    data = dataclasses.replace(networks.data(), loss=lambda net, batch: net(batch["x"]).sum())
    with pytest.raises(DataError, match=r"label_smoothing 0.1 is for the loss that tersor tells"):
        compress(networks.tiny_cnn(), made, data=data, out=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"training: emma.*|unknown field 'emma'"):
        Recipe.parse({"steps": ["finetune"], "target": EAGER, "training": {"emma": 1}})
    with pytest.raises(RecipeError, match=r"training: .*ema must be in \[0, 1\), got 2"):
        Recipe.parse({"steps": ["finetune"], "target": EAGER, "training": {"ema": 2}})


def test_one_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TargetError, match="compress is one of 2 processes, and its verdicts are"):
        run(tmp_path, "fuse_batch_norm")


def zeros_of(artifact, tmp_path):
    """Count the zeros of the matrices and kernels of a network that was stored."""
    from tersor._cli_tensors import of_file

    found = of_file(next(f for f in artifact.model_files if f.suffix == ".pt2"))
    return {c.layer: c.zeros for c in found if len(c.shape) > 1}


EXPORT = {"runtime": "torch_export", "options": {"threads": 1}}


def test_zeros_stay_through_later_stages(tmp_path):
    wanted = {n: int(0.8 * p.numel()) for n, p in networks.tiny_cnn().named_parameters() if p.dim() > 1}  # fmt: skip
    made = run(
        tmp_path,
        {"magnitude": {"sparsity": 0.8}},
        "fuse_batch_norm",
        {"finetune": {"epochs": 0.3}},
        [{"equalize": {}}, {"distill_logits": {"epochs": 0.3}}],
        target=EXPORT,
        metrics=("nonzeros",),
    )
    found = zeros_of(made, tmp_path)
    assert sorted(found.values()) == sorted(wanted.values())
    (nonzeros,) = made.report.after
    assert nonzeros.value < 0.35 * made.report.before[0].value
    assert made.report.stages[0].facts["magnitude"]["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_a_trainer_that_ignores_the_mask_is_told(tmp_path):
    def copying(net, loss, *, batches, **_):
        from tersor import trainer

        return trainer.fit(copy.deepcopy(net), loss, batches=batches, epochs=0.3)

    with pytest.raises(StepError, match=r"the trainer ignored the mask of 'conv1\.weight': \d+ of"):
        run(tmp_path, ["magnitude", {"finetune": {"epochs": 0.3}}], fit=copying)


def test_pruning_is_judged_by_what_is_not_zero(tmp_path):
    made = run(
        tmp_path,
        [{"gradual": {"sparsity": 0.7, "epochs": 2}}, {"distill_logits": {"epochs": 1}}],
        goal={"best": "nonzeros", "limits": {"accuracy": "-5pt"}},
        metrics=("accuracy",),
    )
    assert made.report.stages[0].verdict in ("kept", "weakened")
    assert made.report.reached
