"""Training on the labels, through whichever trainer there is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.context import Data
from tersor.core.errors import DataError
from tersor.distillation.finetune import Finetune, finetune
from tests import networks

Make = Callable[..., Any]


def test_it_learns(tiny_context: Make) -> None:
    net = networks.tiny_cnn(trained=False)
    images, labels = networks.digits()
    context = tiny_context(net)
    finetune(net, Finetune(epochs=2, lr=0.1), context)
    assert (net(images[1200:]).argmax(1) == labels[1200:]).float().mean() > 0.7
    assert context.facts == {"epochs": 2}
    assert (context.work_dir / "finetune.safetensors").exists()


def test_the_trainer_may_be_the_users(tiny_context: Make) -> None:
    given: dict[str, Any] = {}

    def own(net: nn.Module, loss: Any, **settings: Any) -> nn.Module:
        given.update(settings, loss=loss)
        return net

    net = networks.tiny_cnn()
    context = tiny_context(net, fit=own, seed=5)
    assert finetune(net, Finetune(epochs=0.5), context) is net
    assert given["loss"] is context.loss
    assert (given["epochs"], given["lr"], given["seed"]) == (0.5, None, 5)


def test_zero_epochs_change_nothing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    finetune(net, Finetune(epochs=0), tiny_context(net))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_mistakes(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(DataError, match="finetune needs training data; give `train` batches"):
        finetune(net, Finetune(), tiny_context(net, data=Data()))
    with pytest.raises(ValueError, match="epochs must not be negative, got -2"):
        Finetune(epochs=-2)
    with pytest.raises(ValueError, match="lr must be positive, got -1"):
        Finetune(lr=-1)
