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
