"""A network exported to the target, loaded, and measured there."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor import benchmark
from tersor.core import packing, plugins
from tersor.core.context import Batch, Data
from tersor.core.errors import DataError, ModelError, TargetError
from tersor.core.metric import Measurement, Subject
from tersor.core.model import Inputs
from tersor.core.pieces import narrowed
from tersor.core.runtime import Arrays, Runner, Runtime, Target
from tersor.feeds import check_finite
from tersor.ops.lower import form_of, lower
from tersor.ops.notes import notes_of

TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1}
"""Largest relative root-mean-square difference between the runtime's outputs and memory, by number
format. fp32: other summation orders. fp16, bf16: 11 and 8 bits of mantissa, over many layers.
int8: one quantization step where a rounding falls the other way, accumulated."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network in memory and on the target."""

    net: Any
    files: tuple[Path, ...]
    target: Target
    """With the precision that a step chose."""
    runner: Runner

    def close(self) -> None:
        """Free the loaded network."""
        self.runner.close()


def number_format(net: Any) -> str:
    """Tell the narrowest number format that a network computes in.

    Weights of 8 bits in groups count as int8: ONNX Runtime rounds the activations beside them.
    """
    precision = notes_of(net).get("precision")
    if precision:
        return str(precision)
    if isinstance(net, torch.nn.Module):
        layers = [(type(m).__name__, m) for m in net.modules()]
        if any(
            kind.startswith("Quant") or (kind == "GroupedLinear" and m.bits == 8)
            for kind, m in layers
        ):
            return "int8"
    return "fp32"


def target_for(net: Any, target: Target) -> Target:
    """Return the target with the precision that a step noted on the network."""
    precision = notes_of(net).get("precision")
    if not precision:
        return target
    return replace(target, options={**target.options, "precision": str(precision)})


def inputs_for(runtime: Runtime, inputs: Inputs, batch: int) -> Inputs:
    """Return how a network is called when it is exported to a runtime.

    Where files take batches of one size only, nothing is free, and the example has that size.
    """
    if not runtime.fixed_batch:
        return inputs
    return Inputs(example=narrowed(inputs.example, batch, inputs.dynamic))


def export(
    net: Any,
    folder: Path,
    inputs: Inputs,
    wanted: Target,
    sample: Arrays,
    *,
    batch: int = 1,
    runtime: Runtime | None = None,
    lowered: Any = None,
) -> Candidate:
    """Lower, export, load, and compare the outputs with the network in memory.

    Args:
        net: In any form. Not modified.
        folder: Where the runtime's files go; made, and emptied of an earlier try.
        inputs: How to call it.
        wanted: Where it is to run.
        sample: One batch to compare on.
        batch: Samples of a batch, for runtimes whose files take batches of one size only.
        runtime: The target's runtime, where it is not to be the usual one.
        lowered: The network in the form that it takes, where that is at hand.

    Raises:
        ModelError: cannot be lowered. TargetError: cannot be loaded, or its outputs differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runtime = runtime or plugins.runtime(wanted.runtime)
    target = target_for(net, wanted)
    inputs = inputs_for(runtime, inputs, batch)
    if lowered is None:
        lowered = lower(net, runtime.takes, inputs)
    files = tuple(runtime.write(lowered, folder, inputs, target))
    if notes_of(net).get("packed"):
        files = (packing.pack(files, folder / f"model{packing.SUFFIX}"),)
    runner = runtime.open(files[0], target)
    kind = number_format(net)
    difference = _difference(net, runner, sample, kind)
    if not difference <= TOLERANCES[kind]:
        runner.close()
        raise TargetError(
            f"after export to {target} the outputs differ from the network in memory: relative "
            f"difference {difference:.2g}, allowed for {kind} is {TOLERANCES[kind]:.2g}"
        )
    return Candidate(net=net, files=files, target=target, runner=runner)


def reopen(net: Any, files: Sequence[Path], wanted: Target) -> Candidate:
    """Load files that `export` wrote and checked before."""
    target = target_for(net, wanted)
    return Candidate(
        net=net,
        files=tuple(files),
        target=target,
        runner=plugins.runtime(target.runtime).open(files[0], target),
    )


def _difference(net: Any, runner: Runner, sample: Arrays, kind: str) -> float:
    if form_of(net) == "onnx":
        return 0.0
    wanted = _memory(net, sample)
    found = first(runner.bind(sample)())
    if not np.isfinite(wanted).all():
        raise ModelError(
            "the network's outputs are not finite (NaN or infinite) on the first batch"
        )
    if wanted.shape != found.shape:
        raise TargetError(
            f"outputs have shape {found.shape} on the target but {wanted.shape} in memory"
        )
    scale = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))) or 1.0
    return float(np.sqrt(np.mean(np.square(found.astype(np.float64) - wanted)))) / scale


def _memory(net: Any, sample: Arrays) -> np.ndarray:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in sample.items()}
    call = net if form_of(net) == "module" else net.module()
    with torch.no_grad():
        made = call(**tensors)
    while not isinstance(made, torch.Tensor):
        made = next(iter(made.values())) if isinstance(made, Mapping) else made[0]
    return np.asarray(made.float().cpu().numpy())


def first(outputs: Arrays) -> np.ndarray:
    """Return a runner's first output."""
    return next(iter(outputs.values()))


def arrays_of(batch: Batch, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Turn the inputs of a batch into arrays."""
    return {name: np.ascontiguousarray(batch[name].detach().cpu().numpy()) for name in names}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Outputs over a split and the measurements made from them."""

    outputs: np.ndarray
    labels: np.ndarray | None
    measurements: Mapping[str, Measurement]


def score(
    candidate: Candidate,
    names: Sequence[str],
    split: str,
    data: Data,
    *,
    batch: int,
    reference: np.ndarray | None,
) -> Scores:
    """Run a split on the target and measure `names`.

    Args:
        candidate: Exported and loaded.
        names: Metrics.
        split: "validation" or "test".
        data: Holds that split.
        batch: Samples in a timed batch.
        reference: Outputs of the original over the split; None for the original itself.

    Raises:
        DataError: a metric needs labels that the split lacks. TargetError: outputs are not finite.
    """
    batches = getattr(data, split)
    if batches is None:
        raise DataError(f"the data have no split {split!r}")
    outputs, labels = benchmark.evaluate(candidate.runner, batches)
    check_finite(outputs, split)
    subject = Subject(
        target=candidate.target,
        net=candidate.net,
        files=candidate.files,
        runner=candidate.runner,
        inputs=benchmark.timing_inputs(batches, batch),
        outputs=outputs,
        labels=labels,
        reference=outputs if reference is None else reference,
        split=split,
        quality=data.quality,
        conditions={"batch": batch, "threads": candidate.target.threads},
    )
    made = benchmark.measure_subject(subject, names)
    found: dict[str, Measurement] = {}
    for m in made:
        found.setdefault(m.metric, m)  # of a metric and its proxy, what says why comes first
    return Scores(outputs=outputs, labels=labels, measurements=found)


def latencies(
    nets: Sequence[Any],
    inputs: Inputs,
    target: Target,
    data: Data,
    work_dir: Path,
    *,
    batch: int = 1,
) -> list[float]:
    """Return the measured milliseconds a batch of each network on the target, timed interleaved.

    Args:
        nets: In any form that the target's runtime can be reached from.
        inputs: How to call them.
        target: Where to run.
        data: Its calibration (else train, else validation) batches are the inputs.
        work_dir: For the exported files, which are removed again.
        batch: Samples in a batch.
    """
    batches = next(b for b in (data.calibration, data.train, data.validation) if b is not None)
    runtime = plugins.runtime(target.runtime)
    names = list(inputs.example)
    timed = benchmark.timing_inputs(({name: b[name] for name in names} for b in batches), batch)
    runners = []
    way = inputs_for(runtime, inputs, batch)
    with tempfile.TemporaryDirectory(dir=work_dir) as aside:
        for i, net in enumerate(nets):
            folder = Path(aside) / str(i)
            folder.mkdir()
            own = target_for(net, target)
            exported = runtime.write(lower(net, runtime.takes, way), folder, way, own)
            runners.append(runtime.load(exported[0], own))
        calls = [[runner.bind(arrays) for arrays in timed] for runner in runners]
        blocks = benchmark.interleave(calls, budget_s=1.5 * len(nets), min_blocks=20, seed=0)
    for runner in runners:
        runner.close()
    return [float(np.median(times)) for times in blocks]
