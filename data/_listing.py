"""Which names of a listing are data: those without a part that begins with `.` or `_`.

Such names belong to programs that left them among the data: `.ipynb_checkpoints/x.parquet` (a copy made by an
editor), `._x.parquet` and `__MACOSX/` (macOS), `_SUCCESS` and `_temporary/` (Spark), `.x.tmp` (an unfinished copy).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHOWN = 3  # names in the line, which stays readable


def is_hidden(name: str) -> bool:
    """Whether any part of a path relative to the listed folder (forward slashes) begins with `.` or `_`."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


def visible(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(names that are data, names that `is_hidden`), each in the order given."""
    kept: list[str] = []
    hidden: list[str] = []
    for name in names:
        (hidden if is_hidden(name) else kept).append(name)
    return kept, hidden


def skipped_line(hidden: Sequence[str], what: str = "file") -> str:
    """One line that counts what was skipped and shows the first names; empty when nothing was."""
    if not hidden:
        return ""
    shown = ", ".join(hidden[:_SHOWN]) + (", …" if len(hidden) > _SHOWN else "")
    plural = "s" if len(hidden) > 1 else ""
    return f"skipped {len(hidden)} {what}{plural} whose path has a part that begins with . or _: {shown}"
