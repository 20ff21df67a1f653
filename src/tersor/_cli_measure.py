"""`tersor measure` and `tersor compare`."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_place import exported, loaded, split_of
from tersor._cli_talk import colored, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.core.metric import Measurement
    from tersor.core.runtime import Target
    from tersor.core.statistics import Comparison

METRICS = ("size", "latency")
_GATES: Mapping[str, tuple[str, ...]] = {
    "faster": ("faster",),
    "not-slower": ("faster", "no difference"),
}


def measure(
    subject: str,
    *,
    data: str | None,
    target: str | None,
    metrics: Sequence[str],
    batch: int,
    threads: int | None,
    split: str,
    weights: Path | None,
    partial: bool,
    as_json: bool,
) -> int:
    """Measure what the words name.

    A folder or a model file is measured as it is; a network in Python is exported first.
    """
    from tersor.core import plugins
    from tersor.core.recipe import read_target
    from tersor.subjects import on_disk

    names = tuple(dict.fromkeys(metrics)) or METRICS
    for name in names:
        plugins.metric(name)
    asked = read_target(target)
    path = Path(subject)
    if on_disk(subject):
        from tersor import benchmark

        # compress keeps the untouched original inside the artifact
        original = path / "original"
        found = benchmark.measure(
            subject,
            names,
            data=None if data is None else _data(data),
            target=asked,
            batch=batch,
            threads=threads,
            split=split,
            reference=original if original.is_dir() else None,
        )
    else:
        found = _exported(subject, names, data, asked, batch, threads, split, weights, partial)
    if as_json:
        show_json({"subject": subject, "measurements": found})
    else:
        show(_figures(found))
        tell(f"target {found[0].conditions['target']}")
    return 0


def _exported(
    subject: str,
    names: tuple[str, ...],
    data: str | None,
    target: "Target | None",
    batch: int,
    threads: int | None,
    split: str,
    weights: Path | None,
    partial: bool,
) -> "tuple[Measurement, ...]":
    """Export a network to the target, into a folder that is removed again, and measure it there."""
    from tersor.candidate import score

    model, batches, inputs = loaded(subject, data, weights=weights, partial=partial)
    samples = split_of(batches, split)
    with (
        tempfile.TemporaryDirectory(prefix="tersor-") as folder,
        exported(model, inputs, Path(folder), samples, target, batch, threads) as candidate,
    ):
        scores = score(candidate, names, split, batches, batch=batch, reference=None)
    return tuple(scores.measurements.values())


def compare(
    a: str,
    b: str | None,
    *,
    data: str | None,
    target: str | None,
    batch: int,
    threads: int | None,
    min_effect: float,
    budget_s: float,
    aa: int,
    gate: str | None,
    seed: int,
    as_json: bool,
) -> int:
    """Time two artifacts or model files against each other.

    Returns:
        The exit code: 1 where `gate` asks for more than what was found.
    """
    from tersor.core.errors import RecipeError, suggest
    from tersor.core.recipe import read_target

    if gate is not None and gate not in _GATES:
        raise RecipeError(
            f"--gate {gate!r} is neither faster nor not-slower.{suggest(gate, _GATES)}"
        )
    if b is None and not aa:
        raise RecipeError("give a second artifact or model file, or --aa N to check A with itself")
    from tersor import benchmark

    found = benchmark.compare(
        a,
        a if b is None else b,
        data=None if data is None else _data(data),
        target=read_target(target),
        batch=batch,
        threads=threads,
        min_effect=min_effect,
        budget_s=budget_s,
        aa=aa,
        seed=seed,
    )
    if as_json:
        show_json({"a": a, "b": a if b is None else b, "comparison": found})
    else:
        show(_verdict(found))
    for text in found.warnings:
        tell(f"warning: {text}")
    return 0 if gate is None or (found.verdict in _GATES[gate] and found.stable) else 1


def _verdict(found: "Comparison") -> str:
    from tersor.core.report_words import human, ratio_digits

    low, high = ratio_digits(found.low), ratio_digits(found.high)
    parts = [
        f"{colored(found.verdict)}: B is {ratio_digits(found.speedup)}x as fast ({low} to {high})",
        table(
            ("", "median of a batch"),
            [("A", human(found.a_ms, "ms")), ("B", human(found.b_ms, "ms"))],
        ),
        paragraph(found.how, ""),
    ]
    if found.self_check is not None:
        parts.append(_checked(found.self_check))
    return "\n".join(parts)


def _checked(check: Mapping[str, Any]) -> str:
    count = check["repetitions"]
    wrong = check["faster"] + check["slower"]
    worst = 100 * check["worst_error"]
    return (
        f"self check: A against itself {count} times: {wrong} called different "
        f"(minimum effect {100 * check['min_effect']:g} %), {check['interval_without_1']} with a "
        f"minimum effect of 0; worst ratio off by {worst:.2f} %"
    )


def _figures(found: "Sequence[Measurement]") -> str:
    from tersor.core.report_view import figure
    from tersor.core.report_words import metric_word

    rows = [(metric_word(m.metric), figure(m), m.how) for m in found]
    return table(("metric", "value", "how"), rows)


def _data(text: str) -> Any:
    from tersor import pipeline

    return pipeline.load_data(text)
