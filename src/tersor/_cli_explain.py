"""`tersor explain`: what 8-bit integers, or fusions, buy a network on a target, and why."""

from pathlib import Path
from typing import TYPE_CHECKING

from tersor._cli_talk import colored, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.explainer import Explanation
    from tersor.fusions import Fusions, Step


def explain(
    subject: str,
    *,
    data: str | None,
    target: str | None,
    technique: str | None,
    fusion: bool,
    batch: int,
    threads: int | None,
    budget_s: float,
    weights: Path | None,
    partial: bool,
    as_json: bool,
) -> int:
    """Quantize, or fuse, what the words name, run both, and say why it pays or not."""
    from dataclasses import replace

    from tersor import explainer, fusions, pipeline
    from tersor.core.errors import DataError, ModelError, RecipeError
    from tersor.core.recipe import read_target
    from tersor.core.runtime import Target

    if Path(subject).is_dir():
        raise ModelError(
            f"explain takes a network in Python, such as FILE.py:FACTORY; {subject!r} is a folder"
        )
    if fusion and technique is not None:
        raise RecipeError("--fusion tries every fusion technique; leave --technique out")
    if data is None:
        raise DataError("explain runs the network; give --data, such as FILE.py:FUNCTION")
    chosen = read_target(target) or Target(runtime="onnxruntime")
    if threads is not None:
        chosen = replace(chosen, options={**chosen.options, "threads": threads})
    model = pipeline.load(subject, weights=weights, partial=partial)
    for note in model.notes:
        tell(note)
    if fusion:
        seen = fusions.fusions(
            model, pipeline.load_data(data), target=chosen, batch=batch, budget_s=budget_s
        )
        if as_json:
            show_json({"subject": subject, "fusions": seen})
        else:
            show(_told_fusions(seen))
        return 0
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


def _told_fusions(found: "Fusions") -> str:
    from tersor.core.report_words import ratio_digits

    head = ("operators that could be one", "found", "by export", "by runtime", "partly", "left")
    rows = [
        (r.kind, *(str(n) for n in (r.found, r.by_export, r.by_runtime, r.partly, r.left)))
        for r in found.rows
    ]
    lines = [
        f"{found.target}, batch {found.batch}, threads {found.threads}: the runtime executes "
        f"{found.operators} operators",
        "",
        table(head, rows),
    ]
    for step in found.steps:
        if step.comparison is None:
            lines.append(paragraph(f"- {step.reason}", ""))
            continue
        c = step.comparison
        low, high = ratio_digits(c.low), ratio_digits(c.high)
        lines.append(
            paragraph(
                f"- {step.technique}: {colored(c.verdict)}, {ratio_digits(c.speedup)}x as fast "
                f"({low} to {high}); {_operators(step)}",
                "",
            )
        )
    return "\n".join(lines)


def _operators(step: "Step") -> str:
    if step.same:
        return "the runtime executes the same operators as without it"
    return f"{step.operators[0]} operators -> {step.operators[1]}"
