"""Is the verified cause of each slow case the one that `explain` names first?

    python benchmarks/explain_slow.py [--cases odd_channels,high_rank]

Explains what each compression made, and, to see the cause go away, the same without its cause.
`explain` is told the files, options, batch and what was hoped for; nothing else. Writes
benchmarks/results/explain_slow.json.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from _networks import RESULTS
from _slow_cases import CASES, Case, Side


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", help="names, separated by commas; all by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contest")
    parser.add_argument("--out", type=Path, default=RESULTS / "explain_slow.json")
    asked = parser.parse_args()
    from tersor.core.hardware import environment

    logging.disable()  # ONNX Runtime's quantizer asks for a step that these graphs do not need
    wanted = set((asked.cases or ",".join(case.name for case in CASES)).split(","))
    rows = []
    for case in CASES:
        if case.name in wanted:
            with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
                rows.append(explained(case, Path(folder), asked.seconds))
            row = rows[-1]
            told = ", ".join(f"{c['cause']} {c['share']:.2f}" for c in row["causes"][:3])
            fixed = ", ".join(f"{c['cause']} {c['share']:.2f}" for c in row["fixed"][:2])
            print(f"{'ok ' if row['first'] else 'NO '} {case.name:22} {told}; fixed: {fixed}")
    first = sum(row["first"] for row in rows)
    print(f"named first: {first} of {len(rows)}")
    result = {
        "command": "python benchmarks/explain_slow.py",
        "arguments": {"seconds": asked.seconds},
        "environment": environment(),
        "first": first,
        "cases": len(rows),
        "results": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def explained(case: Case, folder: Path, seconds: float) -> dict[str, Any]:
    """Explain a case, and its fix."""
    before, after, fixed = case.build(folder)
    causes = _causes(case, after, seconds, before)
    gone = _causes(case, fixed, seconds)
    return {
        "name": case.name,
        "question": case.question,
        "cause": case.cause,
        "first": bool(causes) and causes[0]["cause"] == case.cause,
        "causes": causes,
        "fixed": gone,
    }


def _causes(
    case: Case, side: Side, seconds: float, before: Side | None = None
) -> list[dict[str, Any]]:
    from tersor.core.runtime import Target
    from tersor.diagnosis import diagnose

    target = Target(runtime=side.runtime, options=side.options)
    found = diagnose(
        side.file,
        None if before is None else before.file,
        question=case.question,
        target=None if case.question == "size" else target,
        batch=side.batch,
        budget_s=seconds,
    )
    return [{"cause": c.cause, "share": c.share, "evidence": c.evidence} for c in found.causes]


if __name__ == "__main__":
    sys.exit(main())
