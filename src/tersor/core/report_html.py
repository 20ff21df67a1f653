"""What every part of a report's page is made of: escaped texts in both languages, tables."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tersor.core.report_words import metric_word, say


def beside(name: str) -> str:
    """Read a file of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def both(en: str, zh: str) -> str:
    """Put a text into both languages; one of them is shown."""
    if en == zh:
        return escape(en)
    chinese = f'<span class="zh" lang="zh-CN">{escape(zh)}</span>'
    return f'<span class="en" lang="en">{escape(en)}</span>{chinese}'


def speak(key: str, **values: Any) -> str:
    """Write a phrase of the report, filled with `values`."""
    return both(say(key, "en", **values), say(key, "zh", **values))


def named(name: str) -> str:
    """Write the name of a metric, or of a kind of work."""
    return both(metric_word(name, "en"), metric_word(name, "zh"))


def heading(key: str) -> str:
    """Write the heading of a part; its key is its anchor."""
    return f'<h2 id="{key}">{speak(key)}</h2>'


def table(head: Sequence[str], rows: Sequence[str]) -> list[str]:
    """Set rows of HTML under the words that `head` names."""
    cells = "".join(f'<th scope="col">{speak(key) if key else ""}</th>' for key in head)
    return [
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>',
        *rows,
        "</tbody></table></div>",
    ]


def row(name: str, *figures: str, how: str) -> str:
    """Write a row of a table: a name, figures as HTML, and a remark as text."""
    cells = "".join(f'<td class="number">{figure}</td>' for figure in figures)
    return f'<tr><th scope="row">{name}</th>{cells}<td class="how">{escape(how)}</td></tr>'


def picture_page(
    title: str,
    note: str,
    drawn: str,
    style: str,
    rows: tuple[Sequence[str], Sequence[Sequence[str]]],
    *,
    words: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """Write a page around one picture that needs no network and no other file.

    Args:
        title: What is shown.
        note: On what, and how.
        drawn: The picture, as an `svg` element.
        style: What it needs beside the report's style sheet.
        rows: Head and rows of the table below it, as texts.
        words: Sentences between the two.
        warnings: What made the machine unfit for timing.

    Returns:
        HTML; every text is escaped, and the page's policy forbids loading anything.
    """
    head, cells = rows
    body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in cells]
    said = "".join(f"<li>{escape(text)}</li>" for text in words)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en" data-lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>tersor: {escape(title)}</title>",
            f"<style>{beside('report_page.css')}{style}</style></head>",
            '<body><header><div class="bar"><strong>tersor</strong></div></header><main>',
            f"<h1>{escape(title)}</h1>",
            f'<p class="note">{escape(note)}</p>',
            f"<figure>{drawn}</figure>",
            f'<ul class="warnings">{said}</ul>' if said else "",
            '<div class="scroll"><table><thead><tr>',
            "".join(f"<th>{escape(cell)}</th>" for cell in head),
            "</tr></thead><tbody>",
            *(f"<tr>{cells}</tr>" for cells in body),
            "</tbody></table></div>",
            *(f'<p class="note">{escape(warning)}</p>' for warning in warnings),
            "</main></body></html>\n",
        ]
    )
