"""PyTorch, compiled ahead of time by Inductor (AOTInductor).

`compiled.pt2` holds native code for the processor that it was made on. `compiled.json`, beside it,
says which instructions that has, and a processor without them is refused; and which operators run
in integers: Inductor makes quantized convolutions and linear layers operators of oneDNN. Exporting
needs a C++ compiler (`CXX`, else g++ or clang++) and takes up to minutes; running needs none.
Weights are compiled in, batches of any size run. CPU only.

Being native code, the file runs as part of an artifact only.
"""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import DependencyError, TargetError, first_lines
from tersor.core.model import Inputs
from tersor.core.pieces import narrowed
from tersor.core.runtime import Runner, Runtime, Target

_INTEGER = {
    "convolutions": ("qconv_unary_lower_count", "qconv2d_binary_lower_count"),
    "linear": ("qlinear_unary_lower_count", "qlinear_binary_lower_count"),
}
"""Inductor's counters of layers that became integer operators."""
_TOLERANCE = 0.1
"""Largest difference of outputs, relative and root mean square: roundings that fall the other way,
accumulated."""


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `compiled.pt2` and `compiled.json`.

    Integer operators are compared with the program; where their outputs differ by more than
    roundings do, the network is compiled without them, which is said.
    """
    import torch

    from tersor.ops import native_code

    own = sorted({str(n.target) for n in net.graph.nodes if str(n.target).startswith("tersor.")})
    if own:
        raise TargetError(
            f"compiled networks cannot call {', '.join(own)}, which is written in Python; leave "
            "out the step that makes it, or choose the runtime torch_export"
        )
    compiler = native_code.cxx_compiler()
    names = list(net.call_spec.in_spec.child(1).context)
    file, beside = folder / "compiled.pt2", folder / "compiled.json"
    for integers in (True, False):
        done = _compile(net, inputs, names, file, compiler, integers=integers)
        about = {
            "inputs": names,
            "torch": torch.__version__,
            "processor": native_code.processor(),
            "in_integers": done,
        }
        beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if not any(done.values()) or _agrees(net, inputs, file):
            break
        logging.getLogger("tersor").warning(
            "torch_compile: Inductor's integer operators give other outputs than the network; "
            "compiled without them"
        )
    return [file, beside]


def _compile(
    net: Any, inputs: Inputs, names: list[str], file: Path, compiler: str, *, integers: bool
) -> dict[str, int]:
    """Write the package; return how many layers became integer operators, by kind."""
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor import aot_compile
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.package.package import package_aoti

    from tersor.ops import native_code, signed_codes

    example = {name: inputs.example[name].contiguous() for name in names}
    before = Counter(counters["inductor"])
    with tempfile.TemporaryDirectory(prefix="tersor-") as aside:
        options = {
            # constants are folded, and weights packed for the operators that read them
            "freezing": integers,
            "cpp.cxx": (compiler,),
            # their number is chosen where the network runs
            "cpp.dynamic_threads": True,
            "aot_inductor.package": True,
            "aot_inductor.output_path": aside,
            "aot_inductor.enable_line_tables": False,
        }
        try:
            with torch.no_grad(), native_code.quiet():
                module = net.module(check_guards=False)
                signed_codes.fold_single_channels(module)
                made = aot_compile(module, (), example, options=options)
                assert isinstance(made, list)  # of files, with `package` set
                # the C++ is of no use where it runs
                kept = [str(x) for x in made if not str(x).endswith(".cpp")]
                native_code.blank_folders([Path(x) for x in kept], aside)
                package_aoti(str(file), kept)  # type: ignore[arg-type]  # list is invariant
        except InvalidCxxCompiler as error:
            raise DependencyError(f"{compiler} does not work as a C++ compiler") from error
        except Exception as error:
            raise TargetError(
                f"Inductor cannot compile the network: {first_lines(error)}"
            ) from error
    done = Counter(counters["inductor"]) - before
    return {kind: sum(done[word] for word in words) for kind, words in _INTEGER.items()}


def _agrees(net: Any, inputs: Inputs, file: Path) -> bool:
    """Tell whether every output of the file is that of the program, but for roundings."""
    from tersor.ops.torch_runner import TorchRunner

    target = Target(runtime="torch_compile")
    batch = {n: t.numpy() for n, t in narrowed(inputs.example, 3, inputs.dynamic).items()}
    runner = load(file, target)
    found = runner.bind(batch)()
    runner.close()
    wanted = TorchRunner(net.module(check_guards=False), list(batch), target).bind(batch)()
    return all(
        bool(np.linalg.norm(a - b) <= _TOLERANCE * np.linalg.norm(b))
        for a, b in zip(found.values(), wanted.values(), strict=True)
    )


def load(path: Path, target: Target) -> Runner:
    """Load the code where this processor can run it."""
    import torch
    from torch import nn
    from torch._inductor import aoti_load_package

    from tersor.ops import native_code, torch_runner

    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        names, version = [str(name) for name in about["inputs"]], str(about["torch"])
        made_for = dict(about["processor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{path.name} has no readable {path.stem}.json beside it, so that it is not known what "
            "it was compiled for; export the network again"
        ) from error
    native_code.check_processor(path.name, made_for, native_code.processor())
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise TargetError(
            f"{path.name} was compiled for torch {version}, this is {torch.__version__}; export "
            "the network again"
        )
    try:
        with native_code.quiet():
            compiled = aoti_load_package(str(path))
    except Exception as error:
        raise TargetError(f"torch cannot load {path.name}: {first_lines(error)}") from error

    class Compiled(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return compiled(**inputs)

    return torch_runner.TorchRunner(Compiled(), names, target)


RUNTIME = Runtime(
    takes="exported",
    devices=("cpu",),
    export=export,
    load=load,
    runs_code=True,
    to_export=("torch",),
    to_run=("torch",),
)
