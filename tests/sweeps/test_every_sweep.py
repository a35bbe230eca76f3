"""Each of the four sweeps from its command line to its report, on Ray and with MLflow, at tiny size."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "faults"), str(Path(__file__).parents[1] / "faults" / "site")]

from fault_sweeps import SWEEPS, assert_tidy, assert_tracked, results  # noqa: E402

EACH = ["proxy_gap", "odor_topology", "codec_lm", "memory_cache"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.parametrize("name", EACH)
def test_from_the_command_line_to_the_report(
    launch: Callable[..., Any], sources: Path, tmp_path: Path, name: str
) -> None:
    tiny = SWEEPS[name](sources)
    sweep = importlib.import_module(tiny.home).SWEEP
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ran = launch(sweep, *tiny.arguments, "--tracking-uri", uri)
    assert ran.code == 0, ran.err
    ledger = tiny.ledger(str(tmp_path / "runs" / "ledger"))
    found = results(ledger)
    assert f"{len(found)}/{len(found)} published" in ran.out
    for files in found.values():
        assert pd.to_numeric(files["rows.parquet"]["value"]).notna().any()
    assert_tidy(ledger)
    assert_tracked(tiny, uri, ledger.store.uri, found, 1)
    (report,) = (tmp_path / "runs" / "reports" / name).glob("*/report.md")
    text = report.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "planned cells** are published" not in text
    again = launch(sweep, "--report", *tiny.arguments)
    assert again.code == 0, again.err
    assert "\nIn MLflow: " in text
    assert report.read_text(encoding="utf-8") == text
