"""HTML tables of the report's page. Pure; what is handed in is HTML already."""

from __future__ import annotations

from collections.abc import Iterable


def table(heads: Iterable[str], rows: Iterable[str]) -> str:
    """A table that scrolls in itself where the screen is narrow."""
    names = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def row(name: str, *cells: str, css: str = "") -> str:
    """A row; ``name`` heads it."""
    rest = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{css}"><th scope="row">{name}</th>{rest}</tr>'
