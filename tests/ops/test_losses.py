"""Losses told from labels, against sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.context import Data
from tersor.core.errors import DataError
from tersor.ops.losses import (
    class_dimension,
    divergence,
    first_output,
    infer_loss,
    task_loss,
)


def written_out(logits: list[float], label: int) -> float:
    top = max(logits)
    return math.log(sum(math.exp(v - top) for v in logits)) + top - logits[label]


def test_classes() -> None:
    outputs, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    wanted = sum(written_out(o.tolist(), int(y)) for o, y in zip(outputs, labels, strict=True)) / 5
    assert infer_loss(outputs, labels)(outputs, labels).item() == pytest.approx(wanted, rel=1e-5)


def test_classes_of_positions_and_pixels_agree() -> None:
    outputs, labels = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    wanted = (
        sum(
            written_out(outputs[i, t].tolist(), int(labels[i, t]))
            for i in range(2)
            for t in range(6)
        )
        / 12
    )
    assert infer_loss(outputs, labels)(outputs, labels).item() == pytest.approx(wanted, rel=1e-5)
    pixels = outputs.transpose(1, 2).reshape(2, 5, 2, 3)
    marks = labels.reshape(2, 2, 3).int()
    assert infer_loss(pixels, marks)(pixels, marks).item() == pytest.approx(wanted, rel=1e-5)


def test_label_left_out() -> None:
    outputs, labels = torch.randn(3, 4), torch.tensor([1, -100, 2])
    wanted = (written_out(outputs[0].tolist(), 1) + written_out(outputs[2].tolist(), 2)) / 2
    assert infer_loss(outputs, labels)(outputs, labels).item() == pytest.approx(wanted, rel=1e-5)


def test_numbers() -> None:
    outputs, labels = torch.tensor([[1.0], [4.0]]), torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert infer_loss(outputs, labels)(outputs, labels).item() == 2.5


def test_labels_that_do_not_fit() -> None:
    with pytest.raises(
        DataError,
        match=r"labels of shape \(3,\) and type torch.int64 do not fit outputs of shape \(2, 4\)",
    ):
        infer_loss(torch.randn(2, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="do not fit"):
        infer_loss(torch.randn(2, 4), torch.tensor([True, False]))


def test_more_classes_in_the_labels_than_in_the_network() -> None:
    labels = torch.tensor([0, 9])
    with pytest.raises(DataError, match="labels reach from 0 to 9, but the network has 4 classes"):
        infer_loss(torch.randn(2, 4), labels)(torch.randn(2, 4), labels)


def test_class_dimension_without_labels() -> None:
    assert class_dimension(torch.zeros(2, 7), None) == 1
    assert class_dimension(torch.zeros(2, 5, 7), None) == 2
    assert class_dimension(torch.zeros(2, 7, 4, 4), None) == 1
    assert class_dimension(torch.zeros(2, 1), None) is None
    assert class_dimension(torch.zeros(4), None) is None


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x, "logits": self.layer(x)}


def test_task_loss_calls_by_name_and_takes_logits() -> None:
    net, x, labels = Linear(), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    wanted = F.cross_entropy(net.layer(x), labels)
    torch.testing.assert_close(task_loss(Data())(net, {"x": x, "labels": labels}), wanted)
    with pytest.raises(DataError, match=r"a batch holds \['x'\] but no 'labels'"):
        task_loss(Data())(net, {"x": x})


def test_task_loss_is_the_users_own() -> None:
    def own(net: nn.Module, batch: object) -> Tensor:
        return torch.tensor(7.0)

    assert task_loss(Data(loss=own)) is own


def test_first_output() -> None:
    x = torch.ones(2)
    assert first_output(((x, 3), 4)) is x
    assert first_output({"scores": x}) is x
    with pytest.raises(DataError, match="the network returns str, not a tensor"):
        first_output("text")


def test_divergence_written_out() -> None:
    student, teacher, t = torch.randn(3, 4), torch.randn(3, 4), 2.0
    total = 0.0
    for s, q in zip(student.double(), teacher.double(), strict=True):
        p_teacher = [math.exp(v / t) for v in q.tolist()]
        p_student = [math.exp(v / t) for v in s.tolist()]
        for a, b in zip(p_teacher, p_student, strict=True):
            a, b = a / sum(p_teacher), b / sum(p_student)
            total += a * math.log(a / b)
    assert divergence(student, teacher, 1, t).item() == pytest.approx(t * t * total / 3, rel=1e-5)
    assert divergence(teacher, teacher, 1).item() == pytest.approx(0, abs=1e-6)
    assert divergence(student, teacher, None).item() == pytest.approx(
        F.mse_loss(student, teacher).item()
    )
