"""A report's folder: it holds what one launch wrote and nothing of another, and appears whole.

Launches of one preset with other settings write to the same place; a figure that the last one did not draw must not
stay there as if it had.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LIST = ".report.json"  # {"files": names that a report wrote}
_IN_MLFLOW = "\n\nIn MLflow: "  # the last line of a report
_TRIES = 5  # against launches that write the same report at the same moment


def say_settings(report: Path, arguments: str) -> None:
    """Say at the end of a Markdown report which arguments of the command line it is of."""
    text = report.read_text(encoding="utf-8").rstrip("\n")
    report.write_text(f"{text}\n\nSettings of this launch: `{arguments}`.\n", encoding="utf-8")


def say_runs(report: Path, address: str) -> None:
    """Say at the end of a Markdown report where MLflow compares the runs of its cells."""
    text = report.read_text(encoding="utf-8").partition(_IN_MLFLOW)[0].rstrip("\n")
    report.write_text(f"{text}{_IN_MLFLOW}[these cells compared]({address}).\n", encoding="utf-8")


def keep_runs(report: Path, before: Path) -> None:
    """Keep what the report `before`, where there is one, says about MLflow, if it is otherwise the same report."""
    try:
        old, mark, runs = before.read_text(encoding="utf-8").partition(_IN_MLFLOW)
    except (OSError, ValueError):
        return
    text = report.read_text(encoding="utf-8").rstrip("\n")
    if mark and old == text:
        report.write_text(f"{text}{mark}{runs}", encoding="utf-8")


def say_partial(report: Path, cells: int, planned: int) -> None:
    """Say below the heading of a Markdown report (at the head of one without) that it is of a part of the plan."""
    heading, rest = "", report.read_text(encoding="utf-8")
    if rest.startswith("# "):
        heading, _, rest = rest.partition("\n")
        heading += "\n\n"
    note = f"**{cells} of {planned} planned cells** are published; this report is of those alone."
    report.write_text(f"{heading}{note}\n\n{rest.lstrip()}", encoding="utf-8")


def put_in_place(made: Path, place: Path) -> list[Path]:
    """Copy a finished report to `place`, instead of the report there; returns its files in `made`, sorted.

    What other people put into the folder stays there. A folder of an older program, which kept no list of what it
    wrote, is moved aside as `NAME.before`. Raises OSError.
    """
    files = sorted(p for p in made.iterdir() if p.is_file())
    place.parent.mkdir(parents=True, exist_ok=True)
    for again in reversed(range(_TRIES)):
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as aside:
            new, old = Path(aside, "new"), Path(aside, "old")
            shutil.copytree(made, new)
            (new / _LIST).write_text(json.dumps({"files": sorted(p.name for p in made.iterdir())}), encoding="utf-8")
            try:
                if place.exists():
                    os.rename(place, old)
                os.rename(new, place)
            except OSError:  # another launch was faster
                if not again:
                    raise
                continue
            if old.is_dir():
                _keep_foreign(old, place)
            return files
    raise AssertionError("unreachable")


def _keep_foreign(old: Path, place: Path) -> None:
    """Give back what no report wrote of the folder that a report was moved in place of."""
    listed = _listed(old)
    if listed is None:
        before = place.with_name(f"{place.name}.before")
        if any(old.iterdir()) and not before.exists():
            os.rename(old, before)
        return
    for entry in old.iterdir():
        if entry.name not in listed and not (place / entry.name).exists():
            os.rename(entry, place / entry.name)


def _listed(folder: Path) -> Sequence[str] | None:
    """Names that the report in a folder consists of; None where nobody noted them."""
    try:
        return [*json.loads((folder / _LIST).read_text(encoding="utf-8"))["files"], _LIST]
    except (OSError, ValueError, KeyError, TypeError):
        return None
