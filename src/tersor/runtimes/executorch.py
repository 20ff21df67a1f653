"""ExecuTorch with the XNNPACK delegate, for phones and boards.

Networks are exported for one batch size; other batches run in pieces. Quantized ones run in
integers where XNNPACK has an integer kernel: layers whose input and output are both rounded,
additions, concatenations and the like between roundings. A layer that writes floats, as the last
one does, gets its weights as floats in the file. What XNNPACK lacks runs in ExecuTorch's portable
kernels, one plain loop each. `operators.json`, beside the network, says what went where: how many
operators XNNPACK runs, which do not and how often, and which layers have float weights.

Threads belong to the process: networks that are loaded at one time share their number.
"""

import json
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs
from tersor.core.pieces import InPieces
from tersor.core.runtime import Arrays, Runner, Runtime, Signature, Target

_DTYPES: Mapping[int, str] = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
"""ExecuTorch's numbers of element types, which are those of torch."""
_INPUTS, _OUTPUTS = "tersor_inputs", "tersor_outputs"
"""Methods that return names: a method's own inputs and outputs have none."""
_OPEN: "weakref.WeakSet[_Runner]" = weakref.WeakSet()
"""Loaded networks, which hold on to the pool of threads that the process has."""


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.pte` and `operators.json`."""
    import warnings

    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from tersor.ops import signed_codes
    from tersor.ops.exported_names import output_names

    own = sorted({str(n.target) for n in net.graph.nodes if str(n.target).startswith("tersor.")})
    if own:
        raise TargetError(
            f"ExecuTorch has no kernel for {', '.join(own)}; leave out the step that makes it, or "
            "choose a target of PyTorch, such as torch_export"
        )
    outputs = output_names(net)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program, floats = signed_codes.rewritten(net, inputs)
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods={_INPUTS: "\n".join(inputs.example), _OUTPUTS: "\n".join(outputs)},
            )
            about = _operators(lowered.exported_program().graph_module)
            data = lowered.to_executorch().buffer
    except Exception as error:
        raise TargetError(f"ExecuTorch cannot take the network: {_plain(error)}") from error
    about["float_weights"] = list(floats)
    logging.getLogger("tersor").info(
        "executorch: XNNPACK runs %d operators; portable kernels run %s",
        about["delegated"],
        ", ".join(f"{count} {name}" for name, count in about["portable"].items()) or "none",
    )
    file, beside = folder / "model.pte", folder / "operators.json"
    file.write_bytes(data)
    beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return [file, beside]


def load(path: Path, target: Target) -> Runner:
    """Load the method `forward`."""
    program = _program(path)
    _set_threads(target.threads or usable_cores())
    runner = _Runner(program, path)
    size = _size(runner.signatures)
    return InPieces(runner, size) if size else runner


def inputs(path: Path) -> Mapping[str, Signature]:
    """Read what `forward` takes; where the file has no names, they are `input`, `input_1` ..."""
    program = _program(path)
    signatures = _signatures(program, path)
    if _INPUTS not in program.method_names or not _size(signatures):
        return signatures
    return {
        name: Signature(
            shape=("batch", *each.shape[1:]), dtype=each.dtype, usual=tuple(map(int, each.shape))
        )
        for name, each in signatures.items()
    }


def _numbered(word: str, count: int) -> list[str]:
    return [f"{word}_{i}" if i else word for i in range(count)]


def _operators(module: Any) -> dict[str, Any]:
    """Count what the delegate runs, and what it does not."""
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    delegated = sum(
        node.op == "call_function" and "getitem" not in str(node.target)
        for part in module.children()
        if isinstance(part, LoweredBackendModule)
        for node in part.original_module.graph.nodes
    )
    portable = Counter(
        node.target.name().replace("::", ".")
        for node in module.graph.nodes
        if node.op == "call_function" and hasattr(node.target, "name")
        if "executorch_call_delegate" not in str(node.target)
    )
    return {"delegated": int(delegated), "portable": dict(sorted(portable.items()))}


def _set_threads(count: int) -> None:
    from executorch.extension.pybindings import portable_lib

    now = portable_lib._threadpool_get_thread_count()
    if now == count:
        return
    if _OPEN:
        raise TargetError(
            f"ExecuTorch runs with {now} thread{'s' * (now > 1)} in this process and cannot change "
            f"to {count} while a network is loaded; close it, or use another process"
        )
    portable_lib._unsafe_reset_threadpool(count)


def _program(path: Path) -> Any:
    """Read a file after a look at its head: ExecuTorch's own check needs a whole one."""
    with path.open("rb") as stream:
        head = stream.read(8)
    if head[4:6] != b"ET":
        raise TargetError(f"{path.name} is not a program of ExecuTorch (.pte)")
    from executorch.runtime import Runtime as Native

    try:
        program = Native.get().load_program(path)
    except Exception as error:
        raise TargetError(f"ExecuTorch cannot load {path.name}: {_plain(error)}") from error
    if "forward" not in program.method_names:
        found = ", ".join(sorted(program.method_names)) or "none"
        raise TargetError(f"{path.name} has no method 'forward'; it has {found}")
    return program


def _told(program: Any, method: str) -> list[str]:
    """Return the names that one of our own methods tells, if it is there."""
    if method not in program.method_names:
        return []
    return str(program.load_method(method).execute([])[0]).split("\n")


def _signatures(program: Any, path: Path) -> dict[str, Signature]:
    about = program.metadata("forward")
    count = about.num_inputs()
    names = _told(program, _INPUTS) or _numbered("input", count)
    if len(names) != count:
        raise TargetError(f"{path.name} names {len(names)} inputs but takes {count}")
    made = {}
    for i, name in enumerate(names):
        try:
            tensor = about.input_tensor_meta(i)
            dtype = _DTYPES[tensor.dtype()]
        except Exception as error:
            raise TargetError(
                f"input {name!r} of {path.name} is no tensor of numbers that numpy has"
            ) from error
        made[name] = Signature(shape=tuple(tensor.sizes()), dtype=dtype)
    return made


def _size(signatures: Mapping[str, Signature]) -> int:
    """Return the batch size: what all inputs have along their first axis; 0: there is none."""
    sizes = {int(each.shape[0]) if each.shape else 0 for each in signatures.values()}
    return sizes.pop() if len(sizes) == 1 else 0


class _Runner:
    """A loaded method; each call gives it its inputs anew."""

    def __init__(self, program: Any, path: Path) -> None:
        self.signatures = _signatures(program, path)
        try:
            self.method = program.load_method("forward")
        except Exception as error:
            raise TargetError(f"ExecuTorch cannot load {path.name}: {_plain(error)}") from error
        count = self.method.metadata.num_outputs()
        self.outputs = _told(program, _OUTPUTS) or _numbered("output", count)
        self.program = program
        _OPEN.add(self)

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import torch

        bound = []
        for name, wanted in self.signatures.items():
            given = np.array(inputs[name], dtype=wanted.dtype, order="C")
            if given.shape != wanted.shape:
                raise TargetError(
                    f"input {name!r} must have shape {wanted.shape}, got {given.shape}"
                )
            bound.append(torch.from_numpy(given))

        def call() -> Arrays:
            try:
                made = self.method.execute(bound)
            except Exception as error:
                raise TargetError(f"ExecuTorch failed while running: {_plain(error)}") from error
            return {name: out.numpy() for name, out in zip(self.outputs, made, strict=True)}

        return call

    def close(self) -> None:
        del self.method, self.program
        _OPEN.discard(self)


def _plain(error: BaseException) -> str:
    """Keep what the innermost error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


RUNTIME = Runtime(
    takes="exported",
    devices=("cpu",),
    export=export,
    load=load,
    inputs=inputs,
    suffixes=(".pte",),
    fixed_batch=True,
    to_export=("executorch", "torch"),
    to_run=("executorch", "torch"),
)
