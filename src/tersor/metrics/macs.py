"""Multiply-accumulates of one sample."""

import warnings
from typing import Any

import numpy as np

from tersor.core.errors import ModelError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.runtime import Arrays
from tersor.metrics import _conditions


@metric(unit="1", better="lower", needs=("net", "inputs"))
def macs(subject: Subject) -> Measurement:
    """Count in convolutions, matrix products, attention and recurrent layers, at any precision.

    Raises:
        ModelError: the network fails on the inputs, or its operators cannot be counted.
    """
    assert subject.inputs is not None
    batch = _conditions.batch(subject)
    total = count(subject.net, subject.inputs[0])
    return Measurement(
        metric="macs",
        value=total / batch,
        unit="1",
        better="lower",
        how=f"multiply-accumulates of one sample, counted at batch {batch}",
    )


def count(net: Any, inputs: Arrays) -> float:
    """Count multiply-accumulates of one batch of a network in any form."""
    if type(net).__name__ == "ModelProto":
        from tersor.ops import onnx_count

        return onnx_count.count_macs(net, inputs)
    return _torch(net, inputs)


def _torch(net: Any, inputs: Arrays) -> float:
    """Run once with fused kernels off, since the counter does not see inside them."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    call = net.module() if isinstance(net, torch.export.ExportedProgram) else net
    device = next((p.device for p in call.parameters()), torch.device("cpu"))
    tensors = {n: torch.from_numpy(np.array(a)).to(device) for n, a in inputs.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
            torch.backends.mkldnn.flags(enabled=False),  # type: ignore[no-untyped-call]  # torch has no types here
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call(**tensors)
    except Exception as error:
        raise ModelError(
            f"counting multiply-accumulates failed while running the network: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops()) / 2
