"""A search from the command line to its report, with packs that run in this process instead of on Ray."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pandas as pd
import pytest

from sweeps.core.cells import UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch import command
from sweeps.launch.cost import Budget
from sweeps.launch.pack_queue import Queue
from sweeps.launch.tune import Job, run_one
from sweeps.ledger.ledger import Ledger
from sweeps.tuning import tune
from tests.sweeps.search.bowl import SWEEP

Main = Callable[..., int]
MACHINE = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=2**33, hardware="test")
TPE = ("--search=tpe", "--set=x=lin:-3:3", "--set=n=int:2:12", "--objective=depth:min", "--trials=10")


class Killed(BaseException):
    """Ends a launch between two packs, as a signal would."""


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    left = [10**9]

    def run_packs(job: Job, queue: Queue, board: Any, heard: Callable[[dict[str, Any]], None]) -> dict[str, str]:
        while (pack := queue.next()) is not None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            run_one(job, pack, lambda state: heard(state["progress"]))
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "Tracker", MagicMock())  # MLflow is left out
    monkeypatch.setattr(command, "connect", lambda *address: MACHINE)
    monkeypatch.setattr(command, "run_packs", run_packs)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str, packs: int = 10**9) -> int:
        left[0] = packs
        return command.main(SWEEP, [*arguments, "--report-dir", "reports"])

    yield call
    signal.signal(signal.SIGTERM, before)


def record(preset: str = "one") -> dict[str, Any]:
    return json.loads(Path(f"reports/bowl/{preset}-search/search.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_killed_search_ends_with_the_same_report(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*TPE, "--storage=whole") == 0
    whole, trials = record(), pd.read_parquet("reports/bowl/one-search/trials.parquet")
    for packs in (4, 3, 2):
        with pytest.raises(Killed):
            main(*TPE, "--storage=killed", packs=packs)
    capsys.readouterr()
    assert main(*TPE, "--storage=killed") == 0
    shown = capsys.readouterr().out
    assert record() == whole
    pd.testing.assert_frame_equal(pd.read_parquet("reports/bowl/one-search/trials.parquet"), trials)
    best = whole["studies"][0]["best"]
    assert f"x={best['setting']['x']:.6g} n={best['setting']['n']}: depth={best['values']['depth']:.6g}" in shown
    assert trials.loc[trials["depth"].idxmin(), "trial"] == best["trial"]
    text = Path("reports/bowl/one-search/report.md").read_text(encoding="utf-8")
    assert "## Best setting" in text and "progress.png" in text  # noqa: PT018
    assert main(*TPE, "--storage=killed", "--report") == 0


def test_a_killed_search_with_halving_ends_with_the_same_report(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    halving = (*TPE, "--stop=halving", "--confirm=2")
    assert main(*halving, "--storage=s", "--plan") == 0
    # two brackets of 9 at 3, 9 and 27 steps: 9/9 + 3·6/27 + 18/27 whole trainings each, and two fresh ones
    assert "20 trials to come, stopped early: 6.7 whole ones, at most 0.80 machine hours" in capsys.readouterr().out
    assert main(*halving, "--storage=whole") == 0
    shown = capsys.readouterr().out
    whole, trials = record(), pd.read_parquet("reports/bowl/one-search/trials.parquet")
    for packs in (4, 7, 8):
        with pytest.raises(Killed):
            main(*halving, "--storage=killed", packs=packs)
    assert len(list(Path("killed/bowl/1/_work").iterdir())) > 1
    assert main(*halving, "--storage=killed") == 0
    assert record() == whole
    pd.testing.assert_frame_equal(pd.read_parquet("reports/bowl/one-search/trials.parquet"), trials)
    for storage in ("killed", "whole"):
        assert not list(Path(storage).rglob("_work/*"))
    assert trials["state"].value_counts().to_dict() == {"stopped": 16, "done": 2}
    assert trials.loc[trials["state"] == "done", "measured_at"].tolist() == [27, 27]
    assert whole["studies"][0]["stopped"] == 16
    assert whole["studies"][0]["best"]["trial"] == trials["depth"].where(trials["state"] == "done").idxmin()
    assert "optimism" in shown
    text = Path("reports/bowl/one-search/report.md").read_text(encoding="utf-8")
    assert "stopped early by halving: each batch is measured at steps=3, 9, 27 in turn, and the best 1/3" in text
    assert "stopped, value at steps=9" in text


def test_failed_trials_are_closed_and_exit_with_1(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("--search=grid", "--set=n=choice:8,17", "--objective=depth:min", "--storage=s")
    assert main(*grid) == 1
    assert "1 of 2 trials failed; first: cell" in capsys.readouterr().out
    assert record()["studies"][0]["failed"] == 1
    assert main(*grid, "--retry-failed") == 1


def test_the_report_says_how_optimistic_the_chosen_value_is(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--search=grid", "--set=n=choice:8,9", "--objective=depth:min", "--storage=s") == 0
    # depth 1 of seed 0; seeds 1 to 5 add 0.01 each: mean 1.03, sd 0.0158, t(4) 2.776
    assert "depth=1.03, 95% interval 1.01037 to 1.04963, optimism 0.03" in capsys.readouterr().out
    assert main("--search=grid", "--set=n=choice:8,9", "--objective=depth:min", "--storage=s", "--confirm=0") == 0
    assert "depth=– (--confirm 0)" in capsys.readouterr().out


def test_the_plan_says_what_the_search_costs_at_most(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*TPE, "--storage=s", "--plan", "--set=price_per_hour=2") == 0
    # ten trials and five fresh trainings, all as long as the one of n=12: 36 s times 12
    assert "15 trials to come, at most 1.80 machine hours = 3.60" in capsys.readouterr().out
    assert not Path("s").exists()
    assert main(*TPE, "--storage=s", "--report") == 2
    assert "this search has no trials yet" in capsys.readouterr().err


def test_a_search_from_python_returns_what_it_found(main: Main) -> None:
    found = tune(
        SWEEP,
        "depth:min",
        search="qmc",
        preset="two",
        trials=4,
        options=["--each", "arms", "--report-dir", "reports", "--storage", "s", "--confirm", "0"],
        x="lin:-3:3",
        seeds=[0, 1],
    )
    assert found.code == 0
    assert found.best.keys() == {"left", "right"}
    assert len(found.trials) == 8
    for group, own in found.trials.groupby("group"):
        assert found.best[group]["x"] == own.loc[own["depth"].idxmin(), "x"]
    with pytest.raises(UserError, match="the line above says why"):
        tune(SWEEP, "depth:min", x="lin:3:-3")


def test_a_budget_ends_the_search_between_two_batches(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "work", lambda ledger, keys: [(key, 1800.0, 1.0, "cpu") for key in keys])
    spend = ("--search=random", "--set=x=lin:-3:3", "--objective=depth:min", "--storage=s", "--set=price_per_hour=2")
    assert main(*spend, "--spend=5usd", "--confirm=0") == 0  # a trial costs 1, so the second batch exceeds it
    assert record()["studies"][0]["trials"] == 8
    assert main(*spend, "--spend=5usd", "--confirm=0") == 0
    assert record()["studies"][0]["trials"] == 8
    assert main(*spend, "--spend=6machine-hours", "--confirm=0") == 0
    assert record()["studies"][0]["trials"] == 12


@pytest.mark.parametrize(
    ("spend", "message"),
    [
        ("usd", "--spend 'usd' is no budget"),
        ("0usd", "is no budget"),
        ("3sun-hours", "counts no known hours"),
        ("20usd", "is money without a price; add --set price_per_hour=PRICE"),
    ],
)
def test_a_bad_budget_is_one_line(spend: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Budget.read(spend, MACHINE, RunSettings())


def test_core_hours_are_shared_by_the_cores() -> None:
    budget = Budget.read("6core-hours", MACHINE, RunSettings())  # two cores: three hours
    assert budget.left([("a", 3 * 3600 - 1, 1.0, "cpu")])
    assert not budget.left([("a", 3 * 3600, 1.0, "cpu")])
