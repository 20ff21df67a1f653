"""Prove the cause of each of the twenty slow cases: take it away, and measure the gain.

    python benchmarks/slow_cases.py [--cases odd_channels,high_rank]

Times, interleaved, what a compression made against the network before and against the same with
the cause taken away; or compares the sizes of files. Writes benchmarks/results/slow_cases.json.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS
from _slow_cases import CASES, Case, Side


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", help="names, separated by commas; all by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contest")
    parser.add_argument("--out", type=Path, default=RESULTS / "slow_cases.json")
    asked = parser.parse_args()
    from tersor.core.hardware import environment

    wanted = set((asked.cases or ",".join(case.name for case in CASES)).split(","))
    rows = []
    for case in CASES:
        if case.name in wanted:
            with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
                rows.append(prove(case, Path(folder), asked.seconds))
            row = rows[-1]
            print(
                f"{case.name:24} {case.cause:18} {case.question:10} compression "
                f"{_said(row['compression'])}, fix {_said(row['fix_gain'])}",
                flush=True,
            )
    result = {
        "command": "python benchmarks/slow_cases.py",
        "arguments": {"seconds": asked.seconds},
        "environment": environment(),
        "results": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["fix_gain"]["low"] > 1 for row in rows) else 1


def prove(case: Case, folder: Path, seconds: float) -> dict[str, Any]:
    """Measure what the compression bought, and what taking its cause away buys."""
    before, after, fixed = case.build(folder)
    about = {
        "name": case.name,
        "question": case.question,
        "cause": case.cause,
        "done": case.done,
        "fix": case.fix,
    }
    if case.question == "size":
        sizes = [_bytes(side) for side in (before, after, fixed)]
        gains = [
            {"value": a / b, "low": a / b, "high": a / b}
            for a, b in ((sizes[0], sizes[1]), (sizes[1], sizes[2]))
        ]
        return {**about, "bytes": sizes, "compression": gains[0], "fix_gain": gains[1]}
    contests = [_contest(before, after, seconds), _contest(after, fixed, seconds)]
    return {**about, "compression": contests[0], "fix_gain": contests[1]}


def _contest(a: Side, b: Side, seconds: float) -> dict[str, Any]:
    """Tell how many times faster b is, for each sample."""
    from tersor import benchmark

    runners, feeds = [], []
    for side in (a, b):
        runtime, target = _place(side)
        runners.append(runtime.open(side.file, target))
        feeds.append(_feeds(runtime, side))
    try:
        found = benchmark.contest(
            *runners, feeds[0], b_inputs=feeds[1], budget_s=seconds, warm_up_s=0.2
        )
    finally:
        for runner in runners:
            runner.close()
    scale = b.batch / a.batch
    return {
        "value": found.speedup * scale,
        "low": found.low * scale,
        "high": found.high * scale,
        "a_ms": found.a_ms / a.batch,
        "b_ms": found.b_ms / b.batch,
        "blocks": found.blocks,
    }


def _place(side: Side) -> tuple[Any, Any]:
    from tersor.core import plugins
    from tersor.core.runtime import Target

    target = Target(runtime=side.runtime, options=side.options)
    return plugins.runtime(side.runtime), target


def _feeds(runtime: Any, side: Side) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {name: tuple(n for n in s.shape[1:]) for name, s in runtime.inputs(side.file).items()}
    return [
        {
            name: rng.normal(size=(side.batch, *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        for _ in range(16)
    ]


def _bytes(side: Side) -> int:
    """Weigh a file, and the `.bin` beside an `.xml`."""
    own = side.file.stat().st_size
    weights = side.file.with_suffix(".bin")
    return own + (weights.stat().st_size if side.file.suffix == ".xml" else 0)


def _said(gain: dict[str, float]) -> str:
    return f"{gain['value']:.2f}x [{gain['low']:.2f}, {gain['high']:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
