"""`tersor advise --machine`: machines that are not here, and where to run a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_place import placed
from tersor._cli_talk import paragraph, show, show_json, table, tell
from tersor.core.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from tersor.core.machine import Machine
    from tersor.described import Prediction
    from tersor.offloading import Offloading, Option

_SHOWN = 3


def described(
    model: str,
    *,
    data: str | None,
    machines: Sequence[str],
    link: str | None,
    deadline: str | None,
    server: str | None,
    batch: int,
    as_json: bool,
    edge: str | None = None,
    edge_link: str | None = None,
    weights: Path | None = None,
    partial: bool = False,
) -> int:
    """Compare machines; with a link, say whether to run on the device, on a server, or on both.

    Args:
        model: As other verbs take it; it must be one that ONNX can hold.
        data: As other verbs take it.
        machines: Names, files, or `all`.
        link: Such as 50Mbit,30ms.
        deadline: Such as 20ms.
        server: The machine at the other end of the link.
        batch: Samples in a run.
        as_json: One JSON document instead of tables.
        edge: A second server, near.
        edge_link: The link to it.
        weights: Of a network in Python.
        partial: Whether weights may fit in part.

    Returns:
        The exit code: 1 where no machine can run it, or nothing meets the deadline.

    Raises:
        RecipeError: the words do not go together, or name nothing.
    """
    from tersor.core.machine import find
    from tersor.offloading import Link, read_deadline

    chosen = _chosen(machines)
    limit = None if deadline is None else read_deadline(deadline)
    if link is None:
        if server or edge or edge_link:
            raise RecipeError("--server and --edge need --link, such as --link 50Mbit,30ms")
        net, inputs = _counted(model, data, batch, weights, partial)
        return _comparison(net, inputs, chosen, limit, as_json)
    way = Link.parse(link)
    if server is None:
        raise RecipeError("--link needs --server, the machine at its other end, such as l4")
    if len(chosen) != 1:
        raise RecipeError(
            f"--link is between one device and a server; {len(chosen)} machines given"
        )
    if (edge is None) != (edge_link is None):
        raise RecipeError(
            "--edge and --edge-link go together, such as --edge l4 --edge-link 1000Mbit,2ms"
        )
    away, near = find(server), None if edge is None else find(edge)
    near_way = None if edge_link is None else Link.parse(edge_link)
    net, inputs = _counted(model, data, batch, weights, partial)
    from tersor.offloading import offload

    found = offload(
        net,
        inputs,
        device=chosen[0],
        server=away,
        link=way,
        edge=near,
        edge_link=near_way,
        deadline_ms=limit,
    )
    if as_json:
        show_json({"offloading": found})
    else:
        show(_ways(found))
    reached = limit is None or any(each.meets != "no" for each in found.options)
    return 0 if found.options and reached else 1


def _chosen(names: Sequence[str]) -> "list[Machine]":
    from tersor.core.machine import find, machines

    every = [each for name in names for each in (machines() if name == "all" else [name])]
    if not every:
        raise RecipeError("--machine names none; `tersor list machines` shows them, all takes all")
    return [find(name) for name in dict.fromkeys(every)]


def _counted(
    model: str, data: str | None, batch: int, weights: Path | None, partial: bool
) -> tuple[Any, Any]:
    """Read a network as ONNX, and one batch for it."""
    import onnx

    from tersor.core.packing import unpacked

    python = not Path(model).exists()
    with (
        placed(
            model,
            data=data,
            target="onnxruntime" if python else None,
            batch=batch,
            threads=None,
            split="test",
            weights=weights,
            partial=partial,
        ) as (place, make),
        unpacked(place.files[0]) as file,
    ):
        if file.suffix != ".onnx":
            raise ModelError(
                f"the work in {file.name!r} cannot be counted; give the network it was made "
                "from, or its .onnx file"
            )
        return onnx.load(file), make(batch)[0]


def _comparison(
    net: Any, inputs: Any, machines: "Sequence[Machine]", limit: float | None, as_json: bool
) -> int:
    from tersor.described import compare

    found = compare(net, inputs, machines)
    able = [each for each in found if each.best is not None]
    reached = limit is None or any(_meets(each, limit) != "no" for each in able)
    if as_json:
        rows = [
            {**vars(each), "meets": None if limit is None else _meets(each, limit)}
            for each in found
        ]
        show_json({"machines": rows, "deadline_ms": limit})
    else:
        show(_table(found, limit))
        for each in found[:_SHOWN] if len(found) > _SHOWN else found:
            show()
            show(_words(each))
        show()
        show(paragraph(_note(found), ""))
    if not able:
        tell("none of these machines can run it")
    elif not reached:
        tell(f"nothing meets {limit:g} ms; a smaller network or a faster machine may")
    return 0 if able and reached else 1


def _meets(found: "Prediction", limit: float) -> str:
    if not found.able or found.reason:
        return "no"
    if min(each.high_ms for each in found.able) <= limit:
        return "yes"
    return "perhaps" if min(each.low_ms for each in found.able) <= limit else "no"


def _span(low: float, high: float) -> str:
    from tersor.core.report_words import human

    return f"{human(low, 'ms')} to {human(high, 'ms')}"


def _table(found: "Sequence[Prediction]", limit: float | None) -> str:
    head = ["machine", "kind", "as it is", "fastest", "bound by", "what buys most there"]
    if limit is not None:
        head.insert(5, f"in {limit:g} ms")
    rows = []
    for each in found:
        plain, best = each.plain, each.best
        if plain is None or best is None:
            cells = [each.machine.name, each.machine.kind, "", "", "", f"cannot: {each.reason}"]
        else:
            cells = [
                each.machine.name,
                each.machine.kind,
                f"{_span(plain.low_ms, plain.high_ms)} {plain.format}",
                "" if best is plain else f"{_span(best.low_ms, best.high_ms)} {best.format}",
                plain.bound,
                _most(each),
            ]
        if limit is not None:
            cells.insert(5, _meets(each, limit))
        rows.append(cells)
    return table(head, rows)


def _most(found: "Prediction") -> str:
    if not found.gains:
        return "nothing"
    gain = found.gains[0]
    return f"{gain.technique} {gain.low:.2g}x to {gain.high:.2g}x"


def _words(found: "Prediction") -> str:
    machine = found.machine
    power = f", up to {machine.watts:g} W" if machine.watts else ""
    lines = [f"{machine.name}: {machine.what}{power}"]
    if found.reason:
        return "\n".join([*lines, paragraph(f"- cannot run it: {found.reason}", "  ")])
    if found.plain is not None and found.plain.format == "int8":
        alone = machine.formats == ("int8",)
        why = "it computes in 8-bit integers alone" if alone else "other formats do not fit"
        lines.append(paragraph(f"- needs static: {why}", "  "))
    for gain in found.gains:
        text = f"- {gain.technique}: {gain.low:.2f}x to {gain.high:.2f}x; {gain.why}"
        lines.append(paragraph(text, "  "))
    if found.useless:
        text = "; ".join(f"{name}: {why}" for name, why in found.useless.items())
        lines.append(paragraph(f"- buys nothing there: {text}", "  "))
    if machine.runtimes:
        lines.append(paragraph(f"- export for it: {', '.join(machine.runtimes)}", "  "))
    return "\n".join(lines)


def _note(found: "Sequence[Prediction]") -> str:
    from tersor.described import unknown_starts

    first = found[0]
    parts = (
        f"{first.macs / 1e6:.1f} million multiply-accumulates in {first.operators} operators. "
        "Predicted from documents, not measured there: each roof reached at 80 % to 10 %.",
        unknown_starts([each.machine for each in found]),
        "Measure on the machine before you decide between ranges that overlap.",
    )
    return " ".join(part for part in parts if part)


def _ways(found: "Offloading") -> str:
    head = ["where", "computes", "format", "time", "device", "link", "server", "sent", ""]
    if found.deadline_ms is not None:
        head.insert(4, f"in {found.deadline_ms:g} ms")
    rows = []
    for each in found.options:
        cells = [
            each.where,
            ", ".join(name for name in (each.device, each.server) if name),
            each.format,
            _span(each.low_ms, each.high_ms),
            _span(*each.device_ms) if each.device else "",
            _link(each),
            _span(*each.server_ms) if each.server else "",
            _sent(each),
            f"split after {each.after}" if each.after else "",
        ]
        if found.deadline_ms is not None:
            cells.insert(4, each.meets)
        rows.append(cells)
    lines = [table(head, rows), ""]
    lines += [paragraph(f"- {text}", "") for text in found.refused]
    lines += [paragraph(f"- {text}", "") for text in (found.advice, found.unknown) if text]
    return "\n".join(lines)


def _link(option: "Option") -> str:
    from tersor.core.report_words import human

    return human(option.link_ms, "ms") if option.server else ""


def _sent(option: "Option") -> str:
    from tersor.core.report_words import human

    return f"{human(option.sent_bytes, 'B')} in {option.bits} bit" if option.server else "nothing"
