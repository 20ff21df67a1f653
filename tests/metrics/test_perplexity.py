import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from tersor.core.errors import DataError
from tests.metrics.subjects import answers, measured


def tokens(count: int = 20, length: int = 7) -> tuple[np.ndarray, np.ndarray]:
    outputs, labels = answers(count * length, classes=6)
    return outputs.reshape(count, length, 6), labels.reshape(count, length)


def by_hand(outputs: np.ndarray, labels: np.ndarray) -> float:
    nats = []
    for row, wanted in zip(outputs, labels, strict=True):
        for logits, label in zip(row, wanted, strict=True):
            if label >= 0:
                nats.append(math.log(sum(math.exp(x) for x in logits)) - logits[label])
    return math.exp(sum(nats) / len(nats))


def test_perplexity_counts_tokens_alike() -> None:
    outputs, labels = tokens()
    labels[0, 2:] = -100  # a short sample
    labels[3] = -100  # one without a token
    found = measured("perplexity", outputs, labels)
    assert found.value == pytest.approx(by_hand(outputs, labels))
    assert (found.unit, found.better) == ("1", "lower")
    assert found.conditions["labels"] == 20 * 7 - 5 - 7
    assert found.how == "exp of the mean cross-entropy of 128 labels over 19 samples on test"
    assert found.spread is not None
    assert 1 <= found.spread[0] < found.value < found.spread[1]


def test_logits_their_logarithms_and_probabilities_say_the_same() -> None:
    outputs, labels = tokens()
    shares = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    wanted = measured("perplexity", outputs, labels).value
    assert measured("perplexity", shares, labels).value == pytest.approx(wanted)
    assert measured("perplexity", np.log(shares), labels).value == pytest.approx(wanted)
    assert measured("perplexity", outputs + 1000, labels).value == pytest.approx(wanted)


def test_a_guess_among_all_is_as_many_choices() -> None:
    outputs, labels = np.zeros((8, 6)), np.arange(8) % 6
    assert measured("perplexity", outputs, labels).value == pytest.approx(6)


@pytest.mark.slow  # its import takes seconds
def test_perplexity_agrees_with_torchmetrics() -> None:
    text = pytest.importorskip("torchmetrics.functional.text")
    import torch

    outputs, labels = tokens()
    labels[0, 2:] = -100
    theirs = text.perplexity(torch.from_numpy(outputs), torch.from_numpy(labels), ignore_index=-100)
    assert measured("perplexity", outputs, labels).value == pytest.approx(float(theirs), rel=1e-5)


def test_perplexity_is_what_a_users_script_computes(workload: Callable[[str], ModuleType]) -> None:
    import torch

    outputs, labels = tokens()
    theirs = workload("language").metric(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert measured("perplexity", outputs, labels).value == pytest.approx(theirs)


def test_a_label_without_any_probability_is_refused() -> None:
    outputs = np.eye(3)
    with pytest.raises(
        DataError,
        match="perplexity is infinite: 1 of 3 samples have a label of probability 0; give logits",
    ):
        measured("perplexity", outputs, np.array([0, 1, 1]))
