"""Half precision: noted on the network, computed by the runtime, refused where it cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.core import plugins
from tersor.core.errors import TargetError
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.quantization.half import Half, half
from tests import networks


def test_format_is_noted(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net, target=Target(runtime="openvino"))
    made = half(net, Half(format="fp16"), context)
    assert made.tersor_precision == "fp16"
    assert context.facts == {"format": "fp16"}


def test_runtime_without_it_is_refused(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net, target=Target(runtime="onnxruntime"))
    with pytest.raises(
        TargetError,
        match=r"onnxruntime:cpu has no kernels that compute in bf16; use one of the runtimes .*openvino.*, or the step static",
    ):
        half(net, Half(), context)


@pytest.mark.parametrize("runtime", ["torch_eager", "openvino"])
def test_outputs_are_near_and_not_equal(runtime: str, tiny_context: Any, tmp_path: Path) -> None:
    found = plugins.runtime(runtime)
    for package in found.to_run:
        pytest.importorskip(package)
    target = Target(runtime=runtime, options={"threads": 1})
    net = half(networks.tiny_cnn(), Half(), tiny_context(networks.tiny_cnn(), target=target))
    files = found.export(lower(net, found.takes, networks.inputs()), tmp_path, networks.inputs())
    try:
        runner = found.load(
            files[0], Target(runtime=runtime, options={"threads": 1, "precision": "bf16"})
        )
    except TargetError as error:
        pytest.skip(str(error))
    x = networks.digits()[0][:64]
    with torch.no_grad():
        wanted = net(x).numpy()
    moved = np.abs(next(iter(runner.bind({"x": x.numpy()})().values())) - wanted).max()
    assert 0 < moved < 0.05 * np.abs(wanted).max()
