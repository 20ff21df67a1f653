"""Coupled channels: which belong together, which must stay, and that the cut is exact."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.cutting import cut
from tersor.ops.groups import Coupling, Group, couple, find_groups, removed_places
from tersor.ops.norms import without
from tests import networks


def groups_of(net: nn.Module, **example: Tensor) -> list[Group]:
    return find_groups(capture(net.eval(), Inputs(example=example)), net)


def coupling_of(net: nn.Module, heads: bool = False, **example: Tensor) -> Coupling:
    return couple(capture(net.eval(), Inputs(example=example)), net, heads=heads)


def check_exact(
    net: nn.Module, share: float = 0.5, own: bool = True, heads: bool = False, **example: Tensor
) -> list[Group]:
    """Cut random channels of every free group; the outputs must be those of the masked network."""
    chance = random.Random(0)
    coupling = coupling_of(net, heads=heads, **example)
    groups = [g for g in coupling.groups if not g.protected]
    removal = [(g, chance.sample(range(g.size), int(share * g.size))) for g in groups]
    smaller = coupling.cut(removal)
    with torch.no_grad():
        wanted, found = coupling.masked(removal)(**example), smaller(**example)
    # float32 sums of fewer terms: rounding only
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if own:
        other = copy.deepcopy(net)
        cut(other, removed_places(removal))
        with torch.no_grad():
            torch.testing.assert_close(other(**example), wanted, rtol=1e-4, atol=1e-5)
    size = sum(p.numel() for p in smaller.parameters())
    assert size < sum(p.numel() for p in net.parameters())
    assert coupling.macs(removal) == coupling_of(smaller, **example).macs()
    return groups


def test_residual_network() -> None:
    net = networks.tiny_cnn()
    found = [str(g) for g in check_exact(net, x=networks.digits()[0][:4])]
    assert found == [
        "8 channels out of conv1, block1.conv2 through bn1, block1.bn2 into block1.conv1, "
        "block2.conv1, block2.shortcut",
        "8 channels out of block1.conv1 through block1.bn1 into block1.conv2",
        "16 channels out of block2.conv1 through block2.bn1 into block2.conv2",
        "16 channels out of block2.conv2, block2.shortcut, block3.conv2 through block2.bn2, "
        "block3.bn2 into block3.conv1, fc",
        "16 channels out of block3.conv1 through block3.bn1 into block3.conv2",
    ]


def test_transformer() -> None:
    net = networks.tiny_transformer()
    x = networks.digits()[0][:4]
    trunk = "32 channels out of embed, proj, fc2 through norm1, norm2 into qkv, fc1, head"
    hidden = "64 channels out of fc1 into fc2"
    found = [str(g) for g in check_exact(net, own=False, x=x)]
    assert found == [trunk, "8 channels out of qkv into proj", hidden]
    found = [str(g) for g in check_exact(net, own=False, heads=True, x=x)]
    assert found == [trunk, "4 channels out of qkv into proj", hidden]
    assert [g.protected for g in groups_of(net, x=x) if g.protected] == ["the network's output"]


class Mixture(nn.Module):
    """Grouped, depthwise, transposed and shared layers, concatenation, flatten, squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.squeeze, self.excite = nn.Linear(24, 6), nn.Linear(6, 24)
        self.shared = nn.Conv2d(24, 24, 1)
        self.up = nn.ConvTranspose2d(24, 10, 2, 2)
        self.up_grouped = nn.ConvTranspose2d(10, 8, 2, 2, groups=2)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.last = nn.Linear(4 * (8 + 8), 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = F.relu(self.stem(x))
        y = self.depthwise(F.relu6(self.norm(self.grouped(stem))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        y = y * gate[:, :, None, None]
        y = self.shared(F.pad(self.shared(y), (1, 1, 1, 1)))
        y = self.up_grouped(F.gelu(self.up(y))) * self.scale
        y = torch.cat([F.adaptive_avg_pool2d(y, 2), F.adaptive_avg_pool2d(stem, 2)], dim=1)
        return self.last(y.transpose(2, 3).reshape(x.shape[0], -1))


def test_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    groups = check_exact(Mixture().eval(), x=torch.randn(2, 1, 6, 6))
    assert [str(g) for g in groups] == [
        # one channel of each of the four groups at a time
        "2 channels out of stem into grouped, last",
        # the gate multiplies them; the shared layer reads what it makes
        "3 channels out of grouped, excite, shared through norm, depthwise into squeeze, shared, up",
        "6 channels out of squeeze into excite",
        "5 channels out of up into up_grouped",
        "4 channels out of up_grouped through scale into last",
    ]


class Odd(nn.Module):
    """Operators that need the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.fourth, self.fifth = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.register_buffer("table", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumprod(self.first(x), 1)
        x = self.second(x)[:, ::2].sum(1, keepdim=True) + x
        x = F.softmax(self.third(x), dim=1)
        x = torch.matmul(self.fourth(x), torch.ones(6, 6))
        x = self.fifth(x) + self.table
        return self.other(self.tied(x))


def test_what_is_not_followed_is_protected_and_says_why() -> None:
    found = {g.name: g.protected for g in groups_of(Odd(), x=torch.randn(2, 6))}
    assert found["first"] == "cumprod (cumprod)"
    assert found["second"] == "indexing selects channels (getitem)"
    assert found["third"] == "softmax mixes channels (softmax)"
    assert found["fourth"] == "_tensor_constant0 is a constant"
    assert found["fifth"] == "tied and other share a weight"
    assert found["tied"] == "tied and other share a weight"


def test_batch_dimension_and_unread_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.a(x).relu()
            return self.c(x) + self.b(x).mean(1, keepdim=True)

    found = {g.name: g.protected for g in groups_of(Net(), x=torch.randn(2, 4))}
    assert found["b"] == "mean over channels (mean)"
    assert found["c"] == "the network's output"


CASES = {
    "resnet20": ("cifar", (2, 3, 32, 32), 12),
    "resnet8": ("cifar", (2, 3, 32, 32), 6),
    "lenet5": ("mnist", (2, 1, 28, 28), 3),
    "mobilenet_v2": ("fashion", (2, 1, 28, 28), 24),
    "unet": ("fashion", (2, 1, 64, 64), 17),
    "vit": ("fashion", (2, 1, 28, 28), 13),
}


@pytest.mark.parametrize("factory", CASES)
def test_real_networks(factory: str, workload: Callable[[str], Any]) -> None:
    script, shape, count = CASES[factory]
    groups = check_exact(getattr(workload(script), factory)(), own=False, x=torch.randn(shape))
    assert len(groups) == count


def test_padded_shortcut_is_cut_in_the_graph(workload: Callable[[str], Any]) -> None:
    """The padding of the shortcut shrinks with the channels that it is added to."""
    net = workload("cifar").resnet20()
    found = {g.name: g for g in groups_of(net, x=torch.randn(2, 3, 32, 32)) if not g.protected}
    # of 64 channels of the last stage 16 are the first's, 16 more the second's
    trunk = [found[name].size for name in ("conv1", "layer2.0.conv2", "layer3.0.conv2")]
    assert trunk == [16, 16, 32]


class Rows(nn.Module):
    """Whatever a test gives it, called with x."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def grouped_queries(net: Any, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    q = net.q(x).view(batch, tokens, 4, 6).transpose(1, 2)
    k = net.k(x).view(batch, tokens, 2, 6).transpose(1, 2)
    v = net.v(x).view(batch, tokens, 2, 6).transpose(1, 2).repeat_interleave(2, dim=1)
    y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v)
    return net.last(y.transpose(1, 2).reshape(batch, tokens, 24))


def products(net: Any, x: Tensor) -> Tensor:
    """Attention written out, q, k and v in one, split by sizes."""
    q, k, v = net.qkv(x).split([12, 12, 12], dim=-1)
    q, k, v = (t.unflatten(-1, (3, 4)).movedim(-2, 1) for t in (q, k, v))
    y = torch.einsum("bhqk,bhkd->bqhd", (q @ k.mT * 0.5).softmax(-1), v)
    return net.last(y.flatten(2))


def shuffled(net: Any, x: Tensor) -> Tensor:
    y, z = net.a(x).chunk(2, 1)
    y = torch.cat([y, net.b(z)], 1)
    n, c, h, w = y.shape
    y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return net.last(F.pixel_shuffle(net.c(net.norm(y)), 2).mean((2, 3)))


def sliced(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.last(F.pad(y[:, 2:7], (1, 2)) + F.glu(net.b(x), 1))


def root_mean_square(net: Any, x: Tensor) -> Tensor:
    y = net.norm(net.a(x))
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return net.last(F.normalize(y, dim=-1))


def recurrent(net: Any, x: Tensor) -> Tensor:
    y, (h, _) = net.lstm(net.embedding(x))
    return net.last(net.gru(y)[0][:, -1] + h[-1].repeat(1, 2))


def borrowed(net: Any, x: Tensor) -> Tensor:
    """Functions called with a layer's tensors."""
    y = F.linear(x, net.a.weight, net.a.bias)
    y = F.layer_norm(y, (8,), net.norm.weight, net.norm.bias, 1e-5)
    return net.last(F.relu(y))


OTHERS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str], list[str]]] = {
    "grouped queries": (
        lambda: Rows(
            grouped_queries,
            q=nn.Linear(8, 24),
            k=nn.Linear(8, 12),
            v=nn.Linear(8, 12),
            last=nn.Linear(24, 5),
        ),
        torch.randn(2, 7, 8),
        ["6 channels out of q, k", "6 channels out of v into last"],
        # a head of keys goes with the two of queries that it serves
        ["2 channels out of q, k, v into last"],
    ),
    "attention written out": (
        lambda: Rows(products, qkv=nn.Linear(8, 36), last=nn.Linear(12, 5)),
        torch.randn(2, 7, 8),
        ["4 channels out of qkv", "4 channels out of qkv into last"],
        ["3 channels out of qkv into last"],
    ),
    "shuffle": (
        lambda: Rows(
            shuffled,
            a=nn.Conv2d(3, 16, 1),
            b=nn.Conv2d(8, 8, 1),
            c=nn.Conv2d(16, 24, 1),
            norm=nn.GroupNorm(4, 16),
            last=nn.Linear(6, 5),
        ),
        torch.randn(2, 3, 6, 6),
        ["4 channels out of a, b through norm into b, c", "6 channels out of c into last"],
        ["4 channels out of a, b through norm into b, c", "6 channels out of c into last"],
    ),
    "slices": (
        lambda: Rows(sliced, a=nn.Linear(4, 9), b=nn.Linear(4, 16), last=nn.Linear(8, 5)),
        torch.randn(2, 4),
        ["5 channels out of a, b into last", "3 channels out of b into last"],
        ["5 channels out of a, b into last", "3 channels out of b into last"],
    ),
    "norms": (
        lambda: Rows(root_mean_square, a=nn.Linear(4, 8), norm=nn.RMSNorm(8), last=nn.Linear(8, 5)),
        torch.randn(2, 3, 4),
        ["8 channels out of a through norm into last"],
        ["8 channels out of a through norm into last"],
    ),
    "recurrent": (
        lambda: Rows(
            recurrent,
            embedding=nn.Embedding(11, 6),
            lstm=nn.LSTM(6, 8, num_layers=2, batch_first=True),
            gru=nn.GRU(8, 8, batch_first=True, bidirectional=True),
            last=nn.Linear(16, 5),
        ),
        torch.randint(0, 11, (2, 7)),
        ["6 channels out of embedding into lstm", "8 channels out of lstm, gru into gru, last"],
        ["6 channels out of embedding into lstm", "8 channels out of lstm, gru into gru, last"],
    ),
    "borrowed": (
        lambda: Rows(borrowed, a=nn.Linear(4, 8), norm=nn.LayerNorm(8), last=nn.Linear(8, 5)),
        torch.randn(2, 4),
        ["8 channels out of a through norm into last"],
        ["8 channels out of a through norm into last"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_operators_of_other_networks(name: str) -> None:
    torch.manual_seed(0)
    build, x, depths, whole = OTHERS[name]
    net = build().eval()
    for heads, wanted in ((False, depths), (True, whole)):
        assert [str(g) for g in check_exact(net, own=False, heads=heads, x=x)] == wanted


def test_attention_modules_are_split() -> None:
    net = Rows(
        lambda net, x: net.last(net.attention(x, x, x, need_weights=False)[0]),
        attention=nn.MultiheadAttention(12, 3, batch_first=True),
        last=nn.Linear(12, 5),
    ).eval()
    x = torch.randn(2, 7, 12)
    captured = capture(net, Inputs(example={"x": x}))
    split_attention(captured, Inputs(example={"x": x}))
    coupling = couple(captured, net, heads=True)
    removal = [(g, [1]) for g in coupling.groups if not g.protected]
    names = [g.name for g, _ in removal]
    assert names == ["attention.in_projection", "attention.out_proj"]
    with torch.no_grad():
        found, wanted = coupling.cut(removal)(x=x), coupling.masked(removal)(x=x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_norm_counts_what_is_gone_as_zero() -> None:
    """Against the whole layer norm, given zeros: also when channels go twice."""
    torch.manual_seed(0)
    whole = nn.LayerNorm(8)
    nn.init.normal_(whole.weight)
    nn.init.normal_(whole.bias)
    part = without(without(whole, {1, 6}), {0})
    x = torch.randn(3, 8)
    kept = [2, 3, 4, 5, 7]
    zeroed = torch.zeros(3, 8)
    zeroed[:, kept] = x[:, kept]
    torch.testing.assert_close(part(x[:, kept]), whole(zeroed)[:, kept])
    assert part.arguments() == {"channels": 5, "gone": 3, "eps": 1e-5, "affine": True}


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y.relu_()
    return net.last(net.act(y) + y)


def negative(net: Any, x: Tensor) -> Tensor:
    return net.last(net.a(x)[:, -6:-1])


def merged(net: Any, x: Tensor) -> Tensor:
    """The batch lies in one dimension with the rows."""
    return net.last(F.relu(net.a(x.reshape(-1, 4))).reshape(x.shape[0], -1, 8)).sum(1)


def named(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x).split([3, 5], dim=1)
    return net.last(torch.cat([b, a], axis=1))


def split_twice(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x).split([4, 4], 1)
    return net.last(a) + net.other(b)


def broadcast(net: Any, x: Tensor) -> Tensor:
    return net.last(torch.broadcast_to(net.a(x)[:, None], (3, 2, 8)).sum(1))


@pytest.mark.parametrize("call", [in_place, negative, merged, named, split_twice, broadcast])
def test_forwards_that_need_care(call: Any) -> None:
    torch.manual_seed(0)
    net = Rows(
        call,
        a=nn.Linear(4, 8),
        act=nn.ReLU(inplace=True),
        last=nn.Linear({negative: 5, split_twice: 4}.get(call, 8), 5),
        other=nn.Linear(4, 5),
    ).eval()
    x = torch.randn(3, 2, 4) if call is merged else torch.randn(3, 4)
    captured = capture(net, Inputs(example={"x": x}))
    torch.testing.assert_close(captured(x=x), net(x=x))
    groups = check_exact(net, own=False, x=x)
    names = [g.name for g in groups]
    assert len(set(names)) == len(names)
    assert all(name.startswith("a") for name in names)


def test_macs_count_the_rows_of_a_merged_batch() -> None:
    net = Rows(merged, a=nn.Linear(4, 8), last=nn.Linear(8, 5)).eval()
    for batch in (2, 3):
        coupling = coupling_of(net, x=torch.randn(batch, 6, 4))
        assert coupling.macs() == 6 * (4 * 8 + 8 * 5)


def test_half_precision_is_masked() -> None:
    net = Rows(negative, a=nn.Linear(4, 8), last=nn.Linear(5, 5)).eval().bfloat16()
    coupling = coupling_of(net, x=torch.randn(2, 4, dtype=torch.bfloat16))
    group = next(g for g in coupling.groups if not g.protected)
    masked, cut = coupling.masked([(group, [1])]), coupling.cut([(group, [1])])
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(cut(x=x), masked(x=x), rtol=2e-2, atol=2e-2)
