"""Where the time goes: sums by kind and by layer, and a word where that is not known."""

import re

from tersor.core.report import OperatorReport, OperatorsReport, Report
from tersor.core.report_operators import operators
from tersor.core.schema import Mistakes, from_plain, to_plain


def operator(name: str, part: str, ms: float, layer: str = "") -> OperatorReport:
    return OperatorReport(name=name, kind="Conv", part=part, ms=ms, layer=layer)


FOUND = OperatorsReport(
    before=(
        operator("a", "convolutions", 0.3, "conv1"),
        operator("b", "convolutions", 0.5, "conv2"),
        operator("r", "everything else", 0.2),
    ),
    after=(
        operator("q", "rounding", 0.05),
        operator("<a>", "convolutions", 0.2, "conv1"),
    ),
    how="a <profiler>",
)


def cells(lines: list[str], start: str) -> list[list[str]]:
    """Return the texts of a table's rows, English first where there are two."""
    text = "\n".join(lines)
    table = text.partition(start)[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2])
    return [
        [
            re.sub(r"<[^>]*>", "", re.sub(r'<span class="zh".*?</span>', "", cell))
            for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        ]
        for row in rows
    ]


def test_kinds_are_summed_and_the_longest_comes_first() -> None:
    found = cells(operators(Report(operators=FOUND)), "<h2")
    assert [row[:3] for row in found] == [
        ["convolutions", "0.800 ms", "0.200 ms"],
        ["everything else", "0.200 ms", "-"],
        ["rounding", "-", "50.0 us"],
        ["all", "1.00 ms", "0.250 ms"],
    ]


def test_layers_stand_in_their_order_and_what_is_in_none_last() -> None:
    found = cells(operators(Report(operators=FOUND)), "Each layer")
    assert [row[:3] for row in found] == [
        ["conv1", "0.300 ms", "0.200 ms"],
        ["conv2", "0.500 ms", "-"],
        ["everything else", "0.200 ms", "-"],
        ["rounding", "-", "50.0 us"],
    ]


def test_names_are_escaped_and_bars_are_on_one_scale() -> None:
    text = "\n".join(operators(Report(operators=FOUND)))
    assert "<a>" not in text
    assert "a &lt;profiler&gt;" in text
    widths = [float(w) for w in re.findall(r'width="([\d.]+)%" height="7"', text)]
    assert max(widths) == 100.0
    assert widths[:2] == [100.0, 25.0]  # 0.8 ms and 0.2 ms


def test_where_nothing_is_known_that_is_said() -> None:
    why = OperatorsReport(how="torch_export does not tell where its time goes")
    (_, note) = operators(Report(operators=why))
    assert "not known: torch_export does not tell where its time goes." in note
    (_, note) = operators(Report())
    assert "not known: the report was written without it." in note


def test_a_report_with_operators_is_read_back() -> None:
    made, mistakes = Report(operators=FOUND), Mistakes()
    assert from_plain(Report, to_plain(made), (), mistakes) == made
    assert not mistakes.found
