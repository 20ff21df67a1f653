"""Which layers are decomposed, how far, and why others are not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tersor
from tersor.candidate import arrays_of, export
from tersor.core import plugins
from tersor.core.context import Data
from tersor.core.errors import DataError, RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.decomposition.activation_svd import ActivationSvd, activation_svd
from tersor.decomposition.cp import Cp, cp
from tersor.decomposition.grouped_convolution import GroupedConvolution, grouped_convolution
from tersor.decomposition.spatial_svd import SpatialSvd, spatial_svd
from tersor.decomposition.svd import Svd, svd
from tersor.decomposition.tucker import Tucker, tucker
from tersor.distillation.distill_logits import DistillLogits
from tersor.ops.edits import replay, store
from tersor.quantization.static import Static, static
from tests import networks
from tests.decomposition.single import Single, context, single, slower, weights

CONFIGS = (Svd, ActivationSvd, SpatialSvd, Tucker, Cp, GroupedConvolution)


def cnn_context(net: nn.Module, folder: Path, **changes: Any) -> Any:
    return networks.context(net, folder, **{"latency": weights, **changes})


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_shares_are_checked(config: Any) -> None:
    with pytest.raises(ValueError, match=r"^macs must be in \(0, 1\), got 1.5$"):
        config(macs=1.5)
    with pytest.raises(ValueError, match=r"^energy must be in \(0, 1\], got 0$"):
        config(energy=0)
    with pytest.raises(ValueError, match=r"^give one of energy, .*, not energy and macs$"):
        config(energy=0.9, macs=0.5)


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Svd(rank=0)
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        Svd(multiple=0)
    with pytest.raises(ValueError, match=r"ranks must be at least 1, got \[0, 3\]"):
        Tucker(ranks=(0, 3))
    with pytest.raises(ValueError, match="not vbmf and ranks"):
        Tucker(vbmf=True, ranks=(2, 3))
    with pytest.raises(ValueError, match="groups must be at least 2, with form grouped; got 4"):
        GroupedConvolution(groups=4)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        ActivationSvd(samples=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_weaker_ends(config: Any) -> None:
    assert config(macs=0.5).weaker() == config(macs=0.65)
    assert config(energy=0.9).weaker() == config(energy=0.95)
    assert config(macs=0.94).weaker() is None
    assert config().weaker() == config(macs=0.79)


def test_a_given_rank_has_nothing_weaker() -> None:
    assert Svd(rank=3).weaker() is None
    assert Tucker(vbmf=True).weaker() is None
    assert GroupedConvolution(multiplier=2).weaker() is None


# --- what is chosen -----------------------------------------------------------------------------


def test_what_is_not_faster_stays_and_says_why(tmp_path: Path) -> None:
    net, x = single(lambda: nn.Conv2d(16, 16, 3, padding=1))
    given = context(net, x, tmp_path, latency=slower)
    with pytest.raises(
        UnfitError,
        match=r"^no layer gets cheaper on the target \(layer: rank 4x4 is not faster: 3\.0000 ms, the layer 1\.0000\)$",
    ) as caught:
        tucker(copy.deepcopy(net), Tucker(ranks=(4, 4)), given)
    assert not caught.value.too_strong


def test_energy_takes_the_cheapest_rank_that_keeps_it(tmp_path: Path) -> None:
    net, x = single(lambda: nn.Linear(32, 24))
    with torch.no_grad():
        net.layer.weight.copy_(torch.randn(24, 5) @ torch.randn(5, 32))
    given = context(net, x, tmp_path)
    made = svd(copy.deepcopy(net), Svd(energy=0.9999, multiple=1), given)
    assert given.facts["layers"]["layer"]["rank"] == [5]
    assert given.facts["layers"]["layer"]["macs"] == [5 * 32 * 24, 5 * 5 * (32 + 24)]
    assert torch.allclose(made(x), net(x), atol=1e-4)


def test_energy_that_no_cheaper_rank_keeps(tmp_path: Path) -> None:
    net, x = single(lambda: nn.Linear(8, 8))
    with pytest.raises(UnfitError, match=r"no rank that keeps 0.999 of its energy has fewer mult"):
        svd(net, Svd(energy=0.999, multiple=1), context(net, x, tmp_path))


@pytest.mark.parametrize("what", ["macs", "parameters"])
def test_a_budget_is_kept_and_told(what: str, tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    given = cnn_context(net, tmp_path)
    made = tucker(copy.deepcopy(net), Tucker(**{what: 0.7, "multiple": 2}), given)  # type: ignore[arg-type]
    assert given.facts[what] <= 0.7
    count = sum(p.numel() for p in made.parameters()) / sum(p.numel() for p in net.parameters())
    assert count == pytest.approx(given.facts["parameters"])
    layers, dropped = given.facts["layers"], given.facts["dropped"]
    assert not set(layers) & set(dropped)
    convolutions = {n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(layers) | set(dropped) == convolutions
    assert dropped["block2.shortcut"] == "a 1x1 kernel has no core; svd factors it"


def test_a_budget_that_cannot_be_reached_says_how_far_it_goes(tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(
        UnfitError,
        match=r"^macs 0.05 of the original's cannot be reached: with every layer that can be decomposed at its lowest rank they are 0\.\d+",
    ) as caught:
        svd(copy.deepcopy(net), Svd(macs=0.05), cnn_context(net, tmp_path))
    assert caught.value.too_strong


def test_a_latency_is_measured(tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    given = cnn_context(net, tmp_path)
    made = svd(copy.deepcopy(net), Svd(latency=0.8, multiple=1), given)
    before, after = weights([net, made])
    assert after <= 0.8 * before
    assert min(given.facts["latency_shares"].values()) <= 0.8
    with pytest.raises(UnfitError, match=r"latency 0.05 .* the lowest measured was 0\.\d+"):
        svd(copy.deepcopy(net), Svd(latency=0.05), given)


def test_each_shape_is_timed_once(tmp_path: Path) -> None:
    net, calls = networks.tiny_cnn(), []

    def timed(nets: Any) -> list[float]:
        calls.append(len(nets))
        return weights(nets)

    given = cnn_context(net, tmp_path, latency=timed)
    config = Tucker(ranks=(3, 3), layers=Layers(patterns=("block3.*", "block2.conv2")))
    tucker(copy.deepcopy(net), config, given)
    assert calls == [3]  # nothing, the layer, the chain: for three layers of one shape
    assert len(given.facts["layers"]) == 3


def test_layers_are_chosen_and_misspelt_ones_named(tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    given = cnn_context(net, tmp_path)
    svd(copy.deepcopy(net), Svd(rank=2, layers=Layers(patterns=("block3.*",))), given)
    assert set(given.facts["layers"]) == {"block3.conv1", "block3.conv2"}
    assert given.facts["dropped"]["conv1"] == "excluded by layers"
    with pytest.raises(RecipeError, match=r"pattern 'blok3.\*' matches no layer"):
        svd(copy.deepcopy(net), Svd(layers=Layers(patterns=("blok3.*",))), given)


# --- what does not fit --------------------------------------------------------------------------


def test_ranks_that_do_not_fit_name_the_nearest(tmp_path: Path) -> None:
    net, x = single(lambda: nn.Conv2d(6, 4, 3, padding=1))
    given = context(net, x, tmp_path)
    with pytest.raises(
        UnfitError, match=r"rank 5 does not fit layer 'layer', whose full rank is 4; use at most 4"
    ):
        svd(net, Svd(rank=5), given)
    with pytest.raises(UnfitError, match=r"ranks 9, 3 do not fit .* use at most 6, 3, or leave"):
        tucker(net, Tucker(ranks=(9, 3)), given)
    with pytest.raises(
        UnfitError, match=r"rank 20 does not fit .* full rank is 12; use at most 12"
    ):
        spatial_svd(net, SpatialSvd(rank=20), given)
    with pytest.raises(UnfitError, match=r"rank 99 does not fit .* full rank is 36"):
        cp(net, Cp(rank=99), given)
    with pytest.raises(UnfitError, match=r"multiplier 7 does not fit .* use at most 4"):
        grouped_convolution(net, GroupedConvolution(multiplier=7), given)
    with pytest.raises(UnfitError, match=r"5 groups do not divide the 6 inputs and 4 outputs .* 2"):
        grouped_convolution(net, GroupedConvolution(form="grouped", groups=5), given)


def test_networks_without_such_layers(tmp_path: Path) -> None:
    net = networks.tiny_transformer()
    given = networks.context(net, tmp_path, latency=weights)
    with pytest.raises(UnfitError, match=r"no layer can be decomposed .*Linear is not what this"):
        tucker(net, Tucker(), given)


def test_activation_svd_needs_data(tmp_path: Path) -> None:
    net, x = single(lambda: nn.Linear(8, 8))
    given = context(net, x, tmp_path, data=Data())
    with pytest.raises(DataError, match="calibration data is needed"):
        activation_svd(net, ActivationSvd(), given)


def test_costs_are_those_of_the_whole_network(tmp_path: Path) -> None:
    """Counted by hand: transposed convolutions and layers that are called twice count, too."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 8, 2, 2)
            self.twice = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(self.up(x)))

    net, x = Both().eval(), torch.randn(4, 4, 5, 5)
    given = context(net, x, tmp_path)
    made = tucker(copy.deepcopy(net), Tucker(ranks=(4, 4), convert="all"), given)
    up, before, after = 25 * 4 * 8 * 4, 2 * 100 * 8 * 8 * 9, 2 * 100 * (32 + 4 * 4 * 9 + 32)
    assert given.facts["layers"]["twice"]["macs"] == [before, after]
    assert given.facts["macs"] == pytest.approx((up + after) / (up + before))
    assert made(x).shape == net(x).shape
    assert given.facts["dropped"]["up"] == "ConvTranspose2d has no low-rank form here"


def test_layers_that_share_their_weight_stay(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
            self.three = nn.Linear(16, 16)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.one(x))) @ self.three.weight

    net, x = Tied().eval(), torch.randn(4, 16)
    with pytest.raises(UnfitError, match="one, two, three: its weight is used elsewhere, too"):
        svd(net, Svd(rank=2), context(net, x, tmp_path))


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    net, x = single(lambda: nn.Linear(8, 8))
    with torch.no_grad():
        net.layer.weight[0, 0] = float("nan")
    with pytest.raises(UnfitError, match="weights that are NaN or infinite"):
        svd(net, Svd(rank=2), context(net, x, tmp_path))


# --- grouped convolutions -----------------------------------------------------------------------


def test_grouped_weights_are_the_least_squares_ones(tmp_path: Path) -> None:
    """Reference: numpy's least squares over the rows that the layer sees, for every output."""
    net, x = single(lambda: nn.Conv2d(4, 6, 3, bias=False))
    x = torch.randn(40, 4, 6, 6)
    x = x + 2 * x.mean(1, keepdim=True)  # channels that know of one another
    given = context(net, x, tmp_path)
    made = grouped_convolution(
        copy.deepcopy(net), GroupedConvolution(form="grouped", groups=2, convert="all"), given
    )
    rows = torch.nn.functional.unfold(x, 3).mT.reshape(-1, 4, 9).double()
    wanted = net(x).flatten(2).mT.reshape(-1, 6).detach().double()
    for g in range(2):
        own = rows[:, 2 * g : 2 * g + 2].flatten(1)
        solved = torch.linalg.lstsq(own, wanted[:, 3 * g : 3 * g + 3]).solution.mT
        found = made.layer[0].weight[3 * g : 3 * g + 3].flatten(1).double()
        assert (found - solved).norm() < 0.01 * solved.norm()
    assert made.layer[0].groups == 2
    # without data the weights of the block stay as they were
    bare = context(net, x, tmp_path, data=Data())
    config = GroupedConvolution(form="grouped", groups=2, convert="all")
    plain = grouped_convolution(copy.deepcopy(net), config, bare)
    assert torch.allclose(plain.layer[0].weight[:3], net.layer.weight[:3, :2])


def test_more_kernels_a_channel_lose_less(tmp_path: Path) -> None:
    net, x = single(lambda: nn.Conv2d(8, 12, 3, padding=1))
    lost = []
    for m in (1, 2, 4, 9):
        given = context(net, x, tmp_path)
        config = GroupedConvolution(multiplier=m, convert="all")
        made = grouped_convolution(copy.deepcopy(net), config, given)
        assert made.layer[0].groups == 8
        assert made.layer[0].out_channels == 8 * m
        lost.append(given.facts["layers"]["layer"]["loss"])
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] == pytest.approx(0, abs=1e-8)


# --- afterwards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_static_after_tucker_runs(runtime: str, folded: bool, tmp_path: Path) -> None:
    """Every layer of a chain is rounded; `export` compares the outputs with memory."""
    pytest.importorskip(runtime)
    net = networks.tiny_cnn()
    target = Target(runtime=runtime, options={"threads": 1})
    given = cnn_context(net, tmp_path / "work", target=target)
    made = copy.deepcopy(net)
    if folded:
        fuse = plugins.technique("fuse_batch_norm")
        made = fuse.apply(made, fuse.config(), given)
    made = tucker(made, Tucker(ranks=(4, 4), layers=Layers(patterns=("block3.*",))), given)
    made = static(made, Static(), given)
    kinds = [type(made.get_submodule(f"block3.conv1.{i}")).__name__ for i in range(3)]
    assert kinds == ["QuantConv2d"] * 3
    sample = arrays_of(networks.split(0, 8)[0], ["x"])
    export(made, tmp_path / "files", networks.inputs(), target, sample).close()


def test_a_captured_graph_is_decomposed_and_replayed(tmp_path: Path) -> None:
    from tersor.ops.capture import capture

    net = networks.tiny_cnn()
    captured = capture(copy.deepcopy(net), networks.inputs())
    made = svd(
        captured, Svd(rank=4, layers=Layers(patterns=("block3.*",))), cnn_context(net, tmp_path)
    )
    assert isinstance(made, fx.GraphModule)
    x = networks.digits()[0][:4]
    store(made, net, tmp_path)
    again = replay(tmp_path, copy.deepcopy(net))
    assert torch.equal(again(x), made(x))
    assert not torch.equal(made(x), net(x))


def test_a_chain_is_decomposed_again(tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    given = cnn_context(net, tmp_path)
    made = tucker(
        copy.deepcopy(net), Tucker(ranks=(6, 6), layers=Layers(patterns=("block3.*",))), given
    )
    config = SpatialSvd(rank=4, convert="all", layers=Layers(patterns=("block3.conv1.1",)))
    made = spatial_svd(made, config, given)
    assert isinstance(made.block3.conv1[1], nn.Sequential)
    store(made, net, tmp_path)
    x = networks.digits()[0][:4]
    assert torch.equal(replay(tmp_path, copy.deepcopy(net))(x), made(x))


def test_layers_of_torchs_own_encoder(tmp_path: Path) -> None:
    """Its forward reads the weights of its layers: the result is the captured graph."""
    torch.manual_seed(0)
    net = Single(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(4, 5, 16)
    given = context(net, x, tmp_path, inputs=Inputs(example={"x": x}, dynamic={"x": {0: "batch"}}))
    made = svd(copy.deepcopy(net), Svd(rank=16, convert="all"), given)
    assert isinstance(made, fx.GraphModule)
    assert set(given.facts["layers"]) == {"layer.linear1", "layer.linear2"}
    assert torch.allclose(made(x), net(x), atol=1e-5)


def test_through_the_pipeline(tmp_path: Path) -> None:
    """Stored, opened again, and gone on with."""
    recipe = tersor.Recipe(
        stages=(
            (Tucker(macs=0.75, convert="all", multiple=2), DistillLogits(epochs=0.5)),
            (Static(),),
        ),
        target=Target(runtime="onnxruntime", options={"threads": 1}),
    )
    net = networks.tiny_cnn()
    made = tersor.compress(
        net, recipe, data=networks.data(), metrics=("size", "macs"), out=tmp_path / "out"
    )
    first = made.report.stages[0]
    assert first.facts["tucker"]["macs"] <= 0.75
    assert first.facts["tucker"]["layers"]
    macs = {m.metric: m.value for m in first.measurements}["macs"]
    before = {m.metric: m.value for m in made.report.before}["macs"]
    assert macs / before == pytest.approx(first.facts["tucker"]["macs"], abs=0.02)
