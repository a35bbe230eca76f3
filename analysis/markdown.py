"""Markdown of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool] = ()) -> str:
    """A pipe table whose texts may hold `|`; `right` marks the columns that are set to the right."""
    aligned = [*right, *[False] * (len(head) - len(right))]
    rule = "|" + "|".join("---:" if numbers else "---" for numbers in aligned) + "|"
    return "\n".join([_row(head), rule, *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
