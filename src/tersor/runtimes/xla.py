"""XLA through StableHLO and JAX: on the CPU, and on a GPU or TPU where JAX finds one.

The exported program is translated to StableHLO by litert-torch and written in the format of
`jax.export`, the weights beside it. Running it needs JAX, not PyTorch, and JAX programs can call
it, too: `jax.export.deserialize(network).call(weights, inputs)`. XLA compiles it when it is loaded,
for the processor that it finds. torch_xla is not used: none of its releases loads beside this
PyTorch.

A network of 8-bit integers computes what it is rounded to, but in float: the weights are stored as
integers and made floats while running. Expect the same outputs, smaller files and no gain in speed.

XLA takes its number of threads once in a process, with the first network that is loaded; another
number is then refused.
"""

import contextlib
import dataclasses
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError, first_lines
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs
from tersor.core.pieces import in_pieces
from tersor.core.runtime import Arrays, Runner, Runtime, Target

_THREADS = "NPROC"
"""Where XLA's client of the CPU reads how many threads it may start."""
_STARTED: list[int] = []
"""The number of threads that XLA was started with in this process, once it was."""
_VERSION = "1.0.0"
"""Of StableHLO, that files are written for: later ones read it."""


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.stablehlo` and `weights.safetensors`.

    Raises:
        TargetError: an operator that litert-torch does not translate.
    """
    from safetensors.numpy import save

    from tersor.ops.exported_names import output_names
    from tersor.ops.plain_rounding import without_quantized

    program = without_quantized(net)
    program._example_inputs = ((), dict(inputs.example))
    with _quiet():
        import jax
        from litert_torch.backend.export import exported_program_to_mlir

        try:
            lowered = exported_program_to_mlir(program, inline_constants=False)
        except Exception as error:
            raise TargetError(
                f"the network cannot be written as StableHLO: {first_lines(error)}"
            ) from error
        given = list(inputs.example)
        arguments = [
            (given[each.input_spec.i] if each.input_spec.is_user_input else each.input_spec.name)
            for each in lowered.input_signature
        ]
        fed = [each.input_spec.is_user_input for each in lowered.input_signature]
        weights = {
            name: lowered.state_dict[name].detach().cpu().contiguous().numpy()
            for name, is_input in zip(arguments, fed, strict=True)
            if not is_input
        }
        examples = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.example.items()}
        made = {
            name: np.broadcast_to(np.zeros((), _numpy(each.dtype)), tuple(each.shape))
            for name, each in zip(output_names(net), lowered.output_signature, strict=True)
        }
        text = lowered.module.operation.get_asm(enable_debug_info=False)
        with jax.enable_x64(True):
            data = _exported(
                text, list(zip(fed, arguments, strict=True)), (weights, examples), made
            )
    files = [folder / "model.stablehlo", folder / "weights.safetensors"]
    files[0].write_bytes(data)
    files[1].write_bytes(save(weights))
    return files


def load(path: Path, target: Target) -> Runner:
    """Compile the network for the device.

    Raises:
        TargetError: a file is damaged, JAX has no such device, or XLA runs with another number of
            threads already.
    """
    from safetensors.numpy import load

    threads = target.threads or usable_cores()
    with _quiet():
        if target.device == "cpu" and _STARTED and [threads] != _STARTED:
            raise TargetError(
                f"XLA runs with {_STARTED[0]} threads in this process and cannot change to "
                f"{threads}; load the network in another process"
            )
        device = _device(target.device, threads)
        import jax
        from jax import export as exporting

        try:
            network = exporting.deserialize(bytearray(path.read_bytes()))
            weights = load((path.with_name("weights.safetensors")).read_bytes())
            with jax.enable_x64(True):
                (wanted, inputs), _ = jax.tree.unflatten(network.in_tree, network.in_avals)
                assert set(wanted) == set(weights)
                kept = jax.device_put(weights, device)
                compiled = jax.jit(network.call).lower(kept, inputs).compile()
        except Exception as error:
            raise TargetError(f"XLA cannot load {path.name}: {first_lines(error)}") from error
    runner = _Runner(compiled, kept, inputs, device)
    return in_pieces(runner, {name: each.shape for name, each in inputs.items()})


_EXTRAS = {"cuda": "cuda13", "tpu": "tpu"}
"""Of JAX, by device."""


def _device(name: str, threads: int) -> Any:
    """Start XLA, which reads the number of its threads from the environment, once a process."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads)
    import jax

    try:
        found = jax.devices(name)[0]
    except RuntimeError as error:
        raise TargetError(
            f"JAX finds no {name} here; use xla:cpu, or install JAX for it: pip install "
            f"'jax[{_EXTRAS[name]}]'"
        ) from error
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before
    if not _STARTED:
        _STARTED.append(threads)
    return found


def _exported(
    text: str, order: Sequence[tuple[bool, str]], given: Sequence[Arrays], made: Mapping[str, Any]
) -> bytes:
    """Put a StableHLO module into the format of `jax.export`.

    A function of the same inputs and outputs is exported by JAX, and its module replaced.

    Args:
        text: The module; its `main` takes arguments in `order` and returns `made` in its order.
        order: Of each argument whether it is an input, and its name.
        given: Weights and inputs by name.
        made: Shapes and types of the outputs by name.
    """
    import jax
    from jax import export as exporting
    from jax import numpy as jnp
    from jax.extend import mlir

    def like(weights: Any, inputs: Any) -> Any:
        del weights, inputs
        return {name: jnp.zeros(each.shape, each.dtype) for name, each in made.items()}

    shapes = [
        {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in group.items()}
        for group in given
    ]
    outline = exporting.export(
        jax.jit(like, keep_unused=True),
        platforms=("cpu",),
        disabled_checks=[exporting.DisabledSafetyCheck.platform()],
    )(*shapes)
    # JAX orders what has names by them
    taken = [(bool(i), name) for i, group in enumerate(given) for name in sorted(group)]
    types = {(bool(i), n): _type(a) for i, group in enumerate(given) for n, a in group.items()}
    own = ", ".join(f"%a{i}: {types[each]}" for i, each in enumerate(taken))
    passed = ", ".join(f"%a{taken.index(each)}" for each in order)
    results = {name: (f"%r#{i}", _type(each)) for i, (name, each) in enumerate(made.items())}
    returned = [results[name] for name in sorted(made)]
    out_types = ", ".join(kind for _, kind in returned)
    entry = (
        f"func.func public @main({own}) -> ({out_types}) {{\n"
        f"  %r:{len(made)} = func.call @network({passed}) : "
        f"({', '.join(types[each] for each in order)}) -> "
        f"({', '.join(kind for _, kind in results.values())})\n"
        f"  return {', '.join(value for value, _ in returned)} : {out_types}\n}}\n"
    )
    head, _, body = text.partition("func.func public @main(")
    module = f"{head}{entry}func.func private @network({body}"
    foreign = re.search(r"\b(?!stablehlo|func|chlo|dense|affine)([a-z]\w*\.\w+) *[%(\"]", body)
    try:
        data = mlir.serialize_portable_artifact(module, _VERSION)
    except Exception as error:
        found = f" (it uses {foreign.group(1)})" if foreign else ""
        raise TargetError(
            f"the network cannot be written as StableHLO{found}: {first_lines(error)}"
        ) from error
    return bytes(dataclasses.replace(outline, mlir_module_serialized=data).serialize())


class _Runner:
    """A compiled network with its weights on the device."""

    def __init__(self, compiled: Any, weights: Any, inputs: Mapping[str, Any], device: Any) -> None:
        self.compiled, self.weights, self.inputs = compiled, weights, inputs
        self.device = device

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        import jax

        with jax.enable_x64(True):
            bound = {
                name: jax.device_put(np.asarray(inputs[name], dtype=each.dtype), self.device)
                for name, each in self.inputs.items()
            }
        jax.block_until_ready(bound)

        def call() -> Arrays:
            try:
                with jax.enable_x64(True):
                    made = jax.block_until_ready(self.compiled(self.weights, bound))
            except Exception as error:
                raise TargetError(f"XLA failed while running: {first_lines(error)}") from error
            return {name: np.asarray(array) for name, array in made.items()}

        return call

    def close(self) -> None:
        del self.compiled, self.weights


def _numpy(dtype: Any) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))


def _type(array: Any) -> str:
    """Write a shape and an element type as MLIR does."""
    kind = np.dtype(array.dtype)
    letter = {"f": "f", "i": "i", "u": "ui"}.get(kind.kind)
    element = "i1" if kind.kind == "b" else f"{letter}{8 * kind.itemsize}"
    return f"tensor<{'x'.join([*map(str, array.shape), element])}>"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the translator prints and logs."""
    logging.getLogger("jax").setLevel(logging.ERROR)
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        root.setLevel(before)


RUNTIME = Runtime(
    takes="exported",
    devices=("cpu", "cuda", "tpu"),
    export=export,
    load=load,
    fixed_batch=True,
    to_export=("torch", "litert_torch", "jax", "safetensors"),
    to_run=("jax", "safetensors"),
)
