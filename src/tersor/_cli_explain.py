"""`tersor explain`: why a network is fast or small, or not; what integers or fusions buy it."""

from pathlib import Path
from typing import TYPE_CHECKING

from tersor._cli_talk import colored, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.diagnosis import Diagnosis
    from tersor.explainer import Explanation
    from tersor.fusions import Fusions, Step


def explain(
    subject: str,
    other: str | None,
    *,
    question: str | None,
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
    from tersor.subjects import on_disk

    if other is not None or question is not None or (on_disk(subject) and not fusion):
        if not on_disk(subject):
            asked = "a second file" if other is not None else "--of"
            raise RecipeError(
                f"{asked} is for an artifact or a model file; {subject!r} is neither. Without it, "
                "explain says what to expect of a network in Python"
            )
        for given, name in (
            (technique, "--technique"),
            (weights, "--weights"),
            (fusion or None, "--fusion"),
        ):
            if given is not None:
                raise RecipeError(f"{name} goes with a network in Python; {subject!r} is on disk")
        return _diagnose(
            subject,
            other,
            question=question,
            data=data,
            target=target,
            batch=batch,
            threads=threads,
            budget_s=budget_s,
            as_json=as_json,
        )
    if Path(subject).is_dir():
        raise ModelError(
            f"explain --fusion takes a network, such as FILE.py:FACTORY; {subject!r} is a folder"
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


def _diagnose(
    subject: str,
    other: str | None,
    *,
    question: str | None,
    data: str | None,
    target: str | None,
    batch: int,
    threads: int | None,
    budget_s: float,
    as_json: bool,
) -> int:
    """Say why what is on disk is not faster, or not smaller."""
    from tersor import pipeline
    from tersor.core.recipe import read_target
    from tersor.diagnosis import diagnose

    before, after = (None, subject) if other is None else (subject, other)
    found = diagnose(
        after,
        before,
        question=question or "latency",
        data=None if data is None else pipeline.load_data(data),
        target=read_target(target),
        batch=batch,
        threads=threads,
        budget_s=budget_s,
    )
    if as_json:
        show_json({"subject": after, "before": before, "diagnosis": found})
    else:
        show(_told_causes(found))
    return 0


def _told_causes(found: "Diagnosis") -> str:
    from tersor.core.report_words import human, ratio_digits

    lines = []
    if found.question == "size":
        sizes = " -> ".join(human(size, "B") for size in found.size_bytes)
        lines += [f"{found.name}: {sizes}", "", *_told_contents(found)]
    else:
        lines.append(f"{found.target}, batch {found.batch}, threads {found.threads}")
        if found.comparison is not None:
            c = found.comparison
            lines.append(
                f"{colored(c.verdict)}, {ratio_digits(c.speedup)}x as fast as before "
                f"({ratio_digits(c.low)} to {ratio_digits(c.high)})"
            )
    what = "bytes" if found.question == "size" else "time"
    if not found.causes:
        lines.append(f"nothing found that takes a good part of its {what} in vain")
    for number, each in enumerate(found.causes, start=1):
        lines += [
            "",
            paragraph(
                f"{number}. {each.cause}: {each.meaning} ({100 * each.share:.0f} % of the {what}; "
                f"without it at most {ratio_digits(each.at_most)}x)",
                "",
            ),
            paragraph(f"evidence: {each.evidence}", "   "),
            paragraph(f"to do: {each.fix}", "   "),
        ]
    return "\n".join(lines)


def _told_contents(found: "Diagnosis") -> list[str]:
    """Write what the bytes are, and what made them fewer."""
    from tersor._size_parts import gained
    from tersor.core.report_words import human

    columns = [{part.what: part for part in parts} for parts in found.contents]
    largest: dict[str, int] = {}
    for part in (part for parts in found.contents for part in parts):
        largest[part.what] = max(part.bytes, largest.get(part.what, part.bytes))
    whats = sorted(largest, key=lambda what: -largest[what])
    rows = [
        (what, *(human(c[what].bytes, "B") if what in c else "" for c in columns)) for what in whats
    ]
    head = ("bytes", "before", "now") if len(columns) == 2 else ("bytes", "")
    said = gained(*found.contents) if len(columns) == 2 else ""
    return [table(head, rows), "", *([f"it went from {said}"] if said else [])]


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
