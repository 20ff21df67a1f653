"""Folding against the two layers in float64, and which pairs are found."""

import pytest
import torch
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops.capture import capture
from tersor.ops.fold import batch_norm_affine, find_batch_norms, fold_batch_norm


def trained(bn: nn.Module) -> nn.Module:
    """Give a batch norm statistics and weights that are no neutral ones."""
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.1, 3)
        if bn.weight is not None:
            bn.weight.normal_()
            bn.bias.normal_()
    return bn.eval()


LAYERS = {
    "conv1d": (lambda b: nn.Conv1d(4, 6, 3, bias=b), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (
        lambda b: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=b),
        nn.BatchNorm2d,
        (2, 4, 8, 8),
    ),
    "grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (2, 4, 8, 8)),
    "conv3d": (lambda b: nn.Conv3d(4, 6, 2, bias=b), nn.BatchNorm3d, (2, 4, 4, 4, 4)),
    "transposed": (lambda b: nn.ConvTranspose2d(4, 6, 2, 2, bias=b), nn.BatchNorm2d, (2, 4, 5, 5)),
    "transposed grouped": (
        lambda b: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=b),
        nn.BatchNorm2d,
        (2, 4, 5, 5),
    ),
    "linear": (lambda b: nn.Linear(4, 6, bias=b), nn.BatchNorm1d, (3, 4)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_fold_equals_both_layers(kind: str, bias: bool, affine: bool) -> None:
    make, norm, shape = LAYERS[kind]
    layer, bn = make(bias).double(), trained(norm(6, affine=affine)).double()
    x = torch.randn(shape, dtype=torch.float64)
    wanted = bn(layer(x))
    fold_batch_norm(layer, bn)
    # float64 throughout: only the order of a few multiplications differs
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_affine_is_what_eval_mode_computes() -> None:
    bn = trained(nn.BatchNorm1d(5)).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    scale, shift = batch_norm_affine(bn)
    wanted = torch.empty_like(x)
    for i in range(7):
        for c in range(5):
            deviation = (bn.running_var[c] + bn.eps).sqrt()
            wanted[i, c] = (x[i, c] - bn.running_mean[c]) / deviation * bn.weight[c] + bn.bias[c]
    torch.testing.assert_close(x * scale + shift, wanted)


class Cases(nn.Module):
    """Every way in which a pair must, or must not, be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.good_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.read_twice, self.read_twice_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.shared, self.shared_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.between, self.between_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.blind, self.blind_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.tied, self.tied_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.tied.weight
        self.tokens, self.tokens_bn = nn.Linear(9, 9), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.good_bn(self.good(x))
        y = self.read_twice(x)
        x = self.read_twice_bn(y) + y
        x = self.shared(self.shared_bn(self.shared(x)))
        x = self.between_bn(torch.relu(self.between(x)))
        x = self.blind_bn(self.blind(x))
        x = self.other(self.tied_bn(self.tied(x)))
        return self.tokens_bn(self.tokens(x.flatten(2)))


def test_only_safe_pairs_are_found() -> None:
    captured = capture(Cases().eval(), Inputs(example={"x": torch.randn(2, 3, 3, 3)}))
    assert find_batch_norms(captured) == [("good", "good_bn")]


class Alias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.again = nn.ModuleList([self.bn])

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](self.layer(x))


def test_a_module_under_two_names_is_found() -> None:
    captured = capture(Alias().eval(), Inputs(example={"x": torch.randn(2, 3, 3, 3)}))
    ((layer, bn),) = find_batch_norms(captured)
    assert layer == "layer"
    assert bn in ("bn", "again.0")
