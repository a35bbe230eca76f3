"""Finished settings of a calibration, kept so that a run that was stopped continues.

One line per setting in a file named by the code that measured it: all of `analysis` and the simulations. When one of
these files changes, everything is measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from benchmarks._calibration import Setting, Statement, Tally, spelled


def code_digest(root: Path, libraries: Iterable[str] = ("numpy", "scipy", "pandas", "scikit-learn")) -> str:
    """16 hex digits of what decides a result: source files by path and content, libraries by version."""
    found = hashlib.sha256()
    for file in sorted([*(root / "analysis").rglob("*.py"), *(root / "benchmarks").glob("_calibration*.py")]):
        found.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for name in libraries:
        found.update(f"{name} {version(name)}\n".encode())
    return found.hexdigest()[:16]


class Kept:
    """Results by statement, setting and number of trials; a line that was cut short by a kill does not count."""

    def __init__(self, folder: Path, code: str) -> None:
        self._file = folder / f"{code}.jsonl"
        self._known: dict[str, tuple[Tally, float]] = {}
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._known[entry["setting"]] = (Tally(**entry["tally"]), entry["seconds"])

    def get(self, study: str, statement: Statement, setting: Setting, trials: int) -> tuple[Tally, float] | None:
        """(tally, CPU-seconds) of a setting that was measured before."""
        return self._known.get(_name(study, statement, setting, trials))

    def put(self, study: str, statement: Statement, setting: Setting, trials: int, found: tuple[Tally, float]) -> None:
        """Keep what was measured; one process writes."""
        tally, seconds = found
        entry = {
            "setting": _name(study, statement, setting, trials),
            "tally": {"hits": tally.hits, "trials": tally.trials, "width": tally.width},
            "seconds": seconds,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(entry)}")  # a line of its own even after one that was cut short


def _name(study: str, statement: Statement, setting: Setting, trials: int) -> str:
    return f"{study}: {statement.name}: {spelled(setting)}: {trials}"
