"""Shared weights: found by their values, and kept shared through training."""

from typing import Any

import pytest
import torch
from torch import nn

from tersor import trainer
from tersor.core.errors import StepError
from tersor.ops import masks
from tersor.ops.losses import labelled_loss
from tersor.ops.notes import note
from tersor.ops.sharing import find, holding, shared_weights
from tests import networks


def few(shape: tuple[int, ...], values: int = 8, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.linspace(-1, 1, values)[torch.randint(values, shape, generator=made)]


def test_few_values_are_found() -> None:
    weight = few((16, 4, 3, 3))
    found = find(weight)
    assert found is not None
    assert found.scale is None
    assert len(found.book) == 8
    assert torch.equal(found.values(), weight)


def test_rows_that_are_multiples_of_few_values_are_found() -> None:
    weight = few((16, 36))
    weight[:, 0] = 1  # the largest of each row
    scale = torch.rand(16, 1) + 0.1
    found = find(weight * scale)
    assert found is not None
    assert found.scale is not None
    assert len(found.book) == 8
    torch.testing.assert_close(found.values(), weight * scale, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),
        torch.zeros(16, 16),
        # large values beside many small ones, which must not be taken for one
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02 + torch.eye(64),
        torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 2e-5 + torch.eye(64),
        torch.randn(1, 70_000, generator=torch.Generator().manual_seed(0)),
        torch.full((16, 16), float("nan")),
        few((2, 2)),
        few((64,)),
        torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)),
    ],
)
def test_other_weights_share_nothing(weight: torch.Tensor) -> None:
    assert find(weight) is None


def test_the_projection_is_the_nearest_shared_weight() -> None:
    weight = few((16, 36))
    found = find(weight)
    assert found is not None
    moved = weight + 0.01 * torch.randn_like(weight)
    made = found.project(moved)
    for value in found.book:
        inside = weight == value.float()
        assert made[inside].unique().numel() == 1
        torch.testing.assert_close(made[inside][0], moved[inside].double().mean().float())


def linear(weight: torch.Tensor) -> nn.Linear:
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        net.weight.copy_(weight)
    note(net, shared=True)
    return net


def test_as_many_values_as_kmeans_gives_are_found_beside_zero() -> None:
    weight = few((64, 64), 256)
    weight[torch.rand(64, 64) < 0.5] = 0
    found = find(weight)
    assert found is not None
    assert torch.equal(found.values(), weight)
    assert find(torch.full((16, 16), 0.5)) is not None


def test_a_network_without_the_note_is_left_alone() -> None:
    net = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        net.weight.copy_(few((8, 64)))
    assert not shared_weights(net)


def test_what_is_pruned_while_training_stays_pruned() -> None:
    net = linear(few((8, 64)))
    gone = torch.rand(8, 64) < 0.5

    def prune(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        with torch.no_grad():
            net.weight.masked_fill_(gone, 0.0)  # type: ignore[operator]
        return net

    before = net.weight.detach().clone()
    holding(prune)(net, labelled_loss, batches=[], epochs=1)  # type: ignore[arg-type]
    assert torch.equal(net.weight.detach(), before.masked_fill(gone, 0.0))


def test_a_trainer_gets_the_arguments_that_it_was_called_with() -> None:
    seen: dict[str, Any] = {}

    def fit(net: nn.Module, loss: Any, **settings: Any) -> nn.Module:
        seen.update(settings)
        return net

    holding(fit)(linear(few((8, 64))), labelled_loss, batches=[], epochs=1)  # type: ignore[arg-type]
    assert set(seen) == {"batches", "epochs"}


def shared_net(scaled: bool, pruned: bool) -> nn.Module:
    net = networks.tiny_cnn(trained=False)
    note(net, shared=True)
    for layer in (net.block1.conv1, net.fc):  # type: ignore[union-attr]
        weight: Any = layer.weight
        made = few(tuple(weight.shape))
        if scaled:
            made.flatten(1)[:, 0] = 1
            made = made * (torch.rand(len(made)) + 0.1).view(-1, *[1] * (made.dim() - 1))
        if pruned:
            made[torch.rand(made.shape) < 0.5] = 0
            made.flatten(1)[:, 0] = made.abs().amax() if not scaled else made.flatten(1)[:, 0]
        with torch.no_grad():
            weight.copy_(0.3 * made)
    return net


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_training_moves_values_and_shares_them_still(
    scaled: bool, pruned: bool, optimizer: Any
) -> None:
    net = shared_net(scaled, pruned)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    shared = shared_weights(net)
    assert set(shared) == {"block1.conv1.weight", "fc.weight"}
    fit = holding(masks.holding(trainer.fit))
    fit(
        net,
        labelled_loss,
        batches=networks.split(0, 256),
        epochs=2,
        optimizer=optimizer,  # type: ignore[call-arg]  # trainer.fit has it
        threads=1,  # type: ignore[call-arg]
    )
    after = shared_weights(net)
    for name, old in shared.items():
        weight = net.get_parameter(name)
        assert not torch.equal(weight, before[name])
        assert torch.equal(weight == 0, before[name] == 0)
        assert len(after[name].book) <= len(old.book)
        assert torch.equal(after[name].codes, old.codes) or len(after[name].book) < len(old.book)
    assert not torch.equal(net.get_parameter("conv1.weight"), before["conv1.weight"])


def test_the_gradient_of_a_value_is_the_mean_of_its_weights() -> None:
    net = linear(few((8, 64)))
    start = net.weight.detach().clone()
    wanted = torch.randn(8, 64)

    def step(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        ((net.weight - wanted) ** 2).sum().backward()  # type: ignore[operator]
        with torch.no_grad():
            net.weight -= 0.1 * net.weight.grad  # type: ignore[operator]
        return net

    holding(step)(net, labelled_loss, batches=[], epochs=1)  # type: ignore[arg-type]
    for value in start.unique():
        inside = start == value
        gradient = (2 * (start - wanted))[inside].mean()
        torch.testing.assert_close(
            net.weight.detach()[inside], (value - 0.1 * gradient).expand(int(inside.sum()))
        )


def test_a_trainer_that_returns_another_network_is_refused() -> None:
    net = linear(few((8, 64)))

    def other(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        return nn.Sequential(net)

    with pytest.raises(StepError, match="the trainer returned a network without 'weight'"):
        holding(other)(net, labelled_loss, batches=[], epochs=1)  # type: ignore[arg-type]
