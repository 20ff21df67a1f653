"""N:M and block sparsity."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.context import Data
from tersor.core.errors import DataError, RecipeError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.core.recipe import Recipe
from tersor.ops import masks
from tersor.ops.capture import capture
from tersor.ops.groups import Group, find_groups
from tersor.ops.reorder import reorder
from tersor.pruning.semi_structured import SemiStructured, semi_structured
from tests import networks

PLAIN = SemiStructured(permute=False)


def kept_by_loops(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the N largest of M input channels; weights are (O, I) or (O, I, H, W)."""
    made = torch.zeros_like(weight)
    flat, out = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2), made
    out = made.view(flat.shape)
    for o in range(flat.shape[0]):
        for place in range(flat.shape[2]):
            for start in range(0, flat.shape[1], m):
                near = [(abs(float(flat[o, i, place])), i) for i in range(start, start + m)]
                for _, i in sorted(near)[-n:]:
                    out[o, i, place] = flat[o, i, place]
    return made


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "3:8"])
def test_each_output_and_kernel_position_keeps_the_largest(tiny_context: Any, pattern: str) -> None:
    net = networks.tiny_cnn()
    made = semi_structured(copy.deepcopy(net), replace(PLAIN, pattern=pattern), tiny_context(net))
    n, m = (int(x) for x in pattern.split(":"))
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            found, weight = made.get_submodule(name).weight.detach(), layer.weight.detach()
            wanted = weight if name == "conv1" else kept_by_loops(weight, n, m)
            assert torch.equal(found, wanted), name


def test_one_input_channel_is_left_and_the_report_says_so(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    semi_structured(net, SemiStructured(), context)
    assert context.facts["left"] == {
        "conv1": "it has one input channel, so no neighbors to choose from"
    }
    assert context.facts["sparsity"] == 0.5
    masks.settle(net)


class Plain(nn.Module):
    """Two linear layers whose large hidden channels stand together: 2:4 would drop them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 10)
        with torch.no_grad():
            self.second.weight[:, :12] *= 10

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))


def test_permuting_computes_the_same_and_keeps_more(tiny_context: Any) -> None:
    net = Plain().eval()
    context = tiny_context(net)
    moved = copy.deepcopy(net)
    one = copy.deepcopy(net)

    def size(net: Any) -> float:
        return float(net.second.weight.detach().abs().sum())

    config = SemiStructured(layers=Layers(patterns=("second",)))
    semi_structured(moved, config, context)
    semi_structured(one, replace(config, permute=False), tiny_context(net))
    before, after = context.facts["kept_before_and_after_permuting"]["second"]
    total = size(net)
    assert size(one) / total == pytest.approx(before, rel=1e-5)
    assert size(moved) / total == pytest.approx(after, rel=1e-5)
    assert after > before + 0.1
    # the first layer is permuted, not pruned: it holds the same rows in another order
    rows = [sorted(map(tuple, n.first.weight.tolist())) for n in (net, moved)]
    assert rows[0] == rows[1]
    assert not torch.equal(net.first.weight, moved.first.weight)
    # with its zeros filled with what was there, it is the network it was
    x = networks.digits()[0][:50]
    order = [net.first.weight.tolist().index(row) for row in moved.first.weight.tolist()]
    whole = copy.deepcopy(moved)
    with torch.no_grad():
        whole.second.weight.copy_(net.second.weight[:, order])
        assert torch.allclose(whole(x), net(x), atol=1e-5)
        keep = moved.second.weight != 0
        assert torch.equal(moved.second.weight, whole.second.weight * keep)
    assert (keep.view(10, 8, 4).sum(-1) == 2).all()


def test_every_layer_is_permuted_or_the_report_says_why_not(tiny_context: Any) -> None:
    for make in (networks.tiny_cnn, networks.tiny_transformer):
        net = make()
        context = tiny_context(net)
        semi_structured(copy.deepcopy(net), SemiStructured(), context)
        permuted = context.facts["kept_before_and_after_permuting"]
        left = context.facts["not_permuted"]
        assert permuted
        assert all(after > before for before, after in permuted.values())
        assert sorted([*permuted, *left]) == sorted(context.facts["sparsity_by_layer"])
        assert all(left.values())
    assert {"qkv", "fc1", "fc2"} <= set(permuted)


def test_an_order_that_changes_the_outputs_is_put_back() -> None:
    """A group that leaves out the layer that makes its channels."""
    net = Plain().eval()
    x = networks.digits()[0][:4]
    before = copy.deepcopy(net.state_dict())
    wrong = Group(indices={("second", "in"): tuple((i,) for i in range(32))})
    score = {"second": net.second.weight.detach().abs()}
    done = reorder(net, [wrong], score, (2, 4), Inputs(example={"x": x}), escapes=0, seed=0)
    assert not done.kept
    assert done.left["second"].startswith("in another order the network's outputs differ by ")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_several_readers_are_weighed_together() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return self.b(h) * self.c(h)

    net = Net().eval()
    inputs = Inputs(example={"x": torch.randn(4, 8)})
    groups = find_groups(capture(net, inputs), net)
    scores = {n: net.get_submodule(n).weight.detach().abs() for n in ("b", "c")}
    with torch.no_grad():
        wanted = net(**inputs.example)
    done = reorder(net, groups, scores, (2, 4), inputs, escapes=3, seed=0)
    assert done.kept["b"] == done.kept["c"]
    with torch.no_grad():
        assert torch.allclose(net(**inputs.example), wanted, atol=1e-6)


@pytest.mark.parametrize(("importance", "order"), [("l1", 1), ("l2", 2)])
def test_blocks_of_the_smallest_norm_go(tiny_context: Any, importance: Any, order: int) -> None:
    net = networks.tiny_transformer()
    config = SemiStructured(
        block=(2, 4), sparsity=0.4, importance=importance, layers=Layers(patterns=("fc*",))
    )
    made = semi_structured(copy.deepcopy(net), config, tiny_context(net))
    for name in ("fc1", "fc2"):
        weight = net.get_submodule(name).weight.detach()
        wanted = weight.clone()
        places = [
            (r, c) for r in range(0, weight.shape[0], 2) for c in range(0, weight.shape[1], 4)
        ]
        norms = {(r, c): float(weight[r : r + 2, c : c + 4].norm(order)) for r, c in places}
        for r, c in sorted(places, key=lambda at: norms[at])[: int(0.4 * len(places))]:
            wanted[r : r + 2, c : c + 4] = 0
        assert torch.equal(made.get_submodule(name).weight, wanted)


def test_blocks_of_a_convolution_are_of_one_kernel_position(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    config = SemiStructured(block=(4, 8), layers=Layers(patterns=("block3.conv1",)))
    semi_structured(net, config, tiny_context(net))
    weight = net.get_submodule("block3.conv1").weight.detach()
    blocks = weight.view(4, 4, 2, 8, 9).permute(0, 2, 4, 1, 3).flatten(3)
    zero = (blocks == 0).all(-1)
    assert torch.equal(zero, (blocks == 0).any(-1))
    assert int(zero.sum()) == 4 * 2 * 9 // 2


def test_taylor_looks_at_the_loss(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    config = replace(PLAIN, importance="taylor", layers=Layers(patterns=("fc",)))
    made = semi_structured(copy.deepcopy(net), config, context)
    score = torch.zeros(10, 16)
    for batch in context.data.calibration:
        net.zero_grad()
        F.cross_entropy(net(batch["x"]), batch["labels"]).backward()
        score += (net.fc.weight * net.fc.weight.grad).detach().abs()
    kept = kept_by_loops(score, 2, 4) != 0
    assert torch.equal(made.fc.weight, net.fc.weight * kept)
    with pytest.raises(DataError, match="semi_structured: importance taylor needs calibration dat"):
        semi_structured(net, config, replace(context, data=Data()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pattern": "4:4"}, 'pattern must be "N:M" with 0 < N < M'),
        ({"pattern": "2:4", "block": (1, 4)}, "give pattern or block, not both"),
        ({"block": (0, 4)}, r"block must be \[rows, columns\], each at least 1, got \[0, 4\]"),
        ({"sparsity": 0.5}, "sparsity is the share of blocks, give block with it"),
        ({"block": (1, 4), "sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"escapes": -1}, "escapes must be at least 0, got -1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SemiStructured(**settings)


def test_weaker_settings() -> None:
    assert SemiStructured().weaker() == SemiStructured(pattern="3:4")
    assert SemiStructured(block=(2, 2)).weaker() == SemiStructured(block=(2, 2), sparsity=0.35)
    assert SemiStructured(pattern="7:8").weaker() is None


def test_networks_that_do_not_fit_are_left_untouched(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    context = tiny_context(net)
    for config, error, text in (
        (
            SemiStructured(pattern="2:16"),
            UnfitError,
            r"2:16 needs input channels in multiples of 16, but 'block1.conv1' has 8, .* has 8; use "
            r"2:8, or leave out what does not fit: layers: \[\"!block1.conv1",
        ),
        (
            SemiStructured(block=(4, 4)),
            UnfitError,
            r"blocks of 4 x 4 do not divide every layer \(outputs x input channels\): 'conv1' is "
            r"8 x 1, 'fc' is 10 x 16; use block: \[2, 1\], or .* layers: \[\"!conv1\", \"!fc\"\]",
        ),
        (SemiStructured(layers=Layers(patterns=("conv9",))), RecipeError, "'conv9' matches no la"),
    ):
        with pytest.raises(error, match=text):
            semi_structured(net, config, context)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    with pytest.raises(StepError, match="layer 'fc': 1 of 160 weights are NaN or infinite"):
        semi_structured(net, SemiStructured(), context)


def test_a_pattern_needs_no_quotes_in_a_recipe(tmp_path: Path) -> None:
    """YAML 1.1 reads 2:4 as 124, to the base of 60."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "steps:\n  - semi_structured: {pattern: 2:4}\n  - wanda: {pattern: 1:4}\n"
        "  - semi_structured: {block: [4, 1]}\ntarget: onnxruntime:cpu\n"
    )
    (first,), (second,), (third,) = Recipe.load(file).stages
    assert (first.pattern, second.pattern, third.block) == ("2:4", "1:4", (4, 1))
    file.write_text("steps:\n  - wanda: {pattern: 4:4}\ntarget: onnxruntime:cpu\n")
    with pytest.raises(RecipeError, match=r"wanda.*pattern must be .N:M.*got '4:4'"):
        Recipe.load(file)
