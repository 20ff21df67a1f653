"""The process that peak_memory starts: load, run, and write down how much memory that took.

Imports numpy and the target's runtime, nothing else: what is measured is what a device would need.
"""

import gc
import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from tersor.core import plugins
from tersor.core.runtime import Target

RUNS = 3


def main(folder: Path) -> None:
    """Read order.json and inputs.npz of `folder`; write answer.json.

    The answer holds the bytes of baseline and peak, and the milliseconds that loading and the first
    run took in this fresh process; the file itself may be in the system's cache.
    """
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    target = Target(**order["target"])
    runtime = plugins.runtime(target.runtime)
    for package in runtime.to_run:
        importlib.import_module(package)
    with np.load(folder / "inputs.npz", allow_pickle=False) as pack:
        inputs = {name: pack[name] for name in pack.files}
    gc.collect()
    baseline = _start()
    began = time.perf_counter()
    runner = runtime.open(Path(order["file"]), target)
    loaded = time.perf_counter()
    call = runner.bind(inputs)
    call()
    ran = time.perf_counter()
    for _ in range(RUNS - 1):
        call()
    answer = {
        "baseline": baseline,
        "peak": _peak(),
        "load_ms": 1000 * (loaded - began),
        "first_run_ms": 1000 * (ran - loaded),
    }
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _start() -> int:
    """Forget the peak of importing, where the system can, and return the resident bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: reset VmHWM
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")  # not ru_maxrss, which a child inherits from its parent
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
