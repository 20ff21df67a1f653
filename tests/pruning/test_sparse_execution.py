"""Sparse execution: which layers are converted, given what races found, and that they run so."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.candidate import arrays_of, export
from tersor.core.errors import ModelError, RecipeError, TargetError, UnfitError
from tersor.core.layers import Layers
from tersor.core.runtime import Target
from tersor.ops import sparse_race
from tersor.ops.sparse import SparseConv2d, SparseLinear
from tersor.ops.sparse_race import Race, Shape, Speed
from tersor.pruning.sparse_execution import SparseExecution, sparse_execution
from tests import networks


@pytest.fixture
def raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine on which convolutions win from 80 % zeros on, against torch alone from 60 %."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[Any] = []

    def against(times: float) -> Speed:
        verdict = "faster" if times > 1 else "slower"
        return Speed(dense_ms=times, times=times, low=times, high=times, verdict=verdict)

    def race(shape: Shape, zeros: Any, threads: int) -> list[Race]:
        asked.append((shape, list(zeros), threads))
        (z,) = zeros
        wins = 1 if shape.kind == "conv2d" else 0.1
        found = {"torch": against(wins * (1.5 if z >= 60 else 0.5))}
        found["onnxruntime"] = against(wins * (1.4 if z >= 80 else 0.6))
        return [
            Race(
                shape=shape,
                zeros=z,
                threads=threads,
                sparse_ms=1.0,
                executor="our kernel",
                against=found,
            )
        ]

    monkeypatch.setattr(sparse_race, "race", race)
    return asked


def on(context: Any, runtime: str = "torch_eager", **changes: Any) -> Any:
    return replace(context, target=Target(runtime=runtime, options={"threads": 1}), **changes)


def kinds(net: nn.Module) -> dict[str, type]:
    return {
        n: type(m) for n, m in net.named_modules() if isinstance(m, (SparseConv2d, SparseLinear))
    }


def test_layers_that_win_are_converted_and_the_others_say_why(
    raced: list[Any], tiny_context: Any
) -> None:
    net = networks.sparse_cnn(0.9)
    context = on(tiny_context(net), batch=8)
    x = networks.digits()[0][:5]
    wanted = net(x)
    made = sparse_execution(copy.deepcopy(net), SparseExecution(), context)
    found = kinds(made)
    assert found["block2.conv1"] is SparseConv2d
    assert "fc" not in found
    torch.testing.assert_close(made(x), wanted)
    facts = context.facts
    assert facts["dense"] == {
        "fc": "linear 16 -> 10, batch 8: slower at 90 % zeros: sparse 1.000 ms, dense 0.140 ms (onnxruntime): 0.14x as fast (0.14 to 0.14)"
    }
    told = facts["layers"]["block2.conv1"]
    assert told["shape"] == "convolution 3x3 stride 2x2 8 -> 16 on 8x8, batch 8"
    assert told["executed"] == "sparse"
    assert told["zeros"] in (89, 90)
    assert set(told["against"]) == {"torch", "onnxruntime"}
    assert all(threads == 1 for _, _, threads in raced)
    shapes = [shape for shape, _, _ in raced]
    assert len(shapes) == len(set(map(str, shapes))), "a shape was measured twice"


def test_what_has_to_be_beaten_can_be_chosen(raced: list[Any], tiny_context: Any) -> None:
    net = networks.sparse_cnn(0.7)
    with pytest.raises(
        UnfitError, match=r"all layers stay dense \(.*conv.*: slower at .* % zeros.*onnxruntime"
    ):
        sparse_execution(copy.deepcopy(net), SparseExecution(), on(tiny_context(net)))
    made = sparse_execution(net, SparseExecution(against="target"), on(tiny_context(net)))
    assert SparseConv2d in kinds(made).values()


def test_few_zeros_need_no_race(raced: list[Any], tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(
        UnfitError, match=r"all layers stay dense .*: 0 % zeros, below min_zeros 50 %"
    ):
        sparse_execution(net, SparseExecution(), on(tiny_context(net)))
    assert raced == []


def test_layers_can_be_chosen(raced: list[Any], tiny_context: Any) -> None:
    net = networks.sparse_cnn()
    context = on(tiny_context(net))
    config = SparseExecution(layers=Layers(patterns=("block2.*",)), convert="all")
    made = sparse_execution(copy.deepcopy(net), config, context)
    assert set(kinds(made)) == {"block2.conv1", "block2.conv2", "block2.shortcut"}
    assert context.facts["dense"]["fc"] == "excluded by layers"
    assert raced == []
    with pytest.raises(RecipeError, match=r"pattern 'blok2\.\*' matches no layer"):
        sparse_execution(net, SparseExecution(layers=Layers(patterns=("blok2.*",))), context)


@pytest.mark.parametrize("runtime", ["torch_eager", "torch_export"])
def test_it_runs_on_the_target_with_a_free_batch(
    runtime: str, raced: list[Any], tiny_context: Any, tmp_path: Path
) -> None:
    net = networks.sparse_cnn()
    context = on(tiny_context(net), runtime)
    made = sparse_execution(copy.deepcopy(net), SparseExecution(convert="all"), context)
    sample = arrays_of(networks.split(0, 8)[0], ["x"])
    candidate = export(made, tmp_path / "files", networks.inputs(), context.target, sample)
    for batch in (1, 3, 8):
        found = next(iter(candidate.runner.bind({"x": sample["x"][:batch]})().values()))
        wanted = net(torch.from_numpy(sample["x"][:batch])).detach().numpy()
        assert np.abs(found - wanted).max() < 1e-4
    candidate.close()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_without_the_operator_is_refused(
    runtime: str, raced: list[Any], tiny_context: Any
) -> None:
    net = networks.sparse_cnn()
    with pytest.raises(
        TargetError,
        match=f"{runtime}:cpu has no operator for sparse weights: .* use one of the runtimes torch_eager, torch_export on the cpu",
    ):
        sparse_execution(net, SparseExecution(), on(tiny_context(net), runtime))
    gpu = replace(tiny_context(net), target=Target(runtime="torch_eager", device="cuda"))
    with pytest.raises(TargetError, match="torch_eager:cuda has no operator for sparse weights"):
        sparse_execution(net, SparseExecution(), gpu)


def test_bad_settings_and_weights(raced: list[Any], tiny_context: Any) -> None:
    with pytest.raises(ValueError, match=r"min_zeros must be in \(0, 1\), got 1"):
        SparseExecution(min_zeros=1)
    net = networks.sparse_cnn()
    net.fc.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelError, match="layer 'fc' has weights that are NaN or infinite"):
        sparse_execution(net, SparseExecution(), on(tiny_context(net)))
    assert kinds(net) == {}
    assert all(
        torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in net.state_dict().items()
    )


def test_projections_of_attention_and_positions(raced: list[Any], tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data[torch.rand_like(layer.weight) < 0.9] = 0
    context = on(tiny_context(net), batch=2)
    with pytest.raises(UnfitError, match="fc1: linear 32 -> 64 on 8 positions, batch 2: slower"):
        sparse_execution(net, SparseExecution(layers=Layers(patterns=("fc1",))), context)


@pytest.mark.slow
def test_the_pipeline_keeps_a_network_dense_and_says_why(raced: list[Any], tmp_path: Path) -> None:
    from tersor.core.goal import Goal
    from tersor.core.model import Model
    from tersor.core.recipe import Recipe
    from tersor.pipeline import compress

    net = networks.sparse_cnn(0.7)
    artifact = compress(
        Model(net=net, form="module", origin="test"),
        Recipe(
            stages=((SparseExecution(),),),
            target=Target(runtime="torch_eager", options={"threads": 1}),
            goal=Goal(best="latency"),
        ),
        data=networks.data(),
        out=tmp_path / "out",
        metrics=("latency",),
    )
    (stage,) = artifact.report.stages
    assert stage.verdict == "dropped"
    assert stage.reason.startswith("cannot be applied: all layers stay dense (")
    assert "slower at 6" in stage.reason or "slower at 7" in stage.reason
