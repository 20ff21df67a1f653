"""`tersor inspect --groups`: which channels of a network must be cut together."""

from pathlib import Path
from typing import TYPE_CHECKING

from tersor._cli_talk import show, show_json, table, tell
from tersor.core.errors import DataError, ModelError

if TYPE_CHECKING:
    from tersor.core.model import Model
    from tersor.ops.groups import Coupling


def groups(model: "Model", *, data: str | None, out: Path | None, as_json: bool) -> int:
    """List the groups of coupled channels, and draw them."""
    found = _coupled(model, data)
    if out is not None:
        from tersor.ops.group_picture import draw

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(draw(found), encoding="utf-8")
        tell(f"drawn: {out}")
    free, total = found.counts
    if as_json:
        listed = [
            {
                "name": group.name,
                "channels": group.size,
                "places": group.width,
                "made_by": group.makers,
                "through": group.passed,
                "read_by": group.readers,
                "stays": group.stays,
            }
            for group in found.groups
        ]
        counts = {"channels": total, "free": free, "share": free / total if total else 0.0}
        show_json({"origin": model.origin, **counts, "groups": listed})
        return 0
    show(_told(found))
    return 0


def _coupled(model: "Model", data: str | None) -> "Coupling":
    from tersor import pipeline
    from tersor.core.context import Data
    from tersor.ops.attention import split_attention
    from tersor.ops.capture import capture
    from tersor.ops.groups import couple
    from tersor.plan import make_inputs, try_forward

    if model.form != "module":
        raise ModelError(
            f"--groups follows the channels of a network in Python; this one has form "
            f"{model.form!r}. Give FILE.py:FACTORY"
        )
    if data is None and model.inputs is None:
        raise DataError(
            "--groups runs the network once; give --data, such as digits or FILE.py:FUNCTION"
        )
    inputs = make_inputs(model, Data() if data is None else pipeline.load_data(data))
    net = model.net.eval()
    try_forward(net, inputs)
    captured = capture(net, inputs)
    split_attention(captured, inputs)
    return couple(captured, net)


def _told(found: "Coupling") -> str:
    rows = []
    for group in found.groups:
        lines = [
            f"{words} {', '.join(layers)}"
            for words, layers in (
                ("made by", group.makers),
                ("through", group.passed),
                ("read by", group.readers),
            )
            if layers
        ]
        lines[0] += f" (each at {group.width} places)" if group.width > 1 else ""
        lines += [f"stays: {group.stays}"] if group.stays else []
        heads = [(group.name, str(group.size)), *[("", "")] * len(lines)]
        rows += [(*head, line) for head, line in zip(heads, lines, strict=False)]
    free, total = found.counts
    some = sum(not group.stays for group in found.groups)
    share = f" ({100 * free / total:.1f} %)" if total else ""
    return "\n".join(
        [
            table(("group", "channels", ""), rows),
            "",
            f"{free} of {total} channels{share} can be cut, "
            f"in {some} of {len(found.groups)} groups",
        ]
    )
