import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.core.model import Inputs
from tersor.ops.capture import capture

CASES = [
    ("cifar", "resnet20", "data"),
    ("cifar", "resnet8", "data"),
    ("mnist", "lenet5", "data"),
    ("fashion", "mobilenet_v2", "data"),
    ("fashion", "vit", "data"),
    ("fashion", "unet", "scenes"),
    ("speech", "lstm", "data"),
    ("speech", "gru", "data"),
    ("language", "gpt", "data"),
    ("sentiment", "transformer", "data"),
]


@pytest.mark.parametrize(("script", "factory", "data"), CASES)
def test_every_workload_is_captured_for_any_batch(workload, script, factory, data):
    module = workload(script)
    net = getattr(module, factory)()
    batch = next(iter(getattr(module, data)()["test"]))
    batch = {k: v for k, v in batch.items() if k != "labels"}
    dynamic = {name: {0: "batch"} for name in batch}
    captured = capture(net, Inputs(example={k: v[:2] for k, v in batch.items()}, dynamic=dynamic))
    other = {k: v[2:5] for k, v in batch.items()}
    with torch.no_grad():
        # the transformer's fused eval path sums in another order
        torch.testing.assert_close(captured(**other), net(**other), atol=1e-5, rtol=1e-5)


class ByContent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]), -1)


class Unpacks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, *rest = x.shape
        if len(rest) == 1 and rest[0] > 2:
            x = x * 2
        return x.view(batch, -1) + len(x)


def inputs(*shape: int) -> Inputs:
    return Inputs(example={"x": torch.randn(shape)}, dynamic={"x": {0: "batch"}})


def test_a_test_on_content_is_refused_with_its_line():
    with pytest.raises(
        ModelError,
        match=r"content of a tensor is used as a condition at .*test_capture.py:\d+ \(if x.sum",
    ):
        capture(ByContent(), inputs(2, 3))


def test_a_frozen_batch_is_refused():
    with pytest.raises(ModelError, match="turns the batch size into a Python number"):
        capture(Frozen().eval(), inputs(2, 3))


def test_shapes_are_unpacked_tested_and_stay_symbolic():
    net = Unpacks().eval()
    captured = capture(net, inputs(2, 3))
    x = torch.randn(5, 3)
    torch.testing.assert_close(captured(x), net(x))


def test_shapes_and_types_are_noted(tiny_cnn):
    captured = capture(tiny_cnn(), Inputs(example={"x": torch.randn(2, 1, 8, 8)}))
    shapes = {n.name: n.meta["shape"] for n in captured.graph.nodes if "shape" in n.meta}
    assert shapes["conv1"] == (2, 8, 8, 8)
    assert shapes["fc"] == (2, 10)


def test_a_captured_network_trains(tiny_cnn):
    captured = capture(tiny_cnn(), Inputs(example={"x": torch.randn(2, 1, 8, 8)}))
    captured.train()
    assert captured.get_submodule("bn1").training
    captured(torch.randn(4, 1, 8, 8)).sum().backward()
    assert captured.get_submodule("conv1").weight.grad is not None


def test_capturing_again_returns_the_same_graph(tiny_cnn):
    ways = Inputs(example={"x": torch.randn(2, 1, 8, 8)})
    captured = capture(tiny_cnn(), ways)
    assert capture(captured, ways) is captured


def test_forward_that_fails_is_named():
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.zeros(7, 7)

    with pytest.raises(ModelError, match=r"forward of Wrong cannot be captured at .*RuntimeError"):
        capture(Wrong(), inputs(2, 3))


@torch.fx.wrap
def hidden(x: Tensor) -> Tensor:
    """A function that fx is told not to look into."""
    return x * 2 if x.shape[1] > 1 else x


class Unusual(nn.Module):
    """Buffers, item assignment, a device's name, wrapped functions and an argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(12.0).reshape(1, 12), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = hidden(x) + self.table.expand(x.shape[0], -1)[:, : x.shape[1]]
        y[:, 0] = 0.0
        if mask is not None:
            y = y * mask
        with torch.autocast(x.device.type, enabled=False):
            return y + 1


def test_what_fx_does_not_see():
    net = Unusual().eval()
    x = torch.randn(2, 3)
    captured = capture(net, Inputs(example={"x": x}, dynamic={"x": {0: "batch"}}))
    other = torch.randn(5, 3)
    torch.testing.assert_close(captured(x=other), net(other))
    names = [(n.op, str(n.target)) for n in captured.graph.nodes]
    assert ("get_attr", "table") in names
    assert ("placeholder", "x") in names
    assert not any(op == "placeholder" and name == "mask" for op, name in names)
    assert any("setitem" in name for _, name in names)
    assert not any(name.endswith("hidden") for _, name in names)
    fitting = capture(net, Inputs(example={"x": x, "mask": torch.ones(2, 3)}))
    torch.testing.assert_close(fitting(x=x, mask=torch.ones(2, 3)), net(x, torch.ones(2, 3)))
