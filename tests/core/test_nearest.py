"""Names that are near to a word, and words that no name is near to."""

import difflib

import pytest

from tersor.core import plugins
from tersor.core.errors import suggest
from tersor.core.nearest import _typos, nearest
from tersor.core.recipe import recipes

METRICS = tuple(plugins.names("metrics"))
RUNTIMES = tuple(plugins.names("runtimes"))
DEVICES = ("cpu", "gpu", "npu", "tpu")


@pytest.mark.parametrize(
    ("word", "known", "wanted"),
    [
        ("latensy", METRICS, "latency"),
        ("acc", METRICS, "accuracy"),
        ("Accuracy", METRICS, "accuracy"),
        ("topk", METRICS, "top_k"),
        ("nett", ("Net", "net"), "net"),
        ("memory", METRICS, "peak_memory"),
        ("precision", METRICS, "mean_average_precision"),
        ("onnxrt", RUNTIMES, "onnxruntime"),
        ("onnx", RUNTIMES, "onnxruntime"),
        ("openvno", RUNTIMES, "openvino"),
        ("cup", ("cpu", "cuda"), "cpu"),
        ("nqu", DEVICES, "npu"),
        ("cpus", ("cpu", "cuda"), "cpu"),
        ("cnn-int8", recipes(), "cnn-int8-cpu"),
        ("calibratr", ("bits", "calibrator"), "calibrator"),
        ("block1.conf1", ("block1.conv1", "block2.conv1"), "block1.conv1"),
        ("int9", ("int8", "int4"), "int8"),
    ],
)
def test_a_misspelt_word_has_its_name(word: str, known: tuple[str, ...], wanted: str) -> None:
    assert suggest(word, known) == f" Did you mean {wanted!r}?"


@pytest.mark.parametrize("word", ["xyz", "", "bert", "resnet", "mobile", "dropout", "loss", "a"])
def test_a_word_of_its_own_has_none(word: str) -> None:
    names = {*METRICS, *RUNTIMES, *recipes(), *(t["name"] for t in plugins.catalog()["techniques"])}
    assert nearest(word, names) is None
    assert suggest(word, names) == ""


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("percentile", "perplexity"),
        ("speed", "mse"),
        ("fp16", "f1"),
        ("tflite", "fidelity"),
        ("pruning", "openvino"),
        ("keras", "kmeans"),
    ],
)
def test_pairs_that_are_alike_by_half_are_far(word: str, name: str) -> None:
    assert difflib.get_close_matches(word, [name], cutoff=0.5) == [name]
    assert nearest(word, [name]) is None


def test_typos_are_counted() -> None:
    assert _typos("latency", "latency") == 0
    assert _typos("latnecy", "latency") == 1  # swapped
    assert _typos("kitten", "sitting") == 3
    assert _typos("", "abc") == 3
