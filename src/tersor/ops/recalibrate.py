"""Batch norm statistics of a network that was cut: use the batch's own, or estimate them anew."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.context import Batch
from tersor.ops.losses import call


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """List the batch norms that keep running statistics."""
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Let batch norms use each batch's own statistics inside; the running ones stay as they are."""
    found = batch_norms(net)
    held = [(m.training, m.momentum) for m in found]
    counts = [
        m.num_batches_tracked.clone() if m.num_batches_tracked is not None else None for m in found
    ]
    for m in found:
        m.training, m.momentum = True, 0.0
    try:
        yield
    finally:
        for m, (training, momentum), count in zip(found, held, counts, strict=True):
            m.training, m.momentum = training, momentum
            if count is not None and m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(count)


def recalibrate(net: nn.Module, batches: Iterable[Batch]) -> int:
    """Estimate the running statistics anew, as the mean over `batches`; no gradient, no label.

    Args:
        net: Changed in place; every other layer stays in eval mode.
        batches: Calibration data; batches of one sample are left out.

    Returns:
        How many batch norms there are.

    Source:
        Wu and Johnson, arXiv:2105.07576, section 3 ("precise" batch norm statistics).
    """
    net.eval()
    found = batch_norms(net)
    if not found:
        return 0
    usable = [b for b in batches if len(next(iter(b.values()))) > 1]
    if not usable:
        return 0
    momenta = [m.momentum for m in found]
    for m in found:
        m.reset_running_stats()
        m.training, m.momentum = True, None
    try:
        with torch.no_grad():
            for batch in usable:
                call(net, batch)
    finally:
        for m, momentum in zip(found, momenta, strict=True):
            m.training, m.momentum = False, momentum
    return len(found)
