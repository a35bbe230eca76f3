"""Searches from Python: the command line's search, and what it found as values.

from sweeps.tuning import tune
from sweeps.sae.sweep import SWEEP

found = tune(SWEEP, "ce_rec:max", trials=24, lr="log:1e-4:1e-2", k=8)
found.best       # {"lr": 0.00123}
found.trials     # a row per trial, as pandas' DataFrame
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sweeps.core.cells import CellT, UserError
from sweeps.launch.command import main
from sweeps.launch.sweep import PresetT, Sweep


@dataclass(frozen=True)
class Found:
    """What a search found. record: `search.json`. trials: a row per trial; `group` is the value of `each`.

    code: the exit code of the command, 1 where trials failed.
    """

    record: Mapping[str, Any]
    trials: pd.DataFrame
    report: Path
    code: int

    @property
    def best(self) -> Any:
        """{field: value} of the best trial, None without one; with `each` {group: the same}."""
        found = {s["group"]: s["best"] and s["best"]["setting"] for s in self.record["studies"]}
        return found[""] if list(found) == [""] else found


def tune(
    sweep: Sweep[CellT, PresetT],
    objective: str,
    *,
    search: str = "tpe",
    preset: str = "",
    trials: int = 20,
    options: Sequence[str] = (),
    **fields: Any,
) -> Found:
    """Run a search, or continue it, and return what it found.

    Args:
        objective: COLUMN:min or COLUMN:max, several with commas.
        options: further words of the command line, such as ["--each", "architectures", "--storage", "s3://bucket"].
        fields: of the preset or of the run: a range as text ("log:1e-4:1e-2"), a value, or a list of values.
    Raises:
        UserError: the command refused its arguments; the line on the screen says why.
    """
    chosen = preset or sweep.default_preset
    words = ["--search", search, "--objective", objective, "--trials", str(trials), "--preset", chosen]
    words += [part for name, value in fields.items() for part in ("--set", f"{name}={_spelled(value)}")]
    folder = next((options[i + 1] for i, o in enumerate(options[:-1]) if o == "--report-dir"), "runs/reports")
    code = main(sweep, [*words, *options])
    if code == 2:
        raise UserError("the search was refused; the line above says why")
    place = Path(folder).expanduser() / sweep.name / f"{chosen}-search"
    record = json.loads((place / "search.json").read_text(encoding="utf-8"))
    return Found(record, pd.read_parquet(place / "trials.parquet"), place / "report.md", code)


def _spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
