"""From diagrams and null draws to the long table: the published ratio by hand, Holm, rules, partial data."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest

from analysis.topology import report
from analysis.topology.stability import match
from analysis.topology.tables import COLUMNS, UNIVERSAL_COLUMNS, audit
from analysis.topology.unit import FULL_TABLE, Unit


def diagram(top: float, rng: np.random.Generator, birth: float = 0.3, loops: int = 12) -> np.ndarray:
    births = rng.uniform(0.1, 0.2, loops)
    pairs = np.stack([births, births * (1 + rng.uniform(0.01, 0.05, loops))], 1)
    return np.vstack([[birth, birth + top], pairs]).astype(np.float32)


def unit(name: str, top: float, *, draws: int, null_top: float = 0.1, runs: int = 4, seed: int = 0) -> Unit:
    rng = np.random.default_rng(seed)
    made = Unit(("t", name, "euclidean", "direct"))
    made.observed[FULL_TABLE] = diagram(top, rng)
    for run in range(runs):
        made.observed[run] = diagram(top + 0.001 * run, rng)
    for null in ("permute_columns", "gaussian"):
        values = rng.uniform(0.5 * null_top, null_top, draws)
        made.nulls[null] = {0: values.tolist()}
        made.null_diagrams[null] = {0: [diagram(v, rng) for v in values]}
    return made


def joint_unit(name: str, top: float, *, draws: int, seed: int = 0) -> Unit:
    """Draws of the whole table in every run, and of the full table itself."""
    made = unit(name, top, draws=draws, seed=seed)
    made.joint = True
    for null, by_run in made.nulls.items():
        for run in (FULL_TABLE, *made.runs):
            by_run[run] = [value + 1e-5 * run for value in by_run[0]]
            made.null_diagrams[null][run] = made.null_diagrams[null][0]
    return made


def value(result: object, name: str, statistic: str, column: str = "value") -> float:
    cells = result.cells  # type: ignore[attr-defined]
    row = cells[(cells["representation"] == name) & (cells["statistic"] == statistic)]
    return float(row.iloc[0][column])


def test_ratio_is_the_published_formula() -> None:
    made = unit("x", 0.4, draws=60)
    result = audit([made])
    top = [float(np.float64(d[0, 1]) - d[0, 0]) for run, d in made.observed.items() if run != FULL_TABLE]
    threshold = max(np.quantile(by_run[0], 0.95) for by_run in made.nulls.values())
    assert value(result, "x", "top1_ratio") == pytest.approx(np.mean(top) / threshold)
    assert value(result, "x", "observed_top1_mean") == pytest.approx(np.mean(top))
    assert list(result.cells.columns) == list(COLUMNS)


def test_p_is_the_largest_over_nulls_and_holm_counts_the_tests_of_the_table() -> None:
    clear, weak = unit("clear", 0.4, draws=199), unit("weak", 0.4, draws=199, null_top=0.42, seed=1)
    result = audit([clear, weak])
    assert value(result, "clear", "p_max_over_nulls") == pytest.approx(1 / 200)
    assert value(result, "clear", "p_holm") == pytest.approx(2 / 200)
    per_null = result.cells[(result.cells["representation"] == "weak") & (result.cells["statistic"] == "p_null")]
    assert value(result, "weak", "p_max_over_nulls") == per_null["value"].max()
    assert not result.few_draws


def test_the_full_table_is_tested_itself_and_its_verdict_rests_on_that() -> None:
    """Every subsample beats its nulls; the whole table does not."""
    made, other = joint_unit("physchem", 0.4, draws=199), joint_unit("clear", 0.4, draws=199, seed=1)
    for by_run in made.nulls.values():
        by_run[FULL_TABLE] = [value + (0.4 if draw % 2 else 0.0) for draw, value in enumerate(by_run[FULL_TABLE])]
    result = audit([made, other])
    assert value(result, "physchem", "p_subsamples") == pytest.approx(1 / 200)
    assert value(result, "physchem", "p_full_table") == value(result, "physchem", "p_max_over_nulls") > 0.4
    assert result.verdicts["t", "physchem"].label == "not distinguishable"
    assert result.verdicts["t", "clear"].label.startswith("real")
    assert value(result, "clear", "top1_ratio_full", "lo") > 1


def test_a_ratio_has_an_interval_only_where_runs_and_draws_give_one() -> None:
    every = value(audit([joint_unit("x", 0.4, draws=199)]), "x", "top1_ratio", "lo")
    assert every > 1
    for made, needs in (
        (unit("x", 0.4, draws=199), "needs null draws of every run"),
        (unit("x", 0.4, draws=199, runs=1), "needs ≥ 2 runs"),
        (joint_unit("x", 0.4, draws=8), "lower limit needs ≥ 72 independent null draws, 32 are worth"),
    ):
        cells = audit([made]).cells
        row = cells[cells["statistic"] == "top1_ratio"].iloc[0]
        assert np.isnan(row["lo"])
        assert needs in row["needs"]


def test_verdicts_follow_the_rule() -> None:
    result = audit([unit("mine", 0.4, draws=199), unit("physchem", 0.05, draws=199, seed=2)])
    assert result.verdicts["t", "mine"].label == "real, not found in baselines"
    assert result.verdicts["t", "physchem"].label == "not distinguishable"
    both = audit([unit("mine", 0.4, draws=199), unit("physchem", 0.5, draws=199, seed=2)])
    assert both.verdicts["t", "mine"].label == "real but not unique"


def test_a_subsample_without_a_loop_is_not_stable() -> None:
    made = unit("mine", 0.4, draws=199, runs=5)
    made.observed[4] = np.empty((0, 2), np.float32)
    result = audit([made])
    assert value(result, "mine", "death_spread") == np.inf
    assert 0 < value(result, "mine", "bottleneck_relative") < np.inf
    assert result.verdicts["t", "mine"].label == "fragile"
    assert "but not at a stable birth and death" in result.verdicts["t", "mine"].sentence


def test_checkpoints_of_a_model_are_matched_on_the_same_rows() -> None:
    same = [unit(f"pom_{m}", 0.4, draws=1, seed=m) for m in range(3)]
    apart = [unit(f"file:gnn_{m}-0123456789ab", 0.4, draws=1, seed=m) for m in range(2)]
    for made in apart:
        del made.observed[FULL_TABLE]
    for run in apart[1].runs:
        apart[1].observed[run] = apart[1].observed[run] + np.float32(0.7)  # the loop is born elsewhere
    result = audit([*same, *apart, unit("ae256_0", 0.4, draws=1), unit("rp256_0", 0.4, draws=1)])
    full = match([made.observed[FULL_TABLE] for made in same])
    assert value(result, "pom_*", "checkpoint_count") == 3
    assert value(result, "pom_*", "checkpoint_bottleneck_relative") == pytest.approx(full.relative)
    assert value(result, "pom_*", "checkpoint_bottleneck_recurrence") == 1.0
    runs = [match([made.observed[run] for made in apart], distance="wasserstein").relative for run in apart[0].runs]
    assert value(result, "file:gnn_*", "checkpoint_wasserstein_relative") == pytest.approx(np.mean(runs))
    assert value(result, "file:gnn_*", "checkpoint_bottleneck_recurrence") == 0.0
    assert value(result, "file:gnn_*", "checkpoint_birth_spread") > value(result, "pom_*", "checkpoint_birth_spread")
    families = result.cells[result.cells["statistic"].str.startswith("checkpoint")]
    assert set(families["representation"]) == {"pom_*", "file:gnn_*"}


def test_report_has_the_checkpoints_and_the_pooled_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plots", MagicMock())
    units = [unit(f"pom_{m}", 0.4, draws=1, seed=m) for m in range(2)]
    result, empty = audit(units), pd.DataFrame()
    report.write_report(units, result, tmp_path, preset="x", facts=[], members=empty, correlations=empty, utility=empty)
    text = (tmp_path / "report.md").read_text()
    matched, others = text.split("## Matching over checkpoints")[1].split("## Universal null")
    relative = value(result, "pom_*", "checkpoint_bottleneck_relative")
    assert f"| {relative:.4g} |" in matched
    assert "pom_*" not in text.split("## Matching over checkpoints")[0] + others
    assert "published ratio" in text
    assert "| pooled ratio |" in text
    assert f"| {value(result, 'pom_0', 'pooled_ratio'):.4g} |" in text
    kept = pd.read_parquet(tmp_path / "universal.parquet")
    assert list(kept.columns) == list(UNIVERSAL_COLUMNS)
    assert len(kept) == len(result.universal) > 0


def test_every_loop_of_the_full_table_gets_a_universal_p() -> None:
    made = unit("mine", 0.4, draws=1)
    made.observed[FULL_TABLE] = np.vstack([made.observed[FULL_TABLE], [[0.0, 0.1]]])
    result = audit([made])
    loops = result.universal
    np.testing.assert_array_equal(loops[["birth", "death"]].to_numpy(), made.observed[FULL_TABLE][:-1])
    assert loops["p"].idxmin() == 0
    assert loops["bonferroni"].tolist() == pytest.approx(np.minimum(1, len(loops) * loops["p"]).tolist())
    assert value(result, "mine", "universal_loops") == len(loops) == 13
    assert value(result, "mine", "universal_left_out") == 1
    assert value(result, "mine", "universal_significant_bonferroni") == (loops["bonferroni"] < 0.05).sum() == 1
    assert value(result, "mine", "universal_significant_bh") == (loops["bh"] < 0.05).sum()


def test_pooled_ratio_is_over_all_loops_of_a_null() -> None:
    made = unit("mine", 0.4, draws=5)
    drawn = [by_run[0] for by_run in made.null_diagrams.values()]
    lives = [np.concatenate([d[:, 1].astype(float) - d[:, 0] for d in diagrams]) for diagrams in drawn]
    expected = made.top1(made.runs).mean() / max(np.quantile(life, 0.95) for life in lives)
    assert value(audit([made]), "mine", "pooled_ratio") == pytest.approx(expected)


def test_advice_counts_the_tests_of_the_table() -> None:
    names = ("one", "two", "three")
    other = unit("one", 0.4, draws=39)
    other.place = ("t", "one", "cosine", "direct")
    lines = audit([*(unit(name, 0.4, draws=39, seed=i) for i, name in enumerate(names)), other]).advice
    assert "p < 0.05 over 3 tests needs ≥ 60 null draws, there are 39" in lines[0]
    assert "p < 0.05 over 1 test needs ≥ 20 null draws, there are 39" in lines[-1]


def test_too_few_draws_give_no_verdict_and_say_what_it_needs() -> None:
    """A ratio far above 1 is no detection."""
    result = audit([unit("mine", 0.4, draws=8)])
    assert result.few_draws
    assert value(result, "mine", "top1_ratio") > 3
    assert result.verdicts["t", "mine"].label == "undecided"
    assert result.verdicts["t", "mine"].sentence.endswith("needs ≥ 20 null draws, there are 8")


def test_partial_units_are_reported_not_fatal() -> None:
    lone = Unit(("t", "lone", "euclidean", "direct"))
    lone.observed[0] = np.empty((0, 2), np.float32)
    nulls_missing = unit("no_nulls", 0.4, draws=20)
    nulls_missing.nulls.clear()
    one_run = unit("one_run", 0.4, draws=20, runs=1)
    result = audit([lone, nulls_missing, one_run])
    assert value(result, "lone", "observed_top1_mean") == 0.0
    assert result.verdicts["t", "no_nulls"].label == "undecided"


def test_draws_must_be_enough_for_holm_over_all_representations() -> None:
    many = [unit(f"r{i}", 0.4, draws=39, seed=i) for i in range(3)]
    assert audit(many).few_draws  # 3 / 40 > 0.05: no verdict may rest on these p-values
    assert not audit(many[:1]).few_draws


def test_other_metrics_of_a_representation_are_not_tests_of_their_own() -> None:
    first, second = unit("mine", 0.4, draws=199), unit("mine", 0.4, draws=199, seed=3)
    second.place = ("t", "mine", "cosine", "direct")
    result = audit([first, second])
    holm = result.cells[result.cells["statistic"] == "p_holm"]
    assert holm["metric"].tolist() == ["euclidean"]
    assert holm["value"].tolist() == pytest.approx([1 / 200])
