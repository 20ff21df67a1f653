"""Apache TVM on the CPU: compiled ahead of time for one kind of processor.

The ONNX network is imported to Relax, batch norms folded, operators fused, and compiled by LLVM for
the processor of the exporting machine to a shared library, which Relax's virtual machine runs. A
processor without the same instructions is refused. Linking needs a C compiler (`cc` or `g++`).

TVM's own default schedule for processors is used: its fusions, and its rules for matrix-vector
products and reductions. It neither tiles loops nor runs them in parallel, so expect it to be slow;
schedules are not tuned.

A network of 8-bit integers computes what it is rounded to, but in float: its roundings become
arithmetic, and TVM has no default schedule for the integer products that they would allow. Expect
the same outputs and no gain in speed.
"""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.hardware import probe, usable_cores
from tersor.core.model import Inputs
from tersor.core.pieces import InPieces
from tersor.core.runtime import Arrays, Runner, Runtime, Target


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Compile `model.so`, and write beside it what a processor needs to run it.

    Args:
        net: ONNX with fixed shapes.
        folder: Where the files go.
        inputs: How to call it.

    Raises:
        TargetError: an operator that TVM does not import or compile, or no C compiler.
    """
    from tersor.ops.onnx_plain import described

    size = next(iter(inputs.example.values())).shape[0] if inputs.example else 1
    with _quiet():
        import tvm
        from tvm import relax

        machine = probe()
        processor = tvm.target.codegen.llvm_get_system_cpu()
        target = tvm.target.Target({"kind": "llvm", "mcpu": processor, "num-cores": usable_cores()})
        module = _imported(net)
        try:
            with target:
                module = relax.transform.DecomposeOpsForInference()(module)
                module = relax.transform.CanonicalizeBindings()(module)
                module = relax.transform.FoldConstant()(module)
                module = relax.get_pipeline("zero")(module)
                module = _scheduled(module)
            compiled = tvm.compile(module, target)
        except TargetError:
            raise
        except Exception as error:
            raise TargetError(f"TVM cannot compile the network: {_plain(error)}") from error
        library = folder / "model.so"
        try:
            compiled.export_library(str(library))
        except Exception as error:
            raise TargetError(
                f"TVM cannot link the network: {_plain(error)}; it needs a C compiler, such as g++"
            ) from error
    about = {
        "architecture": machine.architecture,
        "processor": processor,
        "instructions": list(machine.flags),
        "tvm": tvm.__version__,
        "batch": int(size),
        "inputs": described(net.graph.input, net),
        "outputs": [each.name for each in net.graph.output],
    }
    notes = folder / "model.json"
    notes.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return [library, notes]


def load(path: Path, target: Target) -> Runner:
    """Load the library, on a processor that has the instructions it was compiled for.

    Raises:
        TargetError: the processor lacks some, or the files are damaged.
    """
    notes = path.with_suffix(".json")
    try:
        about = json.loads(notes.read_text(encoding="utf-8"))
        names = [str(each["name"]) for each in about["inputs"]]
        types = [np.dtype(each["dtype"]) for each in about["inputs"]]
        outputs = [str(each) for each in about["outputs"]]
        wanted, batch = set(about["instructions"]), int(about["batch"])
        built_for = f"{about['processor']} ({about['architecture']})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{notes.name} does not tell what {path.name} needs: {error}") from error
    machine = probe()
    lacking = sorted(wanted - set(machine.flags))
    if about["architecture"] != machine.architecture or lacking:
        has_not = f" lacks {', '.join(lacking)}" if lacking else f" is {machine.architecture}"
        raise TargetError(
            f"{path.name} was compiled for {built_for}, and this processor{has_not}; "
            "export the network on a machine like the one that runs it"
        )
    with _quiet():
        import tvm
        from tvm import relax

        try:
            library = tvm.runtime.load_module(str(path))
            machine_of_relax = relax.VirtualMachine(library, tvm.cpu())
        except Exception as error:
            raise TargetError(f"TVM cannot load {path.name}: {_plain(error)}") from error
    runner = _Runner(machine_of_relax, dict(zip(names, types, strict=True)), outputs, target)
    return InPieces(runner, batch)


def _imported(net: Any) -> Any:
    """Import ONNX to Relax."""
    from tvm.relax.frontend.onnx import from_onnx

    try:
        return from_onnx(net, keep_params_in_input=False)
    except Exception as error:
        raise TargetError(f"TVM cannot import the network: {_plain(error)}") from error


def _scheduled(module: Any) -> Any:
    """Apply TVM's default rules for processors to what has no schedule yet."""
    from tvm.s_tir import dlight

    return dlight.ApplyDefaultSchedule(dlight.cpu.GEMV(), dlight.cpu.Reduction())(module)


class _Runner:
    """A virtual machine with inputs in memory of TVM's."""

    def __init__(
        self, machine: Any, inputs: dict[str, np.dtype[Any]], outputs: list[str], target: Target
    ) -> None:
        self.machine, self.inputs, self.outputs = machine, inputs, outputs
        self.threads = target.threads or usable_cores()

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import tvm

        run = self.machine["main"]
        bound = [
            tvm.runtime.tensor(np.ascontiguousarray(inputs[name], dtype=kind))
            for name, kind in self.inputs.items()
        ]
        count, configure = (
            tvm.get_global_func(f"runtime.{name}") for name in ("NumThreads", "config_threadpool")
        )

        def call() -> Arrays:
            if count() != self.threads:
                configure(1, self.threads)
            try:
                made = run(*bound)
            except Exception as error:
                raise TargetError(f"TVM failed while running: {_plain(error)}") from error
            parts = [made] if hasattr(made, "numpy") else list(made)
            return {n: part.numpy() for n, part in zip(self.outputs, parts, strict=True)}

        return call

    def close(self) -> None:
        del self.machine


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence TVM's progress, and let it leave threads where the system puts them."""
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    logging.getLogger("tvm").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _plain(error: Exception) -> str:
    """Keep the last line of TVM's message, which says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


RUNTIME = Runtime(
    takes="onnx",
    devices=("cpu",),
    export=export,
    load=load,
    fixed_batch=True,
    to_export=("tvm", "onnx", "onnxscript"),
    to_run=("tvm",),
)
