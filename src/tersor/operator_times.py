"""Where a network's time went before a run and after it, by the runtime's own profiler."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor.candidate import Candidate
from tersor.core import plugins
from tersor.core.errors import first_lines
from tersor.core.loops import closed
from tersor.core.operators import covered, part_of
from tersor.core.packing import unpacked
from tersor.core.report import OperatorReport, OperatorsReport
from tersor.core.runtime import Arrays
from tersor.ops.onnx_layers import layers_of

TURNS = 2
"""Of each network, interleaved; the quietest of each counts, since other programs only ever add."""
_TURN_MS = 200.0
_MOST_RUNS = 50


def operator_times(before: Candidate, after: Candidate, feeds: Sequence[Arrays]) -> OperatorsReport:
    """Time two networks by operator, in turns.

    Where that cannot be done, the result says why: a report is not lost for a picture in it.

    Args:
        before: Exported and loaded.
        after: On the same runtime.
        feeds: Batches of one size.
    """
    name = before.target.runtime
    if plugins.runtime(name).profile is None:
        return OperatorsReport(how=f"{name} does not tell where its time goes")
    try:
        turns = [(_profiled(before, feeds), _profiled(after, feeds)) for _ in range(TURNS)]
        first, last = (min(each, key=_total) for each in zip(*turns, strict=True))
        named = _named(before, first), _named(after, last)
    except Exception as error:  # whatever a profiler trips over, hours of work are in the report
        return OperatorsReport(how=f"{name}'s profiler failed: {first_lines(error)}")
    return OperatorsReport(
        before=named[0],
        after=named[1],
        how=f"{name}'s profiler, the quieter of {TURNS} turns; under it a run takes longer",
    )


def _profiled(candidate: Candidate, feeds: Sequence[Arrays]) -> Sequence[Any]:
    runtime = plugins.runtime(candidate.target.runtime)
    assert runtime.profile is not None
    runs = closed([candidate.runner.bind(arrays) for arrays in feeds], seconds=0.05, fewest=2)
    count = int(np.clip(_TURN_MS / max(float(np.median(runs.service_ms)), 1e-3), 2, _MOST_RUNS))
    repeated = [feeds[i % len(feeds)] for i in range(count)]
    with unpacked(candidate.files[0]) as file:
        return runtime.profile(file, candidate.target, repeated)


def _total(times: Sequence[Any]) -> float:
    return float(sum(each.ms for each in times))


def _named(candidate: Candidate, times: Sequence[Any]) -> tuple[OperatorReport, ...]:
    """Give each operator the layer that it computes, where the file tells."""
    layers = _layers(candidate, times)
    return tuple(
        OperatorReport(
            name=each.name,
            kind=each.kind,
            part=part_of(each),
            layer=layers.get(each.name, ""),
            ms=each.ms,
        )
        for each in times
    )


def _layers(candidate: Candidate, times: Sequence[Any]) -> dict[str, str]:
    runtime = plugins.runtime(candidate.target.runtime)
    with unpacked(candidate.files[0]) as file:
        if file.suffix != ".onnx" or runtime.fused is None:
            return {}
        import onnx

        known = layers_of(onnx.load(file, load_external_data=False))
        covers = covered(times, runtime.fused(file, candidate.target), known)
    return {name: known[o] for name, own in covers.items() for o in reversed(own) if o in known}
