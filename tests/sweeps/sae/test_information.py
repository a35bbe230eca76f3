"""The task-relevant dimension in the grid: measured once per pack and layer, published with its cells, reported."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from models.information.estimate import Information, measure
from models.information.settings import CriticSettings
from sweeps.core.cells import UserError
from sweeps.sae import information as module
from sweeps.sae.packs import shared_passes
from sweeps.sae.report import tables, write
from tests.sweeps.sae.test_sae_grid import GRID, fresh, lm, plan, toy_sources, train

__all__ = ["lm", "toy_sources"]  # fixtures
QUICK = CriticSettings(dimensions=(1, 2), hidden=16, joint=16, folds=2, starts=1, steps=30, every=5, test_batches=1)
ON = replace(GRID, tokens=(320,), eval_sequences=40, rungs="free", information="on")


def test_it_is_measured_once_per_layer_and_published_with_every_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[Information] = []

    def counted(*arguments: object, **named: object) -> Information:
        measured.append(measure(*arguments, **named))  # type: ignore[arg-type]
        return measured[-1]

    monkeypatch.setattr(module, "SETTINGS", QUICK)
    monkeypatch.setattr(module, "measure", counted)
    cells, ledger = plan(ON), fresh()
    train(cells, ledger)
    layers = sorted({c.layer for c in cells})
    assert len(measured) == len(layers) == 2
    published = [ledger.read(cell.key) for cell in cells]
    for cell in published:
        assert cell.table("geometry_layer").loc[layers, "mi_nats_of_layer"].notna().all()
        kept = pd.read_parquet(io.BytesIO(ledger.file(cell.key, module.FILE)))
        assert kept["nats"].tolist() == [x for of in measured for fold in of.estimate_FK for x in fold]
    _, _, geometry = tables(published)
    known = geometry.set_index("layer")["mi_nats"].dropna()
    assert known.index.tolist() == layers
    write(published, "local", ON, GRID, tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    section = report.split("## Task-relevant dimension by mutual information")[1].split("\n## ")[0]
    assert section.count("| standin-small |") == 2
    assert "Not in this grid" not in section


def test_cells_without_it_keep_their_keys_and_training_is_shared() -> None:
    off, on = plan(replace(ON, information="off"))[0], plan(ON)[0]
    assert "information" not in off.identity()
    assert on.key != off.key
    assert on.trajectory() == off.trajectory()
    assert len(shared_passes([off, on])) == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"information": "yes"}, "information='yes' is not known; choose off or on"),
        (
            {"eval_sequences": 3},
            "eval_sequences=3: sequences=3 cannot be split into 4 parts by sequence; give 4",
        ),
        (
            {"eval_sequences": 10},
            "10 sequences of 16 tokens leave 32 to a part, fewer than batch=128; give 32",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_the_plan(changes: dict[str, object], error: str) -> None:
    with pytest.raises(UserError, match=error):
        plan(replace(ON, **changes))  # type: ignore[arg-type]
