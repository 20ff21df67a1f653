"""`tersor profile`: where layers are faster sparse on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tersor._cli_talk import Progress, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.profiler import Sparsity


def profile(
    *,
    sparsity: bool,
    shapes: str | None,
    batch: int,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure what the words ask for."""
    from tersor.core.errors import RecipeError

    if not sparsity:
        raise RecipeError("say what to profile: --sparsity, from which share of zeros sparse pays")
    if out is not None and out.suffix != ".html":
        raise RecipeError(f"--out {str(out)!r} must end in .html")
    if out is not None and not out.absolute().parent.is_dir():
        raise RecipeError(f"--out {str(out)!r}: the folder does not exist")
    from tersor import profiler

    wanted = profiler.SHAPES if shapes is None else tuple(w for w in shapes.split(",") if w)
    if not wanted:
        raise RecipeError("--shapes names no layer; give some, such as 1024x1024,64x64k3@32")
    found = profiler.sparsity(
        wanted,
        batch=batch,
        threads=threads or 0,
        display=Progress(),
    )
    for warning in found.warnings:
        tell(f"warning: {warning}")
    if out is not None:
        from tersor.core.files import replace_file

        replace_file(out.absolute(), _page(found).encode())
        tell(f"the picture is in {out}")
    if as_json:
        show_json({"sparsity": found})
    else:
        show(table(*_table(found)))
        show()
        show(paragraph(_note(found), ""))
    return 0


def _table(found: "Sparsity") -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    from tersor.core.report_words import human, ratio_digits
    from tersor.core.sparsity_page import even_words

    zeros = [race.zeros for race in found.layers[0].races]
    head = ("layer", "best dense", *(f"{z:g} %" for z in zeros), "faster from")
    rows = []
    for layer in found.layers:
        first = layer.races[0]
        dense = f"{human(first.against[first.best].dense_ms, 'ms')} ({first.best})"
        times = [ratio_digits(race.against[race.best].times) + "x" for race in layer.races]
        rows.append((layer.name, dense, *times, even_words(layer.curve())))
    return head, rows


def _note(found: "Sparsity") -> str:
    return (
        "Times as fast as the best dense kernel of the runtimes installed here, by percent of "
        f"zeros; batch {found.batch}, threads {found.threads}. Sparse kernel: {found.kernel}; it "
        "runs on one thread."
    )


def _page(found: "Sparsity") -> str:
    from tersor.core.sparsity_page import page

    machine = found.environment["machine"]
    return page(
        "From how many zeros on is sparse execution faster?",
        f"{machine['cpu']} ({machine['architecture']}). {_note(found)} Interleaved runs; bars are "
        "95 % intervals.",
        [layer.curve() for layer in found.layers],
        _table(found),
        found.warnings,
    )
