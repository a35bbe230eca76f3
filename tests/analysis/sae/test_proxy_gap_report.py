"""The report: its files, published columns, partial grids, determinism; the wording follows the numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.sae import published
from analysis.sae.columns import AUDIT_COLUMNS, CELL_COLUMNS, RUNG_COLUMNS
from analysis.sae.measured import interval, number
from analysis.sae.plots import FIGURES
from analysis.sae.report import compose, confounds, glance, measure, write_report
from analysis.sae.tables import markdown

FACTS = {"language models": "synthetic grid | no model was run"}
SMALL = {"n_resamples": 60}


def _write(grid, out, *, preset="fast2", paper=True, notes=()):
    study = measure(grid.cells, grid.sequences, grid.geometry, published=paper, **SMALL)
    return write_report(study, out, preset=preset, facts=FACTS, notes=notes).read_text(encoding="utf-8")


def _table(text: str, title: str) -> pd.DataFrame:
    """The first pipe table under a heading."""
    lines = text.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return pd.DataFrame(rows[2:], columns=rows[0])


@pytest.fixture(scope="module")
def fast2(make_grid, tmp_path_factory):
    out = tmp_path_factory.mktemp("fast2")
    grid = make_grid(n_sequences=24)
    return grid, out, _write(grid, out, notes=["a caveat of the caller"])


def test_every_file_is_written_and_cells_keep_the_contract(fast2):
    _, out, text = fast2
    for name in ("report.md", "cells.parquet", "cells.csv", "leaderboard.csv", "leaderboard_pairs.csv", "deltas.csv"):
        assert (out / name).stat().st_size > 0
    cells = pd.read_parquet(out / "cells.parquet")
    assert tuple(cells.columns) == CELL_COLUMNS
    assert len(cells) == 36
    pd.testing.assert_frame_equal(cells, pd.read_csv(out / "cells.csv"), check_dtype=False, rtol=1e-12)
    shown = {name for name in FIGURES if f"]({name})" in text}
    assert shown == set(FIGURES) - {"budget.png", "cost.png"}  # one budget, no measured cost
    for name in shown:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "a caveat of the caller" in text
    assert "synthetic grid \\| no model was run" in text


def test_published_numbers_stand_beside_ours(fast2):
    _, _, text = fast2
    head = _table(text, "Headline").set_index("model")
    assert head.loc["pythia-410m", "CE_rec published"] == "0.235 [0.050, 0.382]"
    assert head.loc["pythia-70m", "R² published"] == "0.807"
    delta = _table(text, "Widest minus narrowest model, by k").set_index(["depth", "k"])
    assert delta.loc[("mid", "128"), "ΔCE_rec published"] == "-0.032"
    assert delta.loc[("early", "8"), "ΔR² published"] == ""
    ladder = _table(text, "Scale ladder (mid, 10M tokens)").set_index(["k", "model"])
    assert ladder.loc[("64", "pythia-410m"), "cosine published"] == "0.901"
    assert ladder.loc[("128", "pythia-410m"), "cosine published"] == ""
    correlation = _table(text, "Correlation of R² with CE_rec, per depth").set_index("depth")
    assert correlation.loc["late", "within k published"] == "+0.976"
    k_star = _table(text, "k*: the smallest k that reaches a CE_rec").set_index(["depth", "target", "model"])
    assert k_star.loc[("mid", "0.90", "pythia-410m"), "published"] == "187.6"
    pr = _table(text, "Participation ratio, every layer").set_index(["model", "layer"])
    assert pr.loc[("pythia-410m", "5"), "PR published"] == "2.045"
    assert len(pr) == 30
    check = _table(text, "Check on definitions").set_index("model")
    assert check.loc["pythia-410m", "SST/token published"] == "4131.1"


def test_tables_print_what_was_measured(fast2):
    grid, _, text = fast2
    cell = grid.cells.set_index(["model", "depth", "k"]).loc[("pythia-410m", "mid", 8)]
    head = _table(text, "Headline").set_index("model").loc["pythia-410m"]
    assert head["CE_rec [95% CI]"].startswith(f"{cell['ce_rec']:.3f} [")
    row = _table(text, "Conventions side by side").set_index(["model", "depth", "k"]).loc[("pythia-410m", "mid", "8")]
    assert row["R² (ratio of sums)"] == f"{cell['r2']:.4f}"
    assert row["R² legacy (mean of token ratios)"] == f"{cell['r2_legacy']:.4f}"
    assert row["ce_loss_score"] == f"{cell['ce_loss_score']:.4f}"
    check = _table(text, "Check on definitions").set_index("model").loc["pythia-410m"]
    assert 1 - float(check["mse·d_model"]) / float(check["SST/token"]) == pytest.approx(cell["r2"], abs=2e-3)


def test_confound_of_late_depth_and_unprocessed_weights_are_stated(fast2):
    _, _, text = fast2
    assert "pythia-70m late (L5) is the final block; pythia-410m late (L20) is not the final block" in text
    assert "no folding of layer norms" in text
    assert text.count("Confound:") == 1


def test_same_input_gives_the_same_bytes_and_row_order_does_not_matter(make_grid, tmp_path):
    grid = make_grid(depths=("mid",), ks=(8, 16), n_sequences=12)
    first, second = tmp_path / "first", tmp_path / "second"
    _write(grid, first)
    shuffled = type(grid)(
        grid.cells.sample(frac=1, random_state=1), dict(reversed(grid.sequences.items())), grid.geometry[::-1]
    )
    _write(shuffled, second)
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_budget_tables_and_seeds(make_grid, tmp_path):
    budgets = (published.TEN, published.FIFTY, published.HUNDRED)
    grid = make_grid(depths=("mid",), ks=(8, 16), tokens=budgets, seeds=2, n_sequences=12)
    text = _write(grid, tmp_path, preset="phase2")
    delta = _table(text, "Budget: does the gap between models close with training?").set_index(["k", "tokens"])
    assert delta.loc[("8", "100M"), "ΔCE_rec published"] == "+0.009 [+0.004, +0.013] (3 seeds)"
    assert delta.loc[("8", "50M"), "ΔCE_rec published"] == "+0.018 (1 seed)"
    assert set(delta["seeds"]) == {"2"}
    each = _table(text, "Budget: each model (mid)").set_index(["k", "model", "tokens"])
    assert each.loc[("8", "pythia-70m", "50M"), "CE_rec published"] == "0.670 [0.629, 0.706]"
    k_star = _table(text, "k*: the smallest k that reaches a CE_rec")
    chosen = (k_star["target"] == "0.90") & (k_star["tokens"] == "10M") & (k_star["model"] == "pythia-410m")
    assert k_star.loc[chosen, "k* [95% CI]"].str.startswith("> 16 [").all()
    assert (tmp_path / "budget.png").exists()


def test_one_cell_says_what_it_needs_and_leaves_published_blank(make_grid, tmp_path):
    (tmp_path / "delta.png").write_bytes(b"left by an earlier report")
    grid = make_grid(models=("pythia-70m",), depths=("mid",), ks=(8,), n_sequences=12)
    text = _write(grid, tmp_path, preset="local", paper=False)
    assert "It needs the widest and the narrowest of two or more models at one depth, k and budget." in text
    assert "It needs at least three cells." in text
    assert "It needs at least two k at the same model, depth and budget." in text
    assert _table(text, "Headline").loc[0, "CE_rec published"] == ""
    assert "columns are blank: these are not the study's settings" in text
    assert "delta.png" not in text
    assert not (tmp_path / "delta.png").exists()


def test_uneven_grid_without_sequences_gradients_or_geometry(make_grid):
    grid = make_grid(ks=(8, 16, 32), n_sequences=12)
    cells = grid.cells.drop(index=[0, 4, 17]).assign(swd=np.nan, abs_gdelta=np.nan)
    cells = cells.drop(columns=[c for c in (*RUNG_COLUMNS, *AUDIT_COLUMNS) if c in cells]).assign(r2_legacy=np.nan)
    text = compose(measure(cells, None, None, **SMALL), {}, preset="local", facts={})
    assert "Left out: 1/SWD: no cell measured `swd`." in text
    assert "no sequence tables were given" in text
    assert "It needs the activation covariance of the models' layers." in text
    assert set(_table(text, "Proxy leaderboard (all cells)")["proxy"]) == {"R²", "cosine", "1/NMSE"}
    assert len(_table(text, "Rate, distortion and feature use")) == 15


def test_glance_states_directions_only_where_both_differences_pass_holm(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,), n_sequences=40, seeds=4)
    lines = glance(measure(grid.cells, grid.sequences, None, **SMALL))
    assert "point in opposite directions" in lines[0]
    assert lines[1].endswith("opposite in 1, same in 0, undetermined in 0.")
    tables = {
        key: t.assign(loss_recon=t["loss_orig"] * (1.5 + 0.01 * int(key[-1]))) for key, t in grid.sequences.items()
    }
    equal = grid.cells.assign(ce_rec=0.5 - 0.01 * grid.cells["seed"])
    lines = glance(measure(equal, tables, None, **SMALL))
    assert "directions undetermined (not both differences pass 5% after Holm)" in lines[0]
    assert lines[1].endswith("opposite in 0, same in 0, undetermined in 1.")


def test_one_seed_has_no_direction_and_says_what_it_needs(fast2):
    """With one seed nothing is known of other trainings, however far apart the two models' SAEs lie."""
    _, _, text = fast2
    delta = _table(text, "Widest minus narrowest model, by k")
    assert set(delta["directions"]) == {"undetermined (needs ≥ 2 seeds)"}
    assert delta["ΔCE_rec [95% CI]"].str.endswith(" [–]").all()
    assert "opposite in 0, same in 0, undetermined in 18." in text
    assert "its interval is that of the one trained SAE over sequences" in text


def test_limits_of_an_earlier_method_are_computed_anew_and_told(make_grid):
    grid = make_grid(depths=("mid",), ks=(8, 16), n_sequences=40)
    stored = grid.cells.assign(ce_rec_lo=grid.cells["ce_rec_lo"] + 0.01)
    text = compose(measure(stored, grid.sequences, None, **SMALL), {}, preset="local", facts={})
    assert "4 cells were published with limits of CE_rec by an earlier method" in text
    fresh = measure(stored, grid.sequences, None, **SMALL).cells
    pd.testing.assert_frame_equal(fresh, measure(grid.cells, grid.sequences, None, **SMALL).cells)
    assert "an earlier method" not in compose(
        measure(grid.cells, grid.sequences, None, **SMALL), {}, preset="", facts={}
    )


def test_final_block_is_read_from_geometry_only_when_it_covers_every_layer(make_grid):
    grid = make_grid(depths=("late",), ks=(8, 16), n_sequences=12)
    renamed = {"pythia-70m": "tiny-a", "pythia-410m": "tiny-b"}
    cells = grid.cells.assign(model=grid.cells["model"].map(renamed))
    whole = grid.geometry.assign(model=grid.geometry["model"].map(renamed))
    (line,) = confounds(measure(cells, grid.sequences, whole, **SMALL))
    assert "tiny-a late (L5) is the final block; tiny-b late (L20) is not the final block" in line
    hooked = whole[whole["layer"].isin([5, 20])]
    assert confounds(measure(cells, grid.sequences, hooked, **SMALL)) == []


def test_published_data_is_consistent_with_itself():
    """The study's own tables must agree where they overlap, to the digits printed."""
    for (depth, k, tokens), (delta_r2, delta_ce) in published.DELTA.items():
        small = published.HEADLINE.get((published.SMALL, depth, k, tokens))
        large = published.HEADLINE.get((published.LARGE, depth, k, tokens))
        if small and large:
            assert large[0] - small[0] == pytest.approx(delta_r2, abs=1.1e-3)
            assert large[1] - small[1] == pytest.approx(delta_ce, abs=1.1e-3)
    for sse, sst, r2 in published.DEFINITION_CHECK.values():
        assert round(1 - sse / sst, 3) == r2
    for (model, _), (pr, over_d) in published.PARTICIPATION_RATIO.items():
        width = {published.SMALL: 512, published.LARGE: 1024}[model]
        assert round(pr / width, 3) == over_d
    assert len(published.FAST3) == 12
    assert len(published.K_STAR) == 8


def test_text_helpers():
    assert number(None) == number(float("nan")) == ""
    assert number(0.12345, 2, sign=True) == "+0.12"
    assert interval(0.5, 0.25, 0.75, 2) == "0.50 [0.25, 0.75]"
    assert interval(0.5, float("nan"), float("nan"), 2) == "0.50"
    assert markdown([{"a": "x|y", "b": "1"}]) == "| a | b |\n|---|---:|\n| x\\|y | 1 |"


def test_bad_geometry_and_sequence_tables_are_named(make_grid):
    grid = make_grid(models=("pythia-70m",), depths=("mid",), ks=(8,), n_sequences=4)
    with pytest.raises(ValueError, match=r"geometry table lacks columns \['pr'\]"):
        measure(grid.cells, grid.sequences, grid.geometry.drop(columns="pr"))
    (key,) = grid.sequences
    short = {key: grid.sequences[key].drop(columns="sse")}
    with pytest.raises(ValueError, match=r"sequence table of cell pythia-70m-mid-8-10000000-0 lacks columns \['sse'\]"):
        measure(grid.cells, short, grid.geometry)
