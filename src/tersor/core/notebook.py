"""How results show themselves in a notebook: a title, a table, notes; all texts escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def shown(
    title: str, head: Sequence[str], rows: Iterable[Sequence[Any]], notes: Iterable[str] = ()
) -> str:
    """Write a small table as HTML that a notebook styles as its own.

    Args:
        title: What it is; empty for none.
        head: A word a column.
        rows: Cells; each becomes text.
        notes: Sentences below.
    """
    cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    heads = "".join(f'<th scope="col">{escape(word)}</th>' for word in head)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return "".join(
        [
            "<div>",
            f"<p><strong>{escape(title)}</strong></p>" if title else "",
            f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>" if cells else "",
            *(f"<p>{escape(note)}</p>" for note in notes if note),
            "</div>",
        ]
    )
