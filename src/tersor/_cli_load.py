"""`tersor measure --sweep` and `tersor measure --mode`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_place import placed
from tersor._cli_progress import Progress
from tersor._cli_talk import colored, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.scenario import Mode, Percentile, Scenario
    from tersor.sweep import Cell, Sweep


def load(
    subject: str,
    *,
    sweep: bool,
    modes: Sequence[str],
    batches: str | None,
    cells: str | None,
    rate: float | None,
    limit: str | None,
    seconds: float | None,
    data: str | None,
    target: str | None,
    batch: int,
    threads: int | None,
    split: str,
    weights: Path | None,
    partial: bool,
    as_json: bool,
) -> int:
    """Measure a network under load.

    Returns:
        The exit code: 4 where nothing ran, 1 where nothing keeps the limit.
    """
    from tersor import scenario as scenarios
    from tersor import sweep as sweeps
    from tersor.core.errors import RecipeError, suggest
    from tersor.core.hardware import environment, preflight, probe

    if sweep and modes:
        raise RecipeError("--sweep and --mode are two measurements; give one of them")
    if not sweep and not modes:
        raise RecipeError("say under what load: --sweep, or --mode single|multi|server|offline")
    for mode in modes:
        if mode not in scenarios.MODES:
            raise RecipeError(
                f"--mode {mode!r} is none of {', '.join(scenarios.MODES)}."
                f"{suggest(mode, scenarios.MODES)}"
            )
    limit_ms = None if limit is None else _limit_ms(limit)
    if "server" in modes and rate is None and limit_ms is None:
        raise RecipeError(
            "--mode server needs --rate, or a --latency-limit to search the largest rate by"
        )
    if "server" in modes and rate is not None and limit_ms is not None:
        raise RecipeError(
            "--mode server takes --rate, or a --latency-limit to search a rate by; not both"
        )
    if (rate is not None or limit_ms is not None) and not (sweep or "server" in modes):
        raise RecipeError("--rate and --latency-limit are for --mode server and --sweep")
    if (batches or cells) and not sweep:
        raise RecipeError("--batches and --cells are for --sweep")
    sizes = sweeps.BATCHES if batches is None else _sizes(batches)
    combined = None if cells is None else sweeps.read_cells(cells)
    warnings = preflight(probe())
    names = {
        "data": data,
        "target": target,
        "batch": batch,
        "threads": threads,
        "split": split,
        "weights": weights,
        "partial": partial,
    }
    about = {"subject": subject, "environment": environment(), "warnings": warnings}
    if sweep:
        found = _swept(subject, names, sizes, combined, seconds)
        if as_json:
            show_json({**about, "sweep": found.plain(limit_ms)})
        else:
            show(_grid(found, limit_ms))
        code = 0 if found.ran else 4
        if found.ran and limit_ms is not None and found.within(limit_ms) is None:
            code = 1
    else:
        rows = _modes(subject, names, [m for m in scenarios.MODES if m in modes], seconds, rate,
                      limit_ms)  # fmt: skip
        if as_json:
            plain = [r if isinstance(r, Mapping) else {"status": "ran", **vars(r)} for r in rows]
            show_json({**about, "modes": plain})
        else:
            show(_scenarios(rows))
        code = 4 if all(isinstance(row, Mapping) for row in rows) else 0
    for text in warnings:
        tell(f"warning: {text}")
    return code


def _swept(
    subject: str,
    names: Mapping[str, Any],
    sizes: Sequence[int],
    cells: Sequence[tuple[int, int]] | None,
    seconds: float | None,
) -> "Sweep":
    from tersor import sweep as sweeps
    from tersor.core.hardware import usable_cores
    from tersor.instances import Apart

    cores = usable_cores()
    chosen = sweeps.grid(cores) if cells is None else cells
    if cells is None and names["threads"]:
        chosen = sorted({(names["threads"], instances) for _, instances in chosen})
    with placed(subject, **names) as (place, make):
        return sweeps.sweep(
            lambda threads: Apart(place, threads=threads),
            make,
            cells=chosen,
            batches=sizes,
            cores=None if cells is not None else cores,  # asked for by name: measured
            seconds=seconds or sweeps.SECONDS,
            display=Progress(),
        )


def _modes(
    subject: str,
    names: Mapping[str, Any],
    modes: "Sequence[Mode]",
    seconds: float | None,
    rate: float | None,
    limit_ms: float | None,
) -> "list[Scenario | dict[str, str]]":
    """Run each mode in a process of its own; one that fails says why, and the others go on."""
    from tersor import scenario as scenarios
    from tersor.core.errors import TersorError
    from tersor.instances import Apart

    rows: list[Scenario | dict[str, str]] = []
    with placed(subject, **names) as (place, make):
        for mode in Progress()(modes, "running the modes", len(modes)):
            instance = None
            try:
                instance = Apart(place, threads=names["threads"] or 0)
                rows.append(
                    scenarios.scenario(
                        instance,
                        make,
                        mode,
                        seconds=seconds or scenarios.SECONDS,
                        batch=None if names["batch"] == 1 else names["batch"],
                        rate=rate,
                        limit_ms=limit_ms,
                    )
                )
            except TersorError as error:
                rows.append({"mode": mode, "status": "failed", "reason": str(error)})
            finally:
                if instance is not None:
                    instance.close()
    return rows


def _grid(found: "Sweep", limit_ms: float | None) -> str:
    from tersor.sweep import ENOUGH, ROUNDS, picked

    front = {id(cell) for cell in found.pareto}
    head = ("threads", "instances", "batch", "ms/batch", "ms/sample", "batches/s", "samples/s",
            "stalls", "")  # fmt: skip
    rows = [_cells(c, "Pareto" if id(c) in front else "") for c in found.cells if _said(c)]
    lines = [table(head, rows), ""]
    oversubscribed = dict.fromkeys(
        f"{c.threads}x{c.instances}" for c in found.cells if not _said(c)
    )
    if oversubscribed:
        words = ", ".join(oversubscribed)
        lines.append(f"skipped as oversubscribed: {words}; --cells {words} measures them")
    if not found.ran:
        return "\n".join(lines)
    for words, cell in picked(found, limit_ms).items():
        lines.append(f"{words}: {'none' if cell is None else _where(cell)}")
    note = (
        "Threads are those of each instance; instances are processes that run at the same time. "
        f"ms/batch is the median of {ROUNDS} rounds in which batch sizes took turns, of one "
        "instance, and all other figures follow from it; Pareto: no other cell is better in both "
        f"ms/batch and samples/s; knee: the smallest batch with {ENOUGH:.0%} of the most samples/s."
    )
    return "\n".join([*lines, "", paragraph(note, "")])


def _said(cell: "Cell") -> bool:
    return not cell.reason.startswith("oversubscribed")


def _cells(cell: "Cell", mark: str) -> list[str]:
    about = [str(cell.threads), str(cell.instances), str(cell.batch)]
    if cell.status != "ran":
        return [*about, "", "", "", "", "", f"{colored(cell.status)}: {cell.reason}"]
    spread = f"{_figure(cell.batch_ms)} ({_figure(cell.low_ms)} to {_figure(cell.high_ms)})"
    rates = [_figure(x) for x in (cell.sample_ms, cell.batches_per_s, cell.samples_per_s)]
    return [*about, spread, *rates, str(cell.stalls), mark]


def _where(cell: "Cell") -> str:
    return (
        f"batch {cell.batch} on {cell.threads} thread(s) x {cell.instances} instance(s): "
        f"{_figure(cell.samples_per_s)} samples/s, {_figure(cell.batch_ms)} ms/batch"
    )


def _scenarios(rows: "Sequence[Scenario | Mapping[str, str]]") -> str:
    head = ("mode", "queries", "batch", "queries/s", "samples/s", "p50", "p90", "p99", "p99.9",
            "slowest", "stalls", "")  # fmt: skip
    cells: list[list[str]] = []
    for row in rows:
        if isinstance(row, Mapping):
            failed = f"{colored(row['status'])}: {row['reason']}"
            cells.append([row["mode"], *[""] * 10, failed])
            continue
        asked = row.queries / row.seconds if row.rate is None else row.rate
        shown = [*(_told(each) for each in row.percentiles), _figure(row.slowest_ms)]
        if row.mode == "offline":  # all arrive at once: a latency says only how many they are
            shown = [""] * len(shown)
        last = "; ".join(text for text in (row.note, row.short) if text)
        cells.append(
            [row.mode, f"{row.queries:,}", str(row.batch), _figure(asked),
             _figure(row.samples_per_s), *shown, str(row.stalls), last]
        )  # fmt: skip
    notes = [
        f"{row.mode}: p{each.percent:g}: {each.note}"
        for row in rows
        if not isinstance(row, Mapping) and row.mode != "offline"
        for each in row.percentiles
        if each.note
    ]
    note = (
        "Percentiles and the slowest are of the latency of a query in ms, percentiles with 95 % "
        "order-statistic intervals; in the mode server it counts from the query's arrival, the "
        "wait in the queue included. Stalls are runs, without that wait, of 10 times the median or "
        "longer; they are in every number."
    )
    return "\n".join([table(head, cells), "", *notes, paragraph(note, "")])


def _told(found: "Percentile") -> str:
    if found.ms is None or found.low_ms is None or found.high_ms is None:
        return "-"
    return f"{_figure(found.ms)} ({_figure(found.low_ms)} to {_figure(found.high_ms)})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _limit_ms(text: str) -> float:
    from tersor.core.errors import RecipeError
    from tersor.core.goal import Limit

    try:
        limit = Limit.parse(text)
        if limit.kind != "value":
            raise ValueError(f"{text!r} is not a time")
        found = limit.bound(0.0, "ms", "lower")
    except ValueError as error:
        raise RecipeError(f"--latency-limit: {error}; write for instance '5 ms'") from None
    if found <= 0:
        raise RecipeError(f"--latency-limit {text!r} must be more than 0")
    return found


def _sizes(text: str) -> list[int]:
    from tersor.core.errors import RecipeError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise RecipeError(f"--batches {text!r} must be numbers from 1 on, such as 1,8,32")
    return sorted({int(word) for word in words})
