"""Layer by layer: what stops where, on what inputs, and what is held meanwhile."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.ops import sequential
from tersor.ops.capture import capture
from tersor.ops.sequential import (
    drawn,
    layer_by_layer,
    num_samples,
    one_by_one,
    open_layers,
    prune_in_turn,
)
from tersor.ops.walk import carried_bytes

WIDTH = 24


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.relu(layer(x))
        return x


def way(x: Tensor) -> Inputs:
    return Inputs(example={"x": x}, dynamic={"x": {0: "batch"}})


def test_later_layers_see_what_was_done_to_earlier_ones() -> None:
    net = Deep(3).eval()
    batches = [{"x": torch.randn(5, WIDTH)}, {"x": torch.randn(3, WIDTH)}]
    graph = open_layers(net, way(batches[0]["x"]))
    seen = []
    for stop in layer_by_layer(graph, ["layers.0", "layers.2"], batches):
        seen.append(stop.name)
        with torch.no_grad():
            for batch, found in zip(batches, stop.inputs, strict=True):
                wanted = batch["x"]
                for layer in net.layers[: int(stop.name[-1])]:
                    wanted = wanted + F.relu(layer(wanted))
                assert torch.allclose(found, wanted)
            stop.layer.weight.zero_()
    assert seen == ["layers.0", "layers.2"]


def test_what_is_held_does_not_grow_with_depth() -> None:
    def most(depth: int) -> int:
        net = Deep(depth).eval()
        batch = {"x": torch.randn(37, WIDTH)}
        graph = open_layers(net, way(torch.randn(2, WIDTH)))
        names = [f"layers.{i}" for i in range(depth)]
        counts = []
        for _ in layer_by_layer(graph, names, [batch]):
            held = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (37, WIDTH)]
            counts.append(len({t.data_ptr() for t in held}))
            del held  # or it would hold what it counts
        return max(counts)

    assert most(6) == most(2) <= 2


def test_carried_bytes_counts_what_is_alive_at_a_layer() -> None:
    x = torch.randn(2, WIDTH)
    for depth in (2, 9):
        captured = capture(Deep(depth).eval(), way(x))
        names = [f"layers.{i}" for i in range(depth)]
        # x, which is added later, is the input of the layer, too
        assert carried_bytes(captured, names, 2) == 4 * WIDTH


def test_samples_are_limited_by_number_and_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, WIDTH)
    graph = open_layers(Deep(2).eval(), way(x))
    batches = [{"x": torch.randn(4, WIDTH), "labels": torch.zeros(4)} for _ in range(3)]
    names = ["layers.0"]
    taken = drawn(graph, names, batches, way(x), 7)
    assert [len(b["x"]) for b in taken] == [4, 3]
    assert num_samples(taken, way(x)) == 7
    assert "labels" not in taken[0]
    monkeypatch.setattr(sequential, "_CARRIED_BYTES", 5 * 4 * WIDTH)
    assert num_samples(drawn(graph, names, batches, way(x), 7), way(x)) == 5


def test_a_failure_puts_weights_back() -> None:
    net = Deep(3).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(2, WIDTH)
    graph = open_layers(net, way(x))
    stops = layer_by_layer(graph, [f"layers.{i}" for i in range(3)], [{"x": x}])

    def prune(stop: Any) -> tuple[Tensor, Tensor]:
        if stop.name == "layers.2":
            raise KeyboardInterrupt
        weight = stop.layer.weight.detach().unsqueeze(0)
        return 2 * weight, torch.zeros_like(weight, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        prune_in_turn(net, graph, stops, prune)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(hasattr(layer, "tersor_keep") for layer in net.modules())


def test_a_batch_that_the_network_refuses_is_named() -> None:
    x = torch.randn(2, WIDTH)
    graph = open_layers(Deep(2).eval(), way(x))
    batches = [{"x": x}, {"x": torch.randn(2, WIDTH + 1)}]
    with pytest.raises(DataError, match=r"calibration batch 1 fails in the network: mat1 and mat2"):
        list(layer_by_layer(graph, ["layers.1"], batches))


class Several(nn.Module):
    """A layer called twice, a tied one, a transposed convolution, an unused one, a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.twice = nn.Linear(8, 8)
        self.up = nn.ConvTranspose1d(8, 8, 3)
        self.unused = nn.Linear(8, 8)
        self.plain = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(self.twice(self.embed(tokens)))
        return self.tied(self.plain(self.up(x.mT).mT))


def test_what_is_left_out_has_a_reason() -> None:
    tokens = torch.randint(8, (2, 5))
    graph = open_layers(Several().eval(), Inputs(example={"tokens": tokens}))
    chosen, left = one_by_one(graph, Layers())
    assert list(chosen) == ["plain"]
    assert left == {
        "twice": "called 2 times, with inputs of several kinds",
        "up": "a transposed convolution: its inputs act on overlapping outputs",
        "tied": "shares its weight with another layer",
    }
    with pytest.raises(UnfitError, match=r"no layer can be pruned by its inputs: .*'tied': shares"):
        one_by_one(graph, Layers(patterns=("!plain",)))


def test_projections_of_attention_are_layers_over_the_networks_own_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            made: Tensor = self.attention(x, y, y, need_weights=False)[0]
            return made

    net = Net().eval()
    x = torch.randn(2, 5, 8)
    graph = open_layers(net, Inputs(example={"x": x, "y": x + 1}))
    chosen, _ = one_by_one(graph, Layers())
    assert list(chosen) == [
        *(f"attention.in_projection_{word}" for word in "qkv"),
        "attention.out_proj",
    ]
    keep = {name: torch.zeros(8, 8, dtype=torch.bool) for name in chosen}
    sequential.hold_open(net, graph, keep)
    assert not net.attention.in_proj_weight.any()
    assert not net.attention.out_proj.weight.any()
