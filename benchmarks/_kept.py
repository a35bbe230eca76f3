"""Finished settings of a calibration, kept so that a run that was stopped continues.

One line per setting in a file named by the code that measured it. When a file of the product or of the benchmarks
changes, everything is measured again.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from benchmarks._calibration import Setting, Statement, Tally, spelled
from sweeps.core.cells import digest
from sweeps.launch.same_code import code_digest, own_code


def measuring_code() -> str:
    """16 hex digits of what decides a result: the checkout's code, and these libraries by version."""
    libraries = [f"{name} {version(name)}" for name in ("numpy", "scipy", "pandas", "scikit-learn")]
    return digest([own_code(), code_digest([Path(__file__).parent]), *libraries])[:16]


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
            before = entry["tally"].pop("before")
            tally = Tally(**entry["tally"], before=before and tuple(before))
            self._known[entry["setting"]] = (tally, entry["seconds"])

    def get(self, study: str, statement: Statement, setting: Setting, trials: int) -> tuple[Tally, float] | None:
        """(tally, CPU-seconds) of a setting that was measured before."""
        return self._known.get(_name(study, statement, setting, trials))

    def put(self, study: str, statement: Statement, setting: Setting, trials: int, found: tuple[Tally, float]) -> None:
        """Keep what was measured; one process writes."""
        tally, seconds = found
        entry = {
            "setting": _name(study, statement, setting, trials),
            # some count with NumPy's integers
            "tally": {
                "hits": int(tally.hits),
                "trials": int(tally.trials),
                "width": float(tally.width),
                "before": tally.before and [int(count) for count in tally.before],
            },
            "seconds": seconds,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(entry)}")  # a line of its own even after one that was cut short


def _name(study: str, statement: Statement, setting: Setting, trials: int) -> str:
    return f"{study}: {statement.name}: {spelled(setting)}: {trials}"
