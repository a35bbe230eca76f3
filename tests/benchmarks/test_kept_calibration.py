"""A calibration that was stopped continues, and one of other code begins anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks._calibration import Statement, Tally
from benchmarks._kept import Kept
from sweeps.launch.same_code import code_digest

SETTING = {"seeds": 3}
STATEMENT = Statement("an interval", "nowhere", "coverage", lambda *_: Tally(1, 1), [SETTING], [SETTING])


def test_a_setting_is_kept_by_statement_setting_trials_and_code(tmp_path: Path) -> None:
    found = Tally(8, 9, 1.5, before=(1, 2))
    Kept(tmp_path, "a").put("study", STATEMENT, SETTING, 9, (found, 0.25))
    again = Kept(tmp_path, "a")
    assert again.get("study", STATEMENT, SETTING, 9) == (found, 0.25)
    assert again.get("study", STATEMENT, SETTING, 10) is None
    assert again.get("study", STATEMENT, {"seeds": 4}, 9) is None
    assert again.get("another", STATEMENT, SETTING, 9) is None
    assert Kept(tmp_path, "b").get("study", STATEMENT, SETTING, 9) is None


def test_counts_of_numpy_are_kept_as_others(tmp_path: Path) -> None:
    counted = Tally(np.int64(8), np.int64(9), np.float32(1.5))  # type: ignore[arg-type]
    Kept(tmp_path, "a").put("study", STATEMENT, SETTING, 9, (counted, 0.25))
    assert Kept(tmp_path, "a").get("study", STATEMENT, SETTING, 9) == (Tally(8, 9, 1.5), 0.25)


def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "a")
    for trials in (1, 2):
        kept.put("study", STATEMENT, SETTING, trials, (Tally(1, trials), 0.5))
    file = tmp_path / "a.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    again = Kept(tmp_path, "a")
    assert again.get("study", STATEMENT, SETTING, 1) is not None
    assert again.get("study", STATEMENT, SETTING, 2) is None
    again.put("study", STATEMENT, SETTING, 2, (Tally(2, 2), 0.5))
    found = Kept(tmp_path, "a").get("study", STATEMENT, SETTING, 2)
    assert found is not None
    assert found[0].hits == 2


def test_the_code_that_decides_is_read_by_content(tmp_path: Path) -> None:
    folders = [tmp_path / "analysis", tmp_path / "benchmarks"]
    for folder in folders:
        folder.mkdir()
    file = tmp_path / "analysis" / "crossed.py"
    file.write_text("a = 1\n", encoding="utf-8")
    before = code_digest(folders)
    assert code_digest(folders) == before
    file.write_text("a = 2\n", encoding="utf-8")
    assert code_digest(folders) != before
