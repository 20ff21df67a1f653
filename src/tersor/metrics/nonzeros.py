"""Numbers of the network that are not zero: what pruning single weights lowers."""

from typing import Any

import torch

from tersor.core.metric import Measurement, Subject, metric
from tersor.metrics.parameters import parts


@metric(unit="1", better="lower", needs=("net",))
def nonzeros(subject: Subject) -> Measurement:
    """Count the numbers that `parameters` counts, without those that are exactly zero.

    Of codes those other than 0 count; codes that are packed, or have a zero point of their own, all
    do.
    """
    return Measurement(
        metric="nonzeros",
        value=float(count(subject.net)),
        unit="1",
        better="lower",
        how="numbers other than zero in weights, biases and gains",
    )


def count(net: Any) -> int:
    """Count the numbers other than zero of a network in any form."""
    if type(net).__name__ == "ModelProto":
        from tersor.ops import onnx_count

        return onnx_count.count_parameters(net, zeros=False)
    return sum(int(torch.count_nonzero(tensor)) for tensor in parts(net))
