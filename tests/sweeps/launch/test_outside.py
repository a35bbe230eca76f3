"""A new sweep is one file, which may lie outside the checkout: its workers run it from there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.core.cells import Cell
from sweeps.core.machine import ROOT
from sweeps.launch import command
from sweeps.launch.sweep import Sweep
from sweeps.ledger.ledger import Ledger

COINS = Path(__file__).parents[1] / "outside" / "coins.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Path(shutil.copy(COINS, tmp_path / "my_coins.py"))


def test_a_script_outside_plans_and_refuses(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("my_coins", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_coins"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        assert command.main(module.SWEEP, ["--plan", "--set", "bias=0.5"]) == 0
        assert "2 planned, 0 done, 2 to do" in capsys.readouterr().out
        assert command.main(module.SWEEP, ["--plan", "--set", "bias=1.5"]) == 2
        assert "bias=1.5 is no probability; choose 0 <= bias <= 1" in capsys.readouterr().err
    finally:
        del sys.modules["my_coins"]


@pytest.mark.slow
def test_a_script_outside_runs_on_ray(script: Path) -> None:
    """Its classes are of `__main__`, which no worker could import."""
    arguments = ["--set", "bias=0,1", "--set", "seeds=0"]
    run = subprocess.run(
        [sys.executable, script.name, *arguments],
        cwd=script.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    ledger = Ledger(str(script.parent / "runs/ledger"), "coins", "1")
    found = {c.identity["bias"]: c.rows.value[0] for c in ledger.read_many(ledger.done())}
    assert found == {0.0: 0.0, 1.0: 1.0}
    assert "| 1.0 | 0 | 1.000 |" in (script.parent / "runs/reports/coins/few/report.md").read_text(encoding="utf-8")


def test_what_a_sweep_leaves_out_has_a_default_or_is_refused() -> None:
    assert (Sweep.headline, tuple(Sweep.named), tuple(Sweep.tracked)) == ("value", (), ())

    class Unfinished(Sweep[Cell, object]):
        name = "unfinished"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # type: ignore[abstract]
