"""`tersor explain`: what 8-bit integers buy a network on a target, and why."""

from pathlib import Path
from typing import TYPE_CHECKING

from tersor._cli_talk import colored, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.explainer import Explanation


def explain(
    subject: str,
    *,
    data: str | None,
    target: str | None,
    technique: str | None,
    batch: int,
    threads: int | None,
    budget_s: float,
    weights: Path | None,
    partial: bool,
    as_json: bool,
) -> int:
    """Quantize what the words name, run both under the profiler, and say why it pays or not."""
    from dataclasses import replace

    from tersor import explainer, pipeline
    from tersor.core.errors import DataError, ModelError
    from tersor.core.recipe import read_target
    from tersor.core.runtime import Target

    if Path(subject).is_dir():
        raise ModelError(
            f"explain takes a network in Python, such as FILE.py:FACTORY; {subject!r} is a folder"
        )
    if data is None:
        raise DataError("explain runs the network; give --data, such as FILE.py:FUNCTION")
    chosen = read_target(target) or Target(runtime="onnxruntime")
    if threads is not None:
        chosen = replace(chosen, options={**chosen.options, "threads": threads})
    model = pipeline.load(subject, weights=weights, partial=partial)
    for note in model.notes:
        tell(note)
    found = explainer.explain(
        model,
        pipeline.load_data(data),
        target=chosen,
        technique=technique,
        batch=batch,
        budget_s=budget_s,
    )
    if as_json:
        show_json({"subject": subject, "explanation": found})
    else:
        show(_told(found))
    return 0


def _told(found: "Explanation") -> str:
    from tersor.core.report_words import human, ratio_digits

    c = found.comparison
    low, high = ratio_digits(c.low), ratio_digits(c.high)
    rows = []
    for part in found.parts:
        gain = ratio_digits(part.float_ms / part.int8_ms) + "x" if part.int8_ms else ""
        rows.append(
            (
                part.name,
                human(part.float_ms, "ms") if part.float_ms else "",
                human(part.int8_ms, "ms") if part.int8_ms else "",
                gain if part.float_ms else "",
                f"{part.macs / 1e6:,.1f} M" if part.macs else "",
                f"{part.reuse:,.0f}" if part.reuse else "",
            )
        )
    head = ("operators", "float", "int8", "faster", "products", "of each weight read")
    return "\n".join(
        [
            f"int8 by {found.technique} on {found.target}, batch {found.batch}, threads "
            f"{found.threads}: {colored(c.verdict)}, {ratio_digits(c.speedup)}x as fast "
            f"({low} to {high}), {human(c.a_ms, 'ms')} -> {human(c.b_ms, 'ms')}",
            "",
            table(head, rows),
            *(paragraph(f"- {reason}", "") for reason in found.reasons),
        ]
    )
