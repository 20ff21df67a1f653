"""`tersor profile`: where a network's time goes; where layers are faster sparse here."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tersor._cli_place import placed
from tersor._cli_progress import Progress
from tersor._cli_talk import check_out, paragraph, show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.profiler import Sparsity
    from tersor.roofline import Profile


def profile(
    subject: str | None,
    *,
    sparsity: bool,
    shapes: str | None,
    batch: int,
    threads: int | None,
    out: Path | None,
    data: str | None,
    target: str | None,
    weights: Path | None,
    partial: bool,
    fresh: bool,
    as_json: bool,
) -> int:
    """Measure what the words ask for."""
    from tersor.core.errors import RecipeError

    if subject is not None and sparsity:
        raise RecipeError("a network and --sparsity are two profiles; give one of them")
    if subject is not None and shapes:
        raise RecipeError("--shapes is for --sparsity")
    check_out(out, ".html")
    if subject is not None:
        return _network(
            subject,
            data=data,
            target=target,
            batch=batch,
            threads=threads,
            weights=weights,
            partial=partial,
            fresh=fresh,
            out=out,
            as_json=as_json,
        )
    if not sparsity:
        raise RecipeError(
            "say what to profile: a network, or --sparsity: from which share of zeros sparse pays"
        )
    return _sparsity(shapes=shapes, batch=batch, threads=threads, out=out, as_json=as_json)


def _network(
    subject: str,
    *,
    data: str | None,
    target: str | None,
    batch: int,
    threads: int | None,
    weights: Path | None,
    partial: bool,
    fresh: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Profile a network, as an ONNX file: its operators are counted there."""
    from dataclasses import replace

    from tersor import roofline
    from tersor.core.packing import unpacked
    from tersor.core.recipe import read_target

    asked = read_target(target)
    python = not Path(subject).exists()
    with placed(
        subject,
        data=data,
        target="onnxruntime" if python else target,
        batch=batch,
        threads=threads,
        split="test",
        weights=weights,
        partial=partial,
    ) as (place, make):
        on = place.target
        if asked is not None:
            on = replace(asked, options={**place.target.options, **asked.options})
        with unpacked(place.files[0]) as file:
            found = roofline.profile(
                file,
                on,
                make(batch),
                subject=subject,
                batch=batch,
                fresh=fresh,
                display=Progress(),
            )
    if out is not None:
        _write(out, _roofline(found))
    if as_json:
        plain = {**vars(found), "accounted": found.accounted, "agrees": found.agrees}
        show_json({"profile": plain})
    else:
        show(_layers(found))
    for warning in found.warnings:
        tell(f"warning: {warning}")
    return 0


def _write(out: Path, page: str) -> None:
    from tersor.core.files import replace_file

    replace_file(out.absolute(), page.encode())
    tell(f"the picture is in {out}")


def _operators(found: "Profile") -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    head = ("operator", "what", "ms", "share", "MMAC", "kB", "op/byte", "GFLOP/s", "bound", "of it")
    rows = []
    for each in found.layers:
        counted = bool(each.macs)
        rows.append(
            (
                each.name,
                each.what,
                f"{each.ms:.4f}",
                f"{each.share:.1%}",
                f"{each.macs / 1e6:.3f}" if counted else "",
                f"{(each.weight_bytes + each.moved_bytes) / 1e3:.1f}",
                f"{each.intensity:.1f}" if counted else "",
                f"{each.gflops:.1f}" if counted else "",
                "" if each.bound == "none" else f"{each.bound} {each.format}".rstrip(),
                "" if each.bound == "none" else f"{each.of_roof:.0%}",
            )
        )
    return head, rows


def _layers(found: "Profile") -> str:
    said = [paragraph(f"- {words}", "") for words in found.words]
    notes = [paragraph(text, "") for text in _notes(found)]
    return "\n".join([table(*_operators(found)), "", *said, "", *notes])


def _notes(found: "Profile") -> list[str]:
    from tersor.core.report_words import human

    roofs = found.ceilings
    peaks = ", ".join(f"{k} {v:.0f} GFLOP/s ({roofs.by[k]})" for k, v in roofs.gflops.items())
    free_ms = found.free_shapes_ms
    free = f", of which fixed shapes would save {human(free_ms, 'ms')}" if free_ms else ""
    held = "they fit the last cache" if found.cached else "they do not fit the last cache"
    return [
        f"latency {human(found.latency_ms, 'ms')}{free}, operators "
        f"{human(found.operators_ms, 'ms')}: "
        f"{found.target}, batch {found.batch}, threads {found.threads}.",
        f"Measured roofs of this machine: {peaks}; memory {roofs.memory_gb_s:.1f} GB/s, second "
        f"cache {roofs.cache_gb_s:.1f} GB/s. Bytes are those that cannot be avoided: weights, and "
        f"what a fused operator takes and gives; {held}.",
    ]


def _roofline(found: "Profile") -> str:
    from tersor.core.report_words import human
    from tersor.core.roofline_page import Roofs, Spot, page

    spots = [
        Spot(
            number=number,
            name=each.name,
            format=each.format,
            intensity=each.intensity,
            gflops=each.gflops,
            share=each.share,
            tip=f"{number}. {each.name}, {each.what}: {human(each.ms, 'ms')}, {each.share:.1%} of "
            f"the time; {each.gflops:.1f} GFLOP/s, {each.of_roof:.0%} of its roof",
        )
        for number, each in enumerate(found.layers, 1)
        if each.macs
    ]
    roofs = found.ceilings
    slopes = {"second cache": roofs.cache_gb_s, "memory": roofs.memory_gb_s}
    order = sorted(slopes, key=lambda name: (name == "memory") == found.cached)
    head, rows = _operators(found)
    return page(
        f"Where the time of {found.subject} goes",
        f"{' '.join(_notes(found))} The area of a circle is its operator's share of the time, the "
        "number in it the row below; operators without multiply-accumulates are only there.",
        spots,
        Roofs(peaks=roofs.gflops, slopes={name: slopes[name] for name in order}),
        (("", *head), [(str(number), *row) for number, row in enumerate(rows, 1)]),
        found.words,
        found.warnings,
    )


def _sparsity(
    *, shapes: str | None, batch: int, threads: int | None, out: Path | None, as_json: bool
) -> int:
    from tersor import profiler
    from tersor.core.errors import RecipeError

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
        _write(out, _page(found))
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
