"""`tersor measure --all-runtimes`: one table over everything that is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_place import loaded
from tersor._cli_progress import Progress
from tersor._cli_talk import colored, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.survey import Row, Survey


def survey(
    subject: str,
    *,
    data: str | None,
    runtimes: Sequence[str],
    metrics: Sequence[str],
    batch: int,
    threads: int | None,
    split: str,
    weights: Path | None,
    partial: bool,
    as_json: bool,
) -> int:
    """Try a network on every runtime.

    Returns:
        The exit code: 4 where it ran on none.
    """
    from tersor import survey as surveys
    from tersor.core import plugins
    from tersor.core.artifact import Artifact
    from tersor.core.errors import ModelError
    from tersor.core.hardware import environment, preflight, probe

    for name in metrics:
        plugins.metric(name)
    for name in runtimes:
        plugins.runtime(name)
    place = subject
    if Path(subject).is_dir():
        (file, *_) = Artifact.open(subject).model_files
        if file.suffix not in (".onnx", ".pt2"):
            raise ModelError(
                f"{file.name} cannot be exported to other runtimes; give the network that "
                f"{subject!r} was made from, and --weights {subject}"
            )
        place = str(file)
    model, batches, inputs = loaded(place, data, weights=weights, partial=partial)
    warnings = preflight(probe())
    found = surveys.survey(
        model,
        data=batches,
        inputs=inputs,
        runtimes=runtimes,
        metrics=tuple(metrics) or surveys.METRICS,
        batch=batch,
        threads=threads or 0,
        split=split,
        display=Progress(),
    )
    if as_json:
        show_json({"survey": found, "environment": environment(), "warnings": warnings})
    else:
        show(_table(found))
        first = next((row.runtime for row in found.rows if row.status == "ran"), None)
        if first is not None:
            show(paragraph(f"speed is that of {first}; {found.how}; intervals: --json", ""))
        for text in warnings:
            tell(f"warning: {text}")
    return 0 if any(row.status == "ran" for row in found.rows) else 4


def _table(found: "Survey") -> str:
    from tersor.core.report_words import metric_word

    extra = [
        name
        for name in dict.fromkeys(name for row in found.rows for name in row.measurements)
        if not name.startswith("latency")
    ]
    head = ["runtime", *(metric_word(name) for name in extra), "p50", "p90", "speed", ""]
    return table(head, [_cells(row, extra) for row in found.rows])


def _cells(row: "Row", extra: Sequence[str]) -> list[str]:
    from tersor.core.report_words import human, ratio_digits

    def cell(name: str) -> str:
        made: Any = row.measurements.get(name)
        return "" if made is None else human(made.value, made.unit)

    speed = "" if row.speed is None else f"{ratio_digits(row.speed[0])}x"
    last = "" if row.status == "ran" else f"{colored(row.status)}: {row.reason}"
    return [row.runtime, *map(cell, extra), cell("latency"), cell("latency_p90"), speed, last]
