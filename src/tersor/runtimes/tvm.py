"""Apache TVM on the CPU: compiled ahead of time for one kind of processor.

The ONNX network is imported to Relax, batch norms folded, operators fused, and compiled by LLVM for
the processor of the exporting machine to a shared library, which Relax's virtual machine runs. A
processor without the same instructions is refused. Linking needs a C compiler (`cc` or `g++`).

TVM's own default schedule for processors is used: its fusions, and its rules for matrix-vector
products and reductions. It neither tiles loops nor runs them in parallel, so expect it to be slow.

The option `tune: SECONDS` searches better schedules: after so many seconds no further candidate is
compiled and timed. The operators that take most of the network's time come first; what was not
reached, or became no faster, keeps the default schedule. In the end the whole network runs in turns
with both, and the faster one is written (the default one where outputs differ); `model.json` tells
what was tried, and which one it is. Compiling and this comparison come on top of the budget.

Tune on an idle machine like the one that will run the network, with the `threads` it will have.
Every export searches anew, and what it finds depends on what it measures.

A network of 8-bit integers computes what it is rounded to, but in float: its roundings become
arithmetic, and TVM has no default schedule for the integer products that they would allow. Expect
the same outputs and no gain in speed.
"""

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError, last_line
from tersor.core.hardware import probe, usable_cores
from tersor.core.model import Inputs
from tersor.core.pieces import InPieces
from tersor.core.runtime import Arrays, Runner, Runtime, Target

_log = logging.getLogger("tersor")


def budget(options: Mapping[str, Any]) -> float:
    """Read the seconds of tuning; 0: the default schedule.

    Raises:
        TargetError: a value that cannot be.
    """
    given = options.get("tune", 0)
    if (
        not isinstance(given, (int, float))
        or isinstance(given, bool)
        or not math.isfinite(given)
        or given < 0
    ):
        raise TargetError(f"tune must be the seconds to search schedules, from 0; got {given!r}")
    return float(given)


def export(net: Any, folder: Path, inputs: Inputs, target: Target | None = None) -> Sequence[Path]:
    """Compile `model.so`, and write beside it what a processor needs to run it.

    Args:
        net: ONNX with fixed shapes.
        folder: Where the files go.
        inputs: How to call it.
        target: Its `tune`, and the threads to tune for.

    Raises:
        TargetError: an operator that TVM does not import or compile, or no C compiler.
    """
    from tersor.ops.onnx_plain import described

    wanted = target or Target(runtime="tvm")
    seconds = budget(wanted.options)
    size = next(iter(inputs.example.values())).shape[0] if inputs.example else 1
    with _quiet():
        import tvm
        from tvm import relax

        machine = probe()
        processor = tvm.target.codegen.llvm_get_system_cpu()
        machine_target = tvm.target.Target(
            {"kind": "llvm", "mcpu": processor, "num-cores": wanted.threads or usable_cores()}
        )
        module = _imported(net)
        given = described(net.graph.input, net)
        arrays = {
            each["name"]: np.asarray(inputs.example[each["name"]], each["dtype"])
            for each in given
            if seconds
        }
        try:
            with machine_target:
                module = relax.transform.DecomposeOpsForInference()(module)
                module = relax.transform.CanonicalizeBindings()(module)
                module = relax.transform.FoldConstant()(module)
                module = relax.get_pipeline("zero")(module)
            compiled, tuning = _compiled(module, machine_target, seconds, wanted, arrays)
        except Exception as error:
            raise TargetError(f"TVM cannot compile the network: {last_line(error)}") from error
        library = folder / "model.so"
        try:
            compiled.export_library(str(library))
        except Exception as error:
            raise TargetError(
                f"TVM cannot link the network: {last_line(error)}; it needs a C compiler, "
                "such as g++"
            ) from error
    about = {
        "architecture": machine.architecture,
        "processor": processor,
        "instructions": list(machine.flags),
        "tvm": tvm.__version__,
        "batch": int(size),
        "inputs": given,
        "outputs": [each.name for each in net.graph.output],
    }
    if tuning:
        about["tuning"] = tuning
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
            raise TargetError(f"TVM cannot load {path.name}: {last_line(error)}") from error
    runner = _Runner(machine_of_relax, dict(zip(names, types, strict=True)), outputs, target)
    return InPieces(runner, batch)


def _imported(net: Any) -> Any:
    """Import ONNX to Relax."""
    from tvm.relax.frontend.onnx import from_onnx

    try:
        return from_onnx(net, keep_params_in_input=False)
    except Exception as error:
        raise TargetError(f"TVM cannot import the network: {last_line(error)}") from error


def _compiled(
    module: Any, machine: Any, seconds: float, wanted: Target, arrays: Arrays
) -> tuple[Any, dict[str, Any]]:
    """Compile a network in its default schedule, or in a tuned one if that is faster.

    Args:
        module: Relax, fused.
        machine: TVM's target.
        seconds: Of search.
        wanted: Its threads.
        arrays: Inputs to compare both with.

    Returns:
        What was compiled, and what tuning tried; nothing where there was none.
    """
    import tvm

    from tersor.runtimes._tvm_tuning import compared, tuned

    def built(part: Any) -> Any:
        with machine:
            return tvm.compile(_scheduled(part.clone()), machine)

    default = built(module)
    if not seconds:
        return default, {}
    _use(wanted.threads or usable_cores())
    changed, about = tuned(module, machine, seconds, _scheduled)
    if not about["improved"]:
        _log.warning("tvm: no schedule faster than the default ones in %g s of tuning", seconds)
        return default, {**about, "kept": "default"}
    changed = built(changed)
    about |= compared(default, changed, arrays)
    _log.info(
        "tvm: %d candidates in %.0f s; default schedule %.3f ms, tuned %.3f ms; kept: %s",
        *(about[key] for key in ("candidates", "spent_seconds", "default_ms", "tuned_ms", "kept")),
    )
    return (changed if about["kept"] == "tuned" else default), about


def _use(threads: int) -> None:
    """Let TVM run in so many threads."""
    import tvm

    if tvm.get_global_func("runtime.NumThreads")() != threads:
        tvm.get_global_func("runtime.config_threadpool")(1, threads)


def _scheduled(module: Any) -> Any:
    """Apply TVM's default rules for processors to what has no schedule yet; changes `module`."""
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

        def call() -> Arrays:
            _use(self.threads)
            try:
                made = run(*bound)
            except Exception as error:
                raise TargetError(f"TVM failed while running: {last_line(error)}") from error
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


RUNTIME = Runtime(
    takes="onnx",
    devices=("cpu",),
    export=export,
    load=load,
    runs_code=True,
    fixed_batch=True,
    targeted=True,
    options=("threads", "tune"),
    check=lambda target: budget(target.options),
    to_export=("tvm", "onnx", "onnxscript"),
    to_run=("tvm",),
)
