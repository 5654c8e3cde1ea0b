"""HTML tables of the report page. All arguments are HTML, not plain text."""

from __future__ import annotations

from collections.abc import Iterable


def table(heads: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table that scrolls horizontally on a narrow screen."""
    names = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def row(name: str, *cells: str, css: str = "") -> str:
    """Return a row; ``name`` is its header cell."""
    rest = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{css}"><th scope="row">{name}</th>{rest}</tr>'
