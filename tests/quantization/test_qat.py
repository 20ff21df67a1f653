"""Quantization-aware training: recovery, agreement with the integer runtimes, distillation."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core import plugins
from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.core.runtime import Target
from tersor.distillation.distill_logits import DistillLogits, distill_logits
from tersor.ops.fake_quantize import settle
from tersor.ops.lower import lower
from tersor.quantization.progressive import Progressive, progressive
from tersor.quantization.qat import Qat, qat
from tersor.quantization.static import Static, static
from tests import networks


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        right = [(net(b["x"]).argmax(1) == b["labels"]).float() for b in networks.split(1200, 1797)]
    return 100 * float(torch.cat(right).mean())


@pytest.mark.parametrize("ranges", ["learned", "observed"])
def test_recovers_what_few_bits_lost(ranges: Any, tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    lost = accuracy(static(copy.deepcopy(net), Static(weight_bits=2), tiny_context(net)))
    config = Qat(epochs=3, weight_bits=2, ranges=ranges)
    made = settle(qat(copy.deepcopy(net), config, tiny_context(net)))
    assert accuracy(made) > lost + 20


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("make", [networks.tiny_cnn, networks.tiny_transformer])
def test_runtimes_agree_with_what_was_trained(
    make: Any, runtime: str, tiny_context: Any, tmp_path: Path
) -> None:
    """Within one step of the last rounding, on 99.9 % of the outputs; the same class."""
    pytest.importorskip(runtime)
    net = make()
    context = tiny_context(net, target=Target(runtime=runtime))
    fake = qat(net, Qat(epochs=0.5), context)
    x = networks.digits()[0]
    with torch.no_grad():
        trained = fake(x)
        made = settle(fake)(x)
    step = float(made.max() - made.min()) / 255
    # biases went to their grid
    assert float(((made - trained).abs() <= step).float().mean()) >= 0.99
    found = plugins.runtime(runtime)
    files = found.export(lower(fake, "onnx", networks.inputs()), tmp_path, networks.inputs())
    runner = found.load(files[0], Target(runtime=runtime, options={"threads": 1}))
    outputs = next(iter(runner.bind({"x": x.numpy()})().values()))
    runner.close()
    # 1797 images: one may lie between two codes
    assert np.mean(np.abs(outputs - made.numpy()) <= step) >= 0.999
    assert np.sum(outputs.argmax(1) != made.argmax(1).numpy()) <= 1


def test_distillation_trains_the_rounding_in_the_same_stage(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    unlabelled = [{"x": b["x"]} for b in networks.split(0, 1200)]
    context = replace(context, data=replace(context.data, train=unlabelled))
    prepared = qat(copy.deepcopy(net), Qat(epochs=0, weight_bits=3), context)
    before = accuracy(prepared)
    student = distill_logits(prepared, DistillLogits(epochs=3, hard=0), context)
    assert all(bool(m.frozen) for m in student.modules() if hasattr(m, "frozen"))
    assert accuracy(settle(student)) > max(before, 80)


def test_progressive_ends_at_the_last_bits(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    config = Progressive(weight_bits=(4, 3, 2), epochs=3)
    made = settle(progressive(copy.deepcopy(net), config, tiny_context(net)))
    assert {m.bits for m in made.modules() if hasattr(m, "bits")} == {2}
    lost = accuracy(static(copy.deepcopy(net), Static(weight_bits=2), tiny_context(net)))
    assert accuracy(made) > lost + 20


def test_bad_settings_and_data(tiny_context: Any) -> None:
    with pytest.raises(ValueError, match="weight_bits must fall from at most 8"):
        Progressive(weight_bits=(4, 8))
    with pytest.raises(ValueError, match="freeze must be in"):
        Qat(freeze=2)
    net = networks.tiny_cnn()
    context = tiny_context(net)
    with pytest.raises(DataError, match="qat needs training data"):
        qat(copy.deepcopy(net), Qat(), replace(context, data=replace(context.data, train=None)))
    with pytest.raises(UnfitError, match="no layer of this network can get integer weights"):
        qat(copy.deepcopy(net), Qat(layers=Layers(patterns=("!*",))), context)
