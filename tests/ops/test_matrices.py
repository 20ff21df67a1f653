"""Layers as matrices: what they multiply is what the layer computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.ops import matrices as module
from tersor.ops.matrices import input_channels, input_rows, matrices, unmatrices

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (3, 4, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 7)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=1), (2, 2, 4, 5, 6)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (2, 8, 6, 6)),
    "depthwise": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "dilated": (nn.Conv2d(4, 4, (3, 2), dilation=(2, 1), padding=2), (2, 4, 9, 9)),
    "same": (nn.Conv2d(4, 4, (3, 5), padding="same"), (2, 4, 7, 7)),
    "reflected": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "circular": (nn.Conv1d(4, 4, 3, padding=2, padding_mode="circular"), (2, 4, 7)),
}


def outputs(layer: Any, x: Tensor) -> Tensor:
    """Compute a layer by its matrices: (G, N, R) -> (B, O, *places)."""
    rows_GNC = torch.cat(list(input_rows(layer, x)), 1)
    made_GNR = rows_GNC @ matrices(layer).mT
    wanted = layer(x)
    if isinstance(layer, nn.Linear):
        return (made_GNR[0] + layer.bias).view(wanted.shape)
    flat_ON = made_GNR.transpose(1, 2).flatten(0, 1)
    batch, places = len(x), wanted.shape[2:]
    by_batch = flat_ON.view(len(flat_ON), batch, *places).transpose(0, 1)
    return by_batch + layer.bias.view(-1, *[1] * len(places))


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrices_is_the_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = layer(x)
        assert torch.allclose(outputs(layer, x), wanted, atol=1e-5)
        monkeypatch.setattr(module, "_CHUNK", 1)  # one row, or one image, at a time
        assert len(list(input_rows(layer, x))) > 1
        assert torch.allclose(outputs(layer, x), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        *(layer for layer, _ in LAYERS.values()),
        nn.ConvTranspose2d(8, 12, 3, groups=4),
        nn.ConvTranspose1d(4, 6, 2),
    ],
)
def test_unmatrices_is_the_inverse(layer: Any) -> None:
    made = matrices(layer)
    assert torch.equal(unmatrices(layer, made), layer.weight)
    assert made.shape[2] % input_channels(layer) == 0


def test_neighboring_columns_are_input_channels() -> None:
    layer = nn.Conv2d(4, 2, 3)
    flat = layer.weight.detach().permute(0, 2, 3, 1).reshape(1, 2, 36)
    assert torch.equal(matrices(layer), flat)
    up = nn.ConvTranspose2d(4, 2, 3)
    assert torch.equal(matrices(up), up.weight.detach().permute(1, 2, 3, 0).reshape(1, 2, 36))


def test_one_image_without_a_batch_is_a_batch_of_one() -> None:
    layer = nn.Conv2d(3, 8, 3)
    x = torch.randn(3, 5, 5)
    (alone,), (batched,) = input_rows(layer, x), input_rows(layer, x.unsqueeze(0))
    assert torch.equal(alone, batched)
