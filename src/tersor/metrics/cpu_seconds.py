"""Processor seconds of 1,000 runs: a named proxy where energy cannot be counted."""

import time

import numpy as np

from tersor.core.metric import Measurement, Subject, metric
from tersor.core.statistics import median_interval
from tersor.core.timing import cpu_seconds_of, quiet, warm_up
from tersor.metrics import _conditions
from tersor.metrics._counters import PROCESSORS

RUNS = 1000
"""Runs of one batch that the value is given for."""
SECONDS = 2.0
BLOCK_MS = 50.0
FEWEST = 8
AT_MOST_S = 10.0
"""Time after which a slow network is not run again, however few the blocks."""


@metric(unit="s", better="lower", needs=("runner", "inputs"))
def cpu_seconds(subject: Subject) -> Measurement:
    """Add up what all threads of the process spend in runs of one batch.

    It is work of the processor, not energy: what a joule buys differs between kernels, clocks and
    machines, and the work of another device is not in it. Threads that wait busily count.

    Raises:
        TargetError: the network runs where its processor time cannot be read.
    """
    assert subject.runner is not None
    assert subject.inputs is not None
    calls = [subject.runner.bind(inputs) for inputs in subject.inputs]
    runs = max(1, round(BLOCK_MS / float(np.median(warm_up(calls)))))
    blocks: list[float] = []
    began = time.perf_counter()
    with quiet():
        while True:
            blocks.append(cpu_seconds_of(calls, runs * len(blocks), runs) * RUNS / runs)
            spent_s = time.perf_counter() - began
            if spent_s > AT_MOST_S or (spent_s > SECONDS and len(blocks) >= FEWEST):
                break
    batch, threads = _conditions.batch(subject), _conditions.threads(subject)
    device = subject.target.device
    beside = "" if device in PROCESSORS else f", without the work of {device}"
    return Measurement(
        metric="cpu_seconds",
        value=float(np.median(blocks)),
        unit="s",
        better="lower",
        spread=median_interval(np.array(blocks)),
        conditions={**subject.conditions, "batch": batch, "threads": threads, "runs": RUNS},
        count=runs * len(blocks),
        how=f"CPU-seconds of {RUNS} runs{beside}: median of {len(blocks)} blocks of "
        f"{_conditions.plural(runs, 'run')}, batch {batch}, "
        f"{_conditions.plural(threads, 'thread')}",
    )
