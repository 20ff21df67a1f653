import numpy as np

from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics.accuracy import accuracy
from tersor.metrics.top_k import top_k

TARGET = Target(runtime="onnxruntime")


def test_top_five_of_ten_classes() -> None:
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(400, 10)), rng.integers(0, 10, 400)
    found = top_k(Subject(target=TARGET, outputs=outputs, labels=labels, split="validation"))
    wanted = [label in np.argsort(-row)[:5] for row, label in zip(outputs, labels, strict=True)]
    assert found.value == 100 * np.mean(wanted)
    assert found.conditions == {"split": "validation", "k": 5}
    assert found.how == "top-5 over 400 samples on validation"


def test_with_few_classes_not_all_of_them_count() -> None:
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(300, 3)), rng.integers(0, 3, 300)
    found = top_k(Subject(target=TARGET, outputs=outputs, labels=labels))
    assert found.conditions == {"k": 2}
    assert 40 < found.value < 90
    two = Subject(target=TARGET, outputs=outputs[:, :2], labels=labels % 2)
    assert top_k(two).value == accuracy(two).value
