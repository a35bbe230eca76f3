"""Ranks of audited SAEs by each proxy, and sentences where R² misleads."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.sae.cells import prepare_cells
from analysis.sae.columns import INFORMATION_COLUMNS
from analysis.sae.released import agreement, flags, glance, ranks, write_audit


def cells(r2: list[float], ce_rec: list[float], **more: list[float]) -> pd.DataFrame:
    names = [f"sae{i}" for i in range(len(r2))]
    return pd.DataFrame({"sae": names, "sae_class": "topk", "r2": r2, "ce_rec": ce_rec, **more})


def test_ranks_follow_the_direction_of_each_proxy_and_share_ties() -> None:
    """KL and NMSE are better when they are small; a proxy that is missing for one SAE is left out."""
    found = ranks(
        cells(
            [0.9, 0.8, 0.8], [0.1, 0.5, 0.9], kl=[3.0, 2.0, 1.0], nmse=[0.1, 0.2, 0.3], fisher=[1.0, 2.0, float("nan")]
        )
    )
    assert found["r2"].tolist() == [1, 2, 2]
    assert found["ce_rec"].tolist() == [3, 2, 1]
    assert found["kl"].tolist() == [3, 2, 1]
    assert found["inv_nmse"].tolist() == [1, 2, 3]
    assert "fisher" not in found
    table = agreement(cells([0.9, 0.8, 0.7], [0.1, 0.5, 0.9], kl=[3.0, 2.0, 1.0]))
    assert table.iloc[0]["proxy"].startswith("−KL")
    assert table["Spearman with CE_rec"].tolist() == [1.0, -1.0]
    assert table.iloc[1]["largest difference of ranks"] == 2


def test_r2_misleads_where_ranks_are_a_quarter_of_the_saes_apart() -> None:
    ce_rec = [1 - i / 12 for i in range(12)]
    r2 = list(ce_rec)
    r2[2], r2[9] = r2[9], r2[2]
    found = flags(cells(r2, ce_rec))
    assert found == [
        "R² hides sae2: rank 10 of 12 by R², 3 by CE_rec.",
        "R² flatters sae9: rank 3 of 12 by R², 10 by CE_rec.",
    ]
    assert not flags(cells([0.9, 0.8, 0.7], [0.8, 0.9, 0.7]))
    lines = glance(cells(r2, ce_rec))
    assert lines[-2:] == found
    assert "R² +0.6" in lines[1]
    assert "from three SAEs on" in glance(cells([0.9, 0.8], [0.1, 0.2]))[1]


def test_the_layers_information_is_shown_where_it_was_measured(make_grid, tmp_path: Path) -> None:
    grid = make_grid(models=("pythia-70m",), depths=("mid",), ks=(8, 32))
    audited = prepare_cells(grid.cells).assign(sae=lambda t: "sae" + t["k"].astype(str), sae_class="topk")
    sequences = pd.concat([t.assign(cell_key=key) for key, t in grid.sequences.items()])
    layer = {
        "model": "pythia-70m",
        "layer": int(audited["layer"][0]),
        "pr": 4.0,
        "pr_deflated": 9.0,
        "pr_no_sinks": 8.0,
    }
    measured = dict(zip(INFORMATION_COLUMNS, (6.0, 5.0, 8.0, 5.5, 1.5, 4.85), strict=True))
    for geometry, shown in (([layer | measured], True), ([layer], False)):
        report = write_audit(audited, sequences, tmp_path, facts={"SAEs": "2"}, geometry=pd.DataFrame(geometry))
        text = report.read_text(encoding="utf-8")
        assert ("## Task-relevant dimension by mutual information" in text) == shown
        assert ("6 [5, 8]" in text) == shown
