"""A published cell's rows as numbers of the whole cell and as tables by parameters."""

from __future__ import annotations

import pandas as pd

from sweeps.core.cells import PublishedCell

ROWS = pd.DataFrame(
    {
        "metric": ["r2", "alive", "pr", "sink", "pr", "loss"],
        "value": [0.5, 3.0, 10.0, float("nan"), 20.0, 0.25],
        "unit": [""] * 6,
        "layer": [None, None, 0, 0, 1, None],
        "step": [None, None, None, None, None, 8],
    }
)


def cell(rows: pd.DataFrame) -> PublishedCell:
    return PublishedCell("key", {}, rows, (), "uri", {})


def test_numbers_are_those_of_the_whole_cell() -> None:
    assert cell(ROWS).numbers() == {"r2": 0.5, "alive": 3.0}
    assert cell(ROWS[["metric", "value", "unit"]].head(2)).numbers() == {"r2": 0.5, "alive": 3.0}


def test_a_table_has_a_row_per_value_of_its_parameters_and_keeps_metrics_without_a_number() -> None:
    table = cell(ROWS).table("layer")
    assert table.index.tolist() == [0, 1]
    assert table["pr"].tolist() == [10.0, 20.0]
    assert table["sink"].isna().all()
    assert cell(ROWS).table("step")["loss"].tolist() == [0.25]
    assert cell(ROWS).table("layer", "step").empty
    assert cell(ROWS).table("target").empty
