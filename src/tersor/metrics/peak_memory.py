"""Peak memory of a fresh process that loads and runs the network, beyond the runtime's own."""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tersor.core import plugins, remote
from tersor.core.errors import TargetError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.schema import to_plain
from tersor.metrics import _conditions

PROCESSES = 3
TIMEOUT_S = 600


@metric(unit="B", better="lower", needs=("files", "inputs"))
def peak_memory(subject: Subject) -> Measurement:
    """Measure in three processes, one after the other, and take the median.

    The value is the peak resident set less that of the same process with the runtime imported, the
    inputs read and no network loaded. Pages of the file that were mapped and touched count. The
    conditions hold the time of loading and of the first run, too, which only a fresh process shows.

    Raises:
        TargetError: the process failed; says why.
    """
    assert subject.files is not None
    assert subject.inputs is not None
    found = [_measure(subject) for _ in range(PROCESSES)]
    found.sort(key=lambda each: each["peak"] - each["baseline"])
    middle = found[PROCESSES // 2]
    batch, threads = _conditions.batch(subject), _conditions.threads(subject)
    lowest, highest = (each["peak"] - each["baseline"] for each in (found[0], found[-1]))
    return Measurement(
        metric="peak_memory",
        value=float(middle["peak"] - middle["baseline"]),
        unit="B",
        better="lower",
        conditions={
            **subject.conditions,
            "batch": batch,
            "threads": threads,
            "peak_bytes": middle["peak"],
            "baseline_bytes": middle["baseline"],
            "lowest_bytes": lowest,
            "highest_bytes": highest,
            **{
                key: statistics.median(e[key] for e in found) for key in ("load_ms", "first_run_ms")
            },
        },
        count=PROCESSES,
        how=f"median of {PROCESSES} fresh processes: peak resident set less that of the runtime "
        f"alone, batch {batch}, {_conditions.plural(threads, 'thread')}",
    )


def _measure(subject: Subject) -> dict[str, float]:
    assert subject.files is not None
    assert subject.inputs is not None
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        order = {"target": to_plain(subject.target), "file": str(subject.files[0].resolve())}
        (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
        arrays = {name: np.asarray(array) for name, array in subject.inputs[0].items()}
        np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]  # the stub's allow_pickle
        python = plugins.interpreter(subject.target.runtime)
        command = remote.command(python, "memory", str(folder))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TargetError(
                f"measuring memory took longer than {TIMEOUT_S} s on {subject.target}; "
                "use a smaller batch"
            ) from error
        answer = folder / "answer.json"
        if done.returncode != 0 or not answer.exists():
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise TargetError(
                f"the process that measures memory failed on {subject.target}: {reason}"
            )
        read: dict[str, float] = json.loads(answer.read_text(encoding="utf-8"))
        return read
