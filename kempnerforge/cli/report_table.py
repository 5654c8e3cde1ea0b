"""HTML tables of the report page. All arguments are HTML, not plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table that scrolls horizontally on a narrow screen."""
    names = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def row(name: str, *cells: str, css: str = "", heads: Sequence[str] = ()) -> str:
    """Return a row; ``name`` is its header cell.

    With the ``heads`` of the columns, each cell knows its own, for screens on which the cells of a
    row are below each other.
    """
    labels = [f' data-head="{head}"' for head in heads] or [""] * (1 + len(cells))
    rest = "".join(f"<td{label}>{cell}</td>" for label, cell in zip(labels[1:], cells, strict=True))
    return f'<tr class="{css}"><th scope="row"{labels[0]}>{name}</th>{rest}</tr>'
