"""The user's own data function."""

import pytest
import torch

from tersor.core.context import Data
from tersor.core.errors import DataError
from tersor.datasets import script

HEAD = """
import torch

class Batches:
    def __init__(self, count=3):
        self.count, self.seed = count, 0
    def __len__(self):
        return self.count
    def __iter__(self):
        for i in range(self.count):
            generator = torch.Generator().manual_seed(100 * self.seed + i)
            yield {"x": torch.randn(4, 2, generator=generator), "labels": torch.zeros(4, dtype=torch.long)}

def batch(n=4, labels=True):
    made = {"x": torch.ones(n, 2)}
    return {**made, "labels": torch.zeros(n, dtype=torch.long)} if labels else made
"""


@pytest.fixture
def place(tmp_path):
    def write(body: str) -> str:
        (tmp_path / "data.py").write_text(f"{HEAD}\ndef data():\n    {body}\n")
        return f"{tmp_path / 'data.py'}:data"

    return write


def test_splits_loss_and_quality_are_read(place):
    where = place(
        "return {'calibration': Batches(1), 'train': Batches(), 'test': [batch()], 'loss': lambda n, b: 0, 'quality': max}"
    )
    data = script.load(where)
    assert data.origin == f"script:{where}"
    assert data.validation is None
    assert data.quality is max
    assert callable(data.loss)
    assert len(list(data.train)) == len(data.train) == 3


def test_the_seed_reaches_the_users_object(place):
    train = script.load(place("return {'train': Batches(), 'test': Batches()}")).train
    first = next(iter(train))["x"]
    assert train.seed == 0
    train.seed = 5
    assert not torch.equal(first, next(iter(train))["x"])
    train.seed = 0
    assert torch.equal(first, next(iter(train))["x"])


def test_a_data_object_is_taken_too(place):
    data = script.load(place("from tersor.core.context import Data; return Data(test=Batches())"))
    assert isinstance(data, Data)
    assert data.train is None


def test_an_empty_training_split_means_none(place):
    assert script.load(place("return {'train': [], 'test': Batches()}")).train is None


def test_boxes_may_be_several_a_sample(place):
    script.load(
        place(
            "return {'test': [{'x': torch.ones(1, 3), 'labels': torch.ones(n, 5)} for n in (7, 2)]}"
        )
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 3", "returned int, not a mapping with calibration, train and test"),
        (
            "return {'trian': []}",
            "returned the unknown entry 'trian'. Did you mean 'train'? It may have calibration,",
        ),
        ("return {'test': Batches(), 'loss': 3}", "'loss' is int, not a function"),
        ("return {}", "have no split; give some of calibration, train, validation, test"),
        ("raise KeyError('x')", "failed: "),
        ("return {'test': 7}", "split 'test' is int, not a sequence of batches"),
    ],
)
def test_what_a_function_may_not_return(place, body, said):
    with pytest.raises(DataError) as caught:
        script.load(place(body))
    assert said in str(caught.value)


def test_real_workloads(workload, shared):
    for name in ("detection", "language"):
        data = script.load(f"{shared / 'workloads' / name}.py:data")
        assert next(iter(data.test))
