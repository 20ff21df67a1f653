"""Batches in pieces, for networks that take one size."""

import numpy as np
import pytest
import torch

from tersor.core.errors import TargetError
from tersor.core.pieces import InPieces, in_pieces, narrowed


class Doubling:
    """Takes two samples, no more and no fewer."""

    def bind(self, inputs):
        assert len(inputs["x"]) == 2

        def call():
            return {"y": 2 * inputs["x"] + inputs.get("shift", 0), "scale": np.array(2.0)}

        return call

    def close(self):
        self.closed = True


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_any_number_of_samples(count):
    x = np.arange(count * 3.0).reshape(count, 3)
    made = InPieces(Doubling(), 2).bind({"x": x})()
    assert np.array_equal(made["y"], 2 * x)
    assert made["scale"] == 2.0


def test_inputs_without_samples_go_to_every_piece():
    x, shift = np.ones((5, 1)), np.full(1, 10.0)
    made = InPieces(Doubling(), 2, sampled=frozenset(["x"])).bind({"x": x, "shift": shift})()
    assert np.array_equal(made["y"], np.full((5, 1), 12.0))


def test_inputs_must_agree():
    with pytest.raises(TargetError, match=r"inputs have different numbers of samples: \[1, 2\]"):
        InPieces(Doubling(), 2).bind({"x": np.ones(2), "z": np.ones(1)})


def test_closing_closes_what_is_inside():
    inner = Doubling()
    InPieces(inner, 2).close()
    assert inner.closed


def test_examples_are_narrowed_and_repeated():
    example = {"x": torch.arange(2.0), "table": torch.ones(3)}
    free = {"x": {0: "batch"}}
    assert narrowed(example, 1, free)["x"].tolist() == [0.0]
    assert narrowed(example, 5, free)["x"].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert narrowed(example, 5, free)["table"].shape == (3,)


def test_a_number_goes_to_every_piece():
    made = InPieces(Doubling(), 2).bind({"x": np.ones((3, 1)), "shift": np.array(1.0)})()
    assert np.array_equal(made["y"], np.full((3, 1), 3.0))


def test_an_output_of_the_whole_batch_is_not_that_of_a_piece():
    class Mean(Doubling):
        def bind(self, inputs):
            return lambda: {"mean": inputs["x"].mean()}

    x = np.array([1.0, 2.0, 3.0])
    with pytest.raises(TargetError, match=r"output 'mean' of shape \(\) has no axis of 2 samples"):
        InPieces(Mean(), 2).bind({"x": x})()
    assert InPieces(Mean(), 2).bind({"x": x[:2]})()["mean"] == 1.5


def test_inputs_of_another_first_size_have_no_samples():
    made = in_pieces(Doubling(), {"n": (), "x": (2, 1), "shift": (1,)})
    x = np.arange(5.0).reshape(5, 1)
    found = made.bind({"x": x, "shift": np.full(1, 10.0), "n": np.array(3)})()
    assert np.array_equal(found["y"], 2 * x + 10)
    inner = Doubling()
    assert in_pieces(inner, {"n": ()}) is inner
