"""Masks: the lowest scores go, and what went stays away until the end, or is said."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import trainer
from tersor.core.context import Batch
from tersor.core.errors import RecipeError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.ops import masks
from tersor.ops.capture import capture
from tersor.ops.fold import fold_batch_norms
from tests import networks

Make = Callable[..., Any]


def loss(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch["x"]), batch["labels"])


def pruned(sparsity: float = 0.8) -> tuple[nn.Module, dict[str, Tensor]]:
    net = networks.tiny_cnn()
    chosen, _ = masks.prunable(net, Layers())
    keep = masks.choose({n: w.weight.detach().abs() for n, w in chosen.items()}, sparsity)
    masks.hold(net, keep)
    return net, keep


def filled(net: nn.Module, keep: dict[str, Tensor]) -> int:
    return sum(int((net.get_submodule(n).weight[~k] != 0).sum()) for n, k in keep.items())


def reference(scores: dict[str, Tensor], sparsity: float) -> dict[str, list[bool]]:
    """One threshold for all, in plain loops."""
    flat = [(float(v), i, n) for n, s in scores.items() for i, v in enumerate(s.flatten())]
    order = {n: k for k, n in enumerate(scores)}
    flat.sort(key=lambda entry: (entry[0], order[entry[2]], entry[1]))
    dropped = {(n, i) for _, i, n in flat[: int(sparsity * len(flat) + 1e-6)]}
    return {n: [(n, i) not in dropped for i in range(s.numel())] for n, s in scores.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.87])
def test_the_lowest_scores_go(sparsity: float) -> None:
    scores = {"a": torch.rand(5, 7), "b": torch.rand(3, 2, 3) * 0.7 + 0.2}
    scores["a"][0, :3] = 0.25  # ties
    found = masks.choose(scores, sparsity, "global")
    wanted = reference(scores, sparsity)
    assert {n: k.flatten().tolist() for n, k in found.items()} == wanted
    for name, keep in masks.choose(scores, sparsity).items():
        assert keep.shape == scores[name].shape
        assert keep.flatten().tolist() == reference({name: scores[name]}, sparsity)[name]


def test_decimal_shares_are_whole_weights() -> None:
    assert masks.num_dropped(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996


def test_a_layer_that_would_be_emptied_is_refused() -> None:
    scores = {"a": torch.full((4,), 0.1), "b": torch.ones(6)}
    with pytest.raises(UnfitError, match="would leave no weight in layer 'a'; use scope: layer, a"):
        masks.choose(scores, 0.5, "global")
    with pytest.raises(UnfitError, match=r'or leave it out: layers: \["!a"\]') as caught:
        masks.choose({"a": torch.ones(4)}, 1 - 1e-9)
    assert caught.value.too_strong


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(StepError, match="layer 'a': 1 of 2 scores are not finite"):
        masks.choose({"a": torch.tensor([1.0, float("nan")])}, 0.5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_through_training(optimizer: Any, tiny_context: Make) -> None:
    net, keep = pruned()
    before = copy.deepcopy(net)

    def fit(*args: Any, **settings: Any) -> nn.Module:
        return trainer.fit(*args, **settings, optimizer=optimizer)

    context = tiny_context(net, fit=masks.holding(fit))
    trained = context.fit(net, loss, batches=context.data.train, epochs=1, lr=0.01)
    assert filled(trained, keep) == 0
    assert all(
        not torch.equal(trained.get_submodule(n).weight, before.get_submodule(n).weight)
        for n in keep
    )
    assert masks.settle(trained) is trained
    assert not any(p._backward_hooks for p in trained.parameters())


def test_dense_networks_train_as_without() -> None:
    batches = networks.split(0, 256)
    plain = trainer.fit(networks.tiny_cnn(), loss, batches=batches, epochs=1)
    held = masks.holding(trainer.fit)(networks.tiny_cnn(), loss, batches=batches, epochs=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), held.state_dict().values(), strict=True)
    )


def test_zeros_stay_in_a_captured_and_folded_copy(tiny_context: Make) -> None:
    net, keep = pruned()
    captured = capture(net, networks.inputs())
    fold_batch_norms(captured, networks.inputs())
    captured = copy.deepcopy(captured)
    context = tiny_context(net)
    trained = context.fit(captured, loss, batches=context.data.train, epochs=0.3)
    assert filled(trained, keep) == 0
    masks.settle(trained)


def test_a_network_that_came_in_sparse_stays_so() -> None:
    net, keep = pruned(0.05)
    again = networks.tiny_cnn(trained=False)
    again.load_state_dict(net.state_dict())
    masks.holding(trainer.fit)(again, loss, batches=networks.split(0, 256), epochs=1)
    assert filled(again, keep) == 0


def test_layers_that_are_zero_as_a_whole_are_trained() -> None:
    net = networks.tiny_cnn()
    nn.init.zeros_(net.fc.weight)  # type: ignore[arg-type]
    masks.holding(trainer.fit)(net, loss, batches=networks.split(0, 256), epochs=1)
    assert net.fc.weight.count_nonzero() > 100  # type: ignore[operator, union-attr]


def test_a_stopped_training_goes_on_with_its_zeros(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise StopError

    def train(file: str, on_step: Any = None) -> nn.Module:
        net, _ = pruned()
        return masks.holding(trainer.fit)(
            net,
            loss,
            batches=networks.split(0, 256),
            epochs=3,
            checkpoint=tmp_path / file,
            on_step=on_step,
        )

    whole = train("whole")
    with pytest.raises(StopError):
        train("parts", stop)
    resumed = train("parts")
    assert filled(resumed, pruned()[1]) == 0
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def ignores(net: nn.Module, loss: Any, *, batches: Any, **_: Any) -> nn.Module:
    """Train, as many do, on a copy."""
    net = copy.deepcopy(net).train()
    optimizer = torch.optim.Adam(net.parameters())
    for batch in batches:
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
    return net.eval()


def test_a_trainer_that_ignores_the_mask_is_told() -> None:
    net, _ = pruned()
    with pytest.raises(
        StepError,
        match=r"the trainer ignored the mask of 'conv1\.weight': \d\d of its 57 pruned weights are "
        r"not zero any more; train the very network that fit is given",
    ):
        masks.holding(ignores)(net, loss, batches=networks.split(0, 256), epochs=1)


def test_a_trainer_that_returns_another_network_is_told() -> None:
    net, _ = pruned()
    with pytest.raises(StepError, match=r"returned a network without 'conv1\.weight'; train the"):
        masks.holding(lambda *_, **__: nn.Linear(2, 2))(net, loss, batches=[], epochs=1)


def test_a_step_that_fills_zeros_is_found_at_the_end_of_the_stage() -> None:
    net, _ = pruned()
    with torch.no_grad():
        net.block1.conv1.weight.add_(1e-3)  # type: ignore[union-attr, operator]
    with pytest.raises(
        StepError,
        match=r"layer 'block1\.conv1' was pruned to 79\.86% zeros, but 460 of these 460 weights are "
        r"not zero at the end of the stage; .* context\.fit",
    ):
        masks.settle(net)


def test_what_cannot_be_held_changes_nothing() -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    fits = torch.zeros(10, 16, dtype=torch.bool)
    with pytest.raises(StepError, match=r"no layer 'fcc' with a weight\. Did you mean 'fc'\?"):
        masks.hold(net, {"fc": fits, "fcc": fits})
    with pytest.raises(StepError, match=r"of layer 'fc' is torch.float32 \(10, 16\), but its wei"):
        masks.hold(net, {"fc": fits.float()})
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_masks_add_up() -> None:
    net = networks.tiny_cnn()
    first, second = torch.rand(10, 16) > 0.5, torch.rand(10, 16) > 0.5
    masks.hold(net, {"fc": first})
    masks.hold(net, {"fc": second})
    assert torch.equal(net.fc.weight != 0, first & second)  # type: ignore[union-attr]
    masks.settle(net)


# --- which layers ------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_a_shared_weight_is_pruned_once() -> None:
    chosen, left = masks.prunable(Tied(), Layers())
    assert list(chosen) == ["a", "c"]
    assert left == {"b": "shares the weight of 'a', which is pruned"}
    chosen, left = masks.prunable(Tied(), Layers(patterns=("c",)))
    assert list(chosen) == ["c"]
    assert left == {"a": "excluded by layers", "b": "excluded by layers"}
    with pytest.raises(
        StepError, match="layers 'a' and 'b' share one weight, but only one of them"
    ):
        masks.prunable(Tied(), Layers(patterns=("*", "!b")))


def test_what_cannot_be_pruned_is_said() -> None:
    with pytest.raises(StepError, match="layers excludes everything that could be pruned: a, b, c"):
        masks.prunable(Tied(), Layers(patterns=("!*",)))
    with pytest.raises(RecipeError, match="pattern 'd' matches no layer"):
        masks.prunable(Tied(), Layers(patterns=("d",)))
    with pytest.raises(UnfitError, match=r"no layer of ReLU can be pruned \(it has none\)"):
        masks.prunable(nn.ReLU(), Layers())
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(
        UnfitError, match=r"can be pruned \('0': its weight is computed from others"
    ):
        masks.prunable(net, Layers())
