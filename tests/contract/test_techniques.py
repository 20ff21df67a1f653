"""What every technique promises, over the whole catalogue. A new file needs no entry here."""

import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tersor.candidate import arrays_of, export
from tersor.core import plugins
from tersor.core.context import Data
from tersor.core.errors import DataError, UnfitError
from tersor.core.metric import Measurement
from tersor.core.model import Model, may_lower
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.core.schema import field_docs, to_plain
from tersor.ops.edits import replay, store
from tersor.ops.lower import form_of
from tersor.ops.notes import notes_of
from tersor.plan import check
from tests import networks
from tests.contract.subjects import FACTORIES, TARGETS, TECHNIQUES, applied, apply, outputs, quick

FAST_RUNTIMES = ("onnxruntime", "torch_eager")
every_technique = pytest.mark.parametrize("name", TECHNIQUES)


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def test_names_are_unique_over_the_folders() -> None:
    root = Path(plugins.__file__).parent.parent
    files = [f.stem for family in plugins.FAMILIES for f in (root / family).glob("[!_]*.py")]
    assert len(files) == len(set(files))
    assert set(files) <= set(TECHNIQUES)


@every_technique
def test_name_is_file_family_is_folder(name: str) -> None:
    found = plugins.technique(name)
    file = Path(inspect.getfile(found.apply))
    assert (found.name, found.family) == (file.stem, file.parent.name)
    assert found.apply.__name__ == name
    assert found.config.__name__ == camel(name)
    assert found.config.__module__ == found.apply.__module__


@every_technique
def test_config_is_frozen_keyword_only_with_defaults_and_field_docs(name: str) -> None:
    config = plugins.technique(name).config
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]  # set by dataclass
    fields = dataclasses.fields(config)
    assert all(field.kw_only for field in fields)
    assert config() == config()
    docs = field_docs(config)
    for field in fields:
        assert docs.get(field.name, "").strip(), f"{name}.{field.name} has no string below it"
    assert (config.__doc__ or "").strip()
    assert not config.__doc__.startswith(f"{config.__name__}("), (
        "the docstring is the generated one"
    )


@every_technique
def test_yaml_and_python_are_the_same(name: str) -> None:
    config = plugins.technique(name).config()
    target = Target(runtime="onnxruntime")
    python = Recipe(stages=((config,),), target=target)
    spelled_out = {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    for step in (name, {name: None}, {name: spelled_out}):
        text = yaml.safe_dump({"steps": [step], "target": "onnxruntime:cpu"})
        assert Recipe.parse(yaml.safe_load(text)) == python
    other = Recipe(stages=((quick(plugins.technique(name)),),), target=target)
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(other.plain()))) == other


@every_technique
def test_is_described(name: str) -> None:
    found = plugins.technique(name)
    listed = {entry["name"]: entry["summary"] for entry in plugins.catalog()["techniques"]}
    assert found.summary == listed[name]
    assert 10 < len(found.summary) <= 120
    assert found.summary.endswith(".")
    if found.paper is not None:
        assert re.search(r"arXiv:\d{4}\.\d{4,5}|[A-Z].*\d{4}", found.paper), found.paper


@every_technique
def test_keeps_the_shape_of_the_outputs(name: str) -> None:
    """On one sample and on many; with exactly what it says that it needs (subjects.honest_context)."""
    done = applied(name)
    if form_of(done.result) == "onnx":
        return  # the runtime checks the shapes
    for batch in (1, 4):
        made = outputs(done.result, batch)
        assert made.shape == outputs(done.original, batch).shape
        assert torch.isfinite(made).all()
    if isinstance(done.result, nn.Module):
        found = outputs(done.result)
        assert torch.equal(outputs(done.result.eval()), found), "left in training mode"


@every_technique
def test_leaves_the_callers_network_untouched(name: str) -> None:
    done = applied(name)
    after = done.original.state_dict()
    assert list(after) == list(done.before)
    for key, tensor in after.items():
        assert torch.equal(tensor, done.before[key]), key
    assert not any(layer.training for layer in done.original.modules())
    assert not any(
        layer._forward_hooks or layer._forward_pre_hooks for layer in done.original.modules()
    )


@every_technique
def test_a_seed_decides_everything(name: str) -> None:
    done = applied(name)
    if not isinstance(done.result, nn.Module):
        pytest.skip("not a module")
    again = apply(name, done.kind, done.config, done.after)
    first, second = done.result.state_dict(), again.result.state_dict()
    assert list(first) == list(second)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@every_technique
def test_result_deep_copies(name: str) -> None:
    result = applied(name).result
    if not isinstance(result, nn.Module):
        pytest.skip("not a module")
    assert torch.equal(outputs(copy.deepcopy(result)), outputs(result))


@every_technique
def test_result_is_stored_and_replayed(name: str, tmp_path: Path) -> None:
    done = applied(name)
    if not isinstance(done.result, nn.Module):
        pytest.skip("not a module")
    store(done.result, done.original, tmp_path)
    again = replay(tmp_path, copy.deepcopy(done.original))
    assert torch.equal(outputs(again), outputs(done.result))
    (tmp_path / "twice").mkdir()
    store(again, done.original, tmp_path / "twice")
    first, second = (
        json.loads((f / "network.json").read_text()) for f in (tmp_path, tmp_path / "twice")
    )
    assert first == second
    assert (tmp_path / "twice/weights.safetensors").read_bytes() == (
        tmp_path / "weights.safetensors"
    ).read_bytes()


def runs_on(done: Any, runtime: str, tmp_path: Path) -> None:
    found = plugins.runtime(runtime)
    missing = [p for p in (*found.to_export, *found.to_run) if not plugins.installed(p)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    if not may_lower(form_of(done.result), found.takes):
        pytest.skip(f"{runtime} takes {found.takes}")
    if runtime in done.refused:
        pytest.skip(f"the technique says that {runtime} cannot")
    precision = notes_of(done.result).get("precision")
    if precision and "precision" not in found.options:
        pytest.skip(f"{runtime} cannot be told a precision")
    sample = arrays_of(networks.split(0, 8)[0], ["x"])
    target = Target(runtime=runtime, options={"threads": 1})
    candidate = export(done.result, tmp_path, networks.inputs(), target, sample)
    try:
        for batch in (1, 8):
            arrays = {"x": sample["x"][:batch]}
            made = next(iter(candidate.runner.bind(arrays)().values()))
            assert made.shape == (batch, 10)
    finally:
        candidate.close()


@pytest.mark.parametrize("runtime", FAST_RUNTIMES)
@every_technique
def test_lowers_and_runs(name: str, runtime: str, tmp_path: Path) -> None:
    """`export` compares the outputs with the network in memory."""
    runs_on(applied(name), runtime, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", list(plugins.names("runtimes")))
@pytest.mark.parametrize("kind", list(FACTORIES))
@every_technique
def test_lowers_and_runs_everywhere(name: str, kind: str, runtime: str, tmp_path: Path) -> None:
    try:
        done = apply(name, kind, after=applied(name).after)
    except UnfitError:
        if applied(name).kind == kind:
            raise
        pytest.skip(f"nothing to do in the {kind}")
    runs_on(done, runtime, tmp_path)


@every_technique
def test_what_it_needs_is_asked_for_before_any_work(name: str, tmp_path: Path) -> None:
    found = plugins.technique(name)
    splits = [need for need in found.needs if need in ("calibration", "train", "validation")]
    model = Model(net=networks.tiny_cnn(trained=False), form="module", origin="test")
    config = found.config()
    here = "torch_eager" if hasattr(config, "check_target") else "onnxruntime"
    recipe = Recipe(stages=((config,),), target=Target(runtime=here))
    whole = networks.data()
    for missing in splits:
        data = dataclasses.replace(whole, **{missing: None})
        with pytest.raises(DataError, match=rf"step 1 \({name}\) needs {missing} batches"):
            check(model, recipe, data, ("size",), tmp_path / "out")
    if "labels" in found.needs:
        bare = {
            s: [{"x": b["x"]} for b in getattr(whole, s)]
            for s in ("calibration", "train", "validation", "test")
        }
        with pytest.raises(DataError, match=rf"step 1 \({name}\) needs labels"):
            check(model, recipe, Data(**bare), ("size",), tmp_path / "out")
    check(model, recipe, whole, ("size",), tmp_path / "out")


@pytest.mark.slow
@every_technique
def test_the_pipeline_leaves_the_callers_network_untouched(name: str, tmp_path: Path) -> None:
    from tersor.pipeline import compress

    done = applied(name)
    net = copy.deepcopy(done.original)
    structure = [(path, type(layer)) for path, layer in net.named_modules()]
    model = Model(net=net, form="module", origin="test")
    before = () if done.after is None else (plugins.technique(done.after).config(),)
    recipe = Recipe(
        stages=((*before, done.config),),
        target=Target(runtime="onnxruntime", options={"threads": 1}),
    )
    able = next(runtime for runtime in TARGETS if runtime not in done.refused)
    recipe = dataclasses.replace(recipe, target=Target(runtime=able, options={"threads": 1}))
    artifact = compress(
        model, recipe, data=networks.data(), out=tmp_path / "out", metrics=("size",)
    )
    assert isinstance(artifact.report.after[0], Measurement)
    assert [(path, type(layer)) for path, layer in net.named_modules()] == structure
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, done.before[key]), key
