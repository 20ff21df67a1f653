"""TorchScript: a traced and frozen graph. PyTorch has deprecated it.

PyTorch keeps it for what is deployed already and develops it no further; torch_export and
torch_compile replace it, and exporting says so once. The network is traced in eval mode on the
example, compared with itself on a larger batch, and its weights are frozen in. Those of quantized
networks are floats in the file, and so is what they compute: rounding gains nothing here. Reading a
`.pt` file runs the code in it, so that it is read as part of an artifact only.
"""

import functools
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.core.errors import TargetError, last_line
from tersor.core.model import Inputs
from tersor.core.pieces import narrowed
from tersor.core.runtime import Runner, Runtime, Target
from tersor.ops.cuda_device import present

_TOLERANCE = 1e-3
"""Largest difference of a trace, relative to the largest output: other summation orders."""


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.pt` and `model.json`, the names of its inputs."""
    import torch

    _say_deprecated()
    example = {name: tensor.contiguous() for name, tensor in inputs.example.items()}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]  # not in the stubs
                net.eval(), example_kwarg_inputs=example, check_trace=False, strict=False
            )
            frozen = torch.jit.freeze(traced.eval())  # type: ignore[no-untyped-call]  # as above
    except Exception as error:
        raise TargetError(f"TorchScript cannot trace the network: {last_line(error)}") from error
    _check(net, frozen, inputs)
    file, beside = folder / "model.pt", folder / "model.json"
    frozen.save(str(file))
    beside.write_text(json.dumps({"inputs": list(example)}) + "\n", encoding="utf-8")
    return [file, beside]


def load(path: Path, target: Target) -> Runner:
    """Read the graph."""
    import torch

    from tersor.ops import modules, torch_runner

    assert modules  # registers the operators of quantized networks
    try:
        names = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{path.name} has no readable {path.stem}.json beside it; export the network again"
        ) from error
    # what tracing made constants moves only here; a device that is not there is refused below
    place = target.device if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = torch.jit.load(str(path), map_location=place)  # type: ignore[no-untyped-call]  # not in the stubs
    except Exception as error:
        raise TargetError(f"TorchScript cannot load {path.name}: {last_line(error)}") from error
    return torch_runner.TorchRunner(net, [str(name) for name in names], target)


@functools.cache
def _say_deprecated() -> None:
    logging.getLogger("tersor").warning(
        "PyTorch has deprecated TorchScript; prefer torch_export, or torch_compile for speed"
    )


def _check(net: Any, frozen: Any, inputs: Inputs) -> None:
    """Compare the trace with the network, on a larger batch where the batch is free.

    Raises:
        TargetError: they differ, as where a branch depends on the data or a size was frozen.
    """
    import torch

    samples = 1 + max(len(tensor) if tensor.dim() else 1 for tensor in inputs.example.values())
    batch = narrowed(inputs.example, samples, inputs.dynamic)
    with torch.no_grad():
        wanted = _tensors(net(**batch))
        try:
            found = _tensors(frozen(**batch))
        except RuntimeError as error:
            raise TargetError(
                f"the trace does not run on a batch of {samples}: it has frozen a size that "
                "depends on the batch, or a branch; choose the runtime torch_export"
            ) from error
    for one, other in zip(wanted, found, strict=True):
        finite = one[one.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        close = one.shape == other.shape and torch.allclose(
            other, one, rtol=0, atol=_TOLERANCE * (scale or 1.0), equal_nan=True
        )
        if not close:
            raise TargetError(
                f"the trace differs from the network on a batch of {samples}: a branch depends on "
                "the data, or a size was frozen; choose the runtime torch_export"
            )


def _tensors(made: Any) -> list[Any]:
    if isinstance(made, Mapping):
        return [tensor.double() for tensor in made.values()]
    return [t.double() for t in made] if isinstance(made, (tuple, list)) else [made.double()]


RUNTIME = Runtime(
    takes="module",
    devices=("cpu", "cuda"),
    export=export,
    load=load,
    present=present,
    runs_code=True,
    options=(
        "threads",
        "precision",
        "channels_last",
        "cudnn_autotune",
        "cuda_graphs",
        "stream",
    ),
    to_export=("torch",),
    to_run=("torch",),
)
