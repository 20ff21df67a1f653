"""Where roundings go in the graphs of small networks, and the clips before them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.core.model import Inputs
from tersor.ops.capture import capture
from tersor.ops.fold import drop_identities
from tersor.ops.modules import Quantize
from tersor.ops.placement import Point, insert, place


def points(
    net: nn.Module, *shape: int, layers: list[str] | None = None
) -> tuple[fx.GraphModule, list[Point]]:
    captured = capture(
        net.eval(), Inputs(example={"x": torch.randn(2, *shape)}, dynamic={"x": {0: "batch"}})
    )
    drop_identities(captured)
    names = [
        n
        for n, m in captured.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))
    ]
    return captured, place(captured, names if layers is None else layers)


def names(found: list[Point]) -> list[set[str]]:
    return [{node.name for node in point.places} for point in found]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        y = self.conv3(F.relu(self.conv2(x)))
        return self.head(F.relu(y + x).mean((2, 3)))


def test_residual_network_is_rounded_between_all_integer_operators() -> None:
    _, found = points(Residual(), 3, 8, 8)
    # input; behind relus, never before them; conv3 before the addition; its relu; the pooled features
    assert names(found) == [{"x"}, {"relu"}, {"relu_1"}, {"conv3"}, {"relu_2"}, {"mean"}]
    assert all(users is None for p in found[1:5] for users in p.places.values())


@pytest.mark.parametrize("runtime", ["openvino", "tensorrt"])
def test_a_convolution_that_is_added_inside_is_not_rounded(runtime: str) -> None:
    captured, _ = points(Residual(), 3, 8, 8)
    found = place(captured, ["conv1", "conv2", "conv3", "head"], runtime)
    assert names(found) == [{"x"}, {"relu"}, {"relu_1"}, {"relu_2"}, {"mean"}]


def test_output_stays_in_float() -> None:
    captured, found = points(Residual(), 3, 8, 8)
    insert(captured, [(p, Quantize(0.1, 0)) for p in found])
    (output,) = [n for n in captured.graph.nodes if n.op == "output"]
    assert output.args[0].target == "head"


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.fc1, self.fc2 = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), y)
        return (x + self.fc2(F.gelu(self.fc1(x)))).mean(1)


def test_transformer_is_rounded_only_before_its_linear_layers() -> None:
    captured, found = points(Transformer(), 5, 8)
    assert names(found) == [{"norm"}, {"add"}, {"gelu"}]
    by_name = {p.name: p for p in found}
    (readers,) = by_name["norm"].places.values()
    assert readers is not None
    assert {str(r.target) for r in readers} == {"q", "k"}  # attention reads the float values
    insert(captured, [(p, Quantize(0.1, 128)) for p in found])
    (addition,) = [n for n in captured.graph.nodes if n.name == "add_1"]
    assert addition.args[0].name == "add"  # the residual stream is not rounded


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, padding=1)
        self.bottom = nn.Conv2d(4, 8, 3, padding=1)
        self.widen = nn.ConvTranspose2d(8, 4, 2, 2)
        self.up = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.relu(self.down(x))
        y = F.relu(self.bottom(F.max_pool2d(x1, 2)))
        return self.head(F.relu(self.up(torch.cat([self.widen(y), x1], dim=1))))


def test_concatenation_and_pooling_share_a_scale() -> None:
    captured, found = points(Unet(), 1, 8, 8)
    shared = {"relu", "max_pool2d", "widen", "cat"}
    assert shared in names(found)
    (point,) = [p for p in found if "cat" in {n.name for n in p.places}]
    assert "max_pool2d" not in {n.name for n in point.observed}  # it only selects
    before = len(list(captured.graph.nodes))
    insert(captured, [(p, Quantize(0.1, 0)) for p in found])
    calls = [
        str(n.target)
        for n in captured.graph.nodes
        if n.op == "call_module" and str(n.target).startswith("rounding.")
    ]
    assert (
        len(calls) == len(list(captured.graph.nodes)) - before == sum(len(p.places) for p in found)
    )
    assert len(set(calls)) == len(found)
    captured(torch.randn(3, 1, 8, 8))


def test_onnxruntime_concatenates_codes_of_several_scales() -> None:
    captured, _ = points(Unet(), 1, 8, 8)
    layers = ["down", "bottom", "widen", "up", "head"]
    found = place(captured, layers, "onnxruntime")
    (point,) = [p for p in found if "cat" in {n.name for n in p.places}]
    assert {n.name for n in point.places} == {"cat"}
    (before,) = [p for p in found if "relu" in {n.name for n in p.places}]
    assert {n.name for n in before.places} == {"relu", "max_pool2d"}


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, 2, 1)
        self.conv3 = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        y = self.conv2(x)
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.conv3(F.relu(y + x))


def test_padded_shortcut_keeps_the_scale_of_its_input() -> None:
    _, found = points(Shortcut(), 2, 8, 8)
    assert {"relu", "getitem", "pad"} in names(found)


class Clipped(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.conv1, self.clip, self.conv2 = nn.Conv2d(1, 2, 1), clip, nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.clip(self.conv1(x)))


@pytest.mark.parametrize(
    ("clip", "ceiling"), [(nn.ReLU6(), 6.0), (nn.ReLU(), None), (nn.Hardtanh(0, 2.5), 2.5)]
)
def test_clip_before_a_rounding_gives_its_ceiling(clip: nn.Module, ceiling: float | None) -> None:
    _, found = points(Clipped(clip), 1, 4, 4)
    assert names(found) == [{"x"}, {"clip"}]
    assert found[1].ceiling == ceiling


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.GELU()])
def test_float_activation_stands_between_roundings(activation: nn.Module) -> None:
    _, found = points(Clipped(activation), 1, 4, 4)
    assert names(found) == [
        {"x"},
        {"conv1"},
        {"clip"},
    ]  # no integer convolution writes float in ONNX Runtime


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(1, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.patches(x).flatten(2).transpose(1, 2)))


def test_patches_that_become_tokens_stay_float() -> None:
    _, found = points(Patches(), 1, 8, 8)
    assert names(found) == [{"x"}, {"norm"}]


class Shared(nn.Module):
    """Pre-activation: the convolution's output is read by a ReLU and by the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv3(x + self.conv2(F.relu(x)))


def test_relu_of_a_tensor_with_other_readers_is_rounded_by_itself() -> None:
    _, found = points(Shared(), 4, 4, 4)
    assert names(found) == [{"x"}, {"conv1"}, {"relu"}, {"conv2"}, {"add"}]


def test_layers_left_in_float_get_no_roundings() -> None:
    _, found = points(Residual(), 3, 8, 8, layers=["conv2"])
    assert names(found) == [{"relu"}, {"relu_1"}]
    assert points(Residual(), 3, 8, 8, layers=[])[1] == []


def test_dropout_and_identity_are_taken_out() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity(), nn.ReLU(), nn.Linear(4, 2))
    captured = capture(net.eval(), Inputs(example={"input": torch.randn(2, 4)}))
    x = torch.randn(3, 4)
    before = captured(x)
    drop_identities(captured)
    kinds = {
        type(captured.get_submodule(str(n.target))).__name__
        for n in captured.graph.nodes
        if n.op == "call_module"
    }
    assert kinds == {"Linear", "ReLU"}
    assert torch.equal(captured(x), before)
