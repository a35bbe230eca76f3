"""Means over seeds and model differences: point values, pairing, variance components, what one seed can say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.crossed import CrossedArms, crossed_mean
from analysis.sae.cells import SequenceTables, ce_rec_interval, prepare_cells
from analysis.sae.contrasts import METRICS, configuration_means, model_deltas
from analysis.sae.tables import direction


def _means(grid, sequences=None):
    cells = prepare_cells(grid.cells)
    return cells, configuration_means(cells, SequenceTables(cells, grid.sequences if sequences is None else sequences))


def test_means_average_seeds_and_intervals_bracket_them(make_grid):
    cells, means = _means(make_grid(depths=("mid",), ks=(8, 16), seeds=3))
    assert len(means.table) == 4
    first = means.table.iloc[0]
    chosen = cells[(cells["model"] == first["model"]) & (cells["k"] == first["k"])]
    assert first["n_seeds"] == 3
    for column in ("ce_rec", "r2", "alive", "cosine"):
        assert first[column] == pytest.approx(chosen[column].mean())
    assert (means.table["ce_rec_lo"] < means.table["ce_rec"]).all()
    assert (means.table["ce_rec"] < means.table["ce_rec_hi"]).all()


def test_one_seed_speaks_of_its_trained_sae_over_sequences(make_grid):
    """The mean's interval is the cell's own; a difference between two models has none."""
    cells, means = _means(make_grid(depths=("mid",), ks=(8,)))
    np.testing.assert_allclose(means.table[["ce_rec_lo", "ce_rec_hi"]], cells[["ce_rec_lo", "ce_rec_hi"]], rtol=1e-12)
    row = model_deltas(means).iloc[0]
    assert np.isnan(row[["delta_ce_rec_lo", "delta_r2_hi", "delta_ce_rec_p", "delta_r2_p_holm"]].astype(float)).all()
    assert row["delta_ce_rec_needs"] == row["delta_r2_needs"] == "needs ≥ 2 seeds"
    assert direction(row) == "undetermined"


def test_few_sequences_give_no_interval_and_the_reason(make_grid):
    _, means = _means(make_grid(depths=("mid",), ks=(8,), n_sequences=9, seeds=2))
    for metric in METRICS:
        assert set(means.table[f"{metric}_needs"]) == {"needs ≥ 10 evaluated sequences"}
        assert means.table[f"{metric}_lo"].isna().all()
        assert model_deltas(means)[f"delta_{metric}_needs"][0] == "needs ≥ 10 evaluated sequences"
    _, enough = _means(make_grid(depths=("mid",), ks=(8,), n_sequences=10))
    assert enough.table[["ce_rec_lo", "r2_lo"]].notna().all(axis=None)


def _with_seed_effects(grid, effects):
    """The grid's cells with each seed's patched losses multiplied; limits and values recomputed by nobody."""
    tables = {key: t.assign(loss_recon=t["loss_recon"] * effects(key)) for key, t in grid.sequences.items()}
    ce = [2 - t["loss_recon"].sum() / t["loss_orig"].sum() for t in tables.values()]
    return type(grid)(grid.cells.assign(ce_rec=ce), tables, None)


def test_two_far_apart_seeds_give_the_t_interval_of_one_degree_of_freedom(make_grid):
    grid = make_grid(models=("pythia-70m",), depths=("mid",), ks=(8,), seeds=2)
    wide = _with_seed_effects(grid, lambda key: 1 + 0.2 * int(key[-1]))
    row = _means(wide)[1].table.iloc[0]
    gap = abs(np.diff(wide.cells["ce_rec"])[0])
    assert row["ce_rec_hi"] - row["ce_rec_lo"] == pytest.approx(12.706 * gap, rel=0.02)


def test_means_and_deltas_equal_crossed_components_where_nothing_is_skewed(make_grid):
    """Symmetric influences: the limits are `crossed_mean`'s and, for equal seed variances, `CrossedArms`'."""
    rng = np.random.default_rng(0)
    half = rng.normal(0, 0.02, size=20)
    sequence_U = np.concatenate([half, -half])
    grid = make_grid(depths=("mid",), ks=(8,), seeds=2, n_sequences=40)
    values = {}
    tables = {}
    for key, table in grid.sequences.items():
        ce_U = 0.5 + 0.03 * (int(key[-1]) - 0.5) + sequence_U * (1 if "70m" in key else 3)
        tables[key] = table.assign(loss_orig=3.0, loss_recon=3.0 * (2 - ce_U))
        values[key] = ce_U
    cells = grid.cells.assign(ce_rec=[v.mean() for v in values.values()])
    means = _means(type(grid)(cells, tables, None))[1]
    arms = [np.stack([v for k, v in values.items() if m in k]) for m in ("70m", "410m")]
    for row, arm in zip(range(2), arms, strict=True):
        expected = crossed_mean(arm)
        assert means.table.loc[row, ["ce_rec_lo", "ce_rec_hi"]].tolist() == pytest.approx([expected.lo, expected.hi])
    expected = CrossedArms(tuple(arms)).difference(1, 0)
    found = model_deltas(means).iloc[0]
    assert found["delta_ce_rec_lo"] == pytest.approx(expected.lo)
    assert found["delta_ce_rec_p"] == pytest.approx(expected.p)


def test_deltas_are_widest_minus_narrowest_and_adjusted_together(make_grid):
    grid = make_grid(models=("pythia-410m", "pythia-160m", "pythia-70m"), depths=("mid",), ks=(8, 32), seeds=3)
    cells, means = _means(grid)
    deltas = model_deltas(means)
    assert list(deltas["k"]) == [8, 32]
    assert set(deltas["small"]) == {"pythia-70m"}
    assert set(deltas["large"]) == {"pythia-410m"}
    by = cells.groupby(["model", "k"])["ce_rec"].mean()
    assert deltas["delta_ce_rec"][0] == pytest.approx(by["pythia-410m", 8] - by["pythia-70m", 8])
    assert (deltas["delta_r2_lo"] > 0).all()
    p = pd.concat([deltas["delta_ce_rec_p"], deltas["delta_r2_p"]])
    adjusted = pd.concat([deltas["delta_ce_rec_p_holm"], deltas["delta_r2_p_holm"]])
    assert adjusted.min() == pytest.approx(4 * p.min())


def test_pairing_by_sequence_and_its_absence(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,), seeds=2)
    shared = dict(zip(grid.sequences, [t for t in list(grid.sequences.values())[:2]] * 2, strict=True))
    paired = model_deltas(_means(grid, shared)[1]).iloc[0]
    apart = {k: t.assign(sequence=t["sequence"] + 1000 * ("410m" in k)) for k, t in shared.items()}
    unpaired = model_deltas(_means(grid, apart)[1]).iloc[0]
    widths = [row["delta_ce_rec_hi"] - row["delta_ce_rec_lo"] for row in (paired, unpaired)]
    assert widths[0] < 0.999 * widths[1]
    different = {k: t.assign(sequence=t["sequence"] + 1000 * int(k[-1])) for k, t in shared.items()}
    row = model_deltas(_means(grid, different)[1]).iloc[0]
    assert row["delta_ce_rec_needs"] == "needs the same evaluated sequences for all seeds"


def test_without_sequences_seeds_alone_carry_the_interval(make_grid):
    cells = prepare_cells(make_grid(depths=("mid",), ks=(8,), seeds=3).cells)
    means = configuration_means(cells, SequenceTables(cells, None))
    expected = crossed_mean(cells["ce_rec"].to_numpy()[:3, None])
    assert means.table["ce_rec_lo"][0] == pytest.approx(expected.lo)
    one = cells[cells["seed"] == 0].reset_index(drop=True)
    assert set(configuration_means(one, SequenceTables(one, None)).table["ce_rec_needs"]) == {
        "needs ≥ 10 evaluated sequences"
    }


def test_one_model_gives_an_empty_table(make_grid):
    _, means = _means(make_grid(models=("pythia-70m",), depths=("mid",), ks=(8,)))
    assert model_deltas(means).empty


def test_models_of_one_family_are_compared_where_there_are_two(make_grid):
    grid = make_grid(models=("pythia-70m", "pythia-160m", "pythia-410m"), depths=("mid",), ks=(8,))
    renamed = grid.cells.replace({"model": {"pythia-70m": "smollm2-135m"}})
    deltas = model_deltas(_means(type(grid)(renamed, grid.sequences, None))[1])
    assert set(zip(deltas["small"], deltas["large"], strict=True)) == {("pythia-160m", "pythia-410m")}
    alone = renamed[renamed["model"] != "pythia-160m"]
    deltas = model_deltas(_means(type(grid)(alone, grid.sequences, None))[1])
    assert set(zip(deltas["small"], deltas["large"], strict=True)) == {("smollm2-135m", "pythia-410m")}


def test_only_configurations_with_both_extreme_models_are_compared(make_grid):
    grid = make_grid(models=("pythia-70m", "pythia-160m", "pythia-410m"), depths=("mid",), ks=(8, 32), n_sequences=9)
    partial = type(grid)(grid.cells[~((grid.cells.model == "pythia-410m") & (grid.cells.k == 8))], grid.sequences, None)
    deltas = model_deltas(_means(partial)[1])
    assert list(deltas["k"]) == [32]
    assert list(deltas["large"]) == ["pythia-410m"]


def _by_document(grid, order, documents):
    """The wide model's sequences in another order, as another tokenizer packs them; every table tells documents."""
    tables = {}
    for key, table in grid.sequences.items():
        moved = "410m" in key
        rows = table.iloc[order] if moved else table
        own = documents[order] if moved else documents
        tables[key] = rows.assign(sequence=np.arange(len(table)), document=own)
    return tables


def test_models_of_other_tokenizers_are_paired_by_document(make_grid):
    """One sequence per document in another order: the intervals are those of the pairing by sequence."""
    grid = make_grid(depths=("mid",), ks=(8,), seeds=3, n_sequences=40)
    documents = np.random.default_rng(1).integers(0, 2**62, 40)
    paired = model_deltas(_means(grid)[1])
    order = np.random.default_rng(2).permutation(40)
    _, means = _means(grid, _by_document(grid, order, documents))
    assert len({m.sequences for m in means.measured["r2"]}) == 2
    pd.testing.assert_frame_equal(model_deltas(means), paired, rtol=1e-9)
    same = _by_document(grid, np.arange(40), documents)
    pd.testing.assert_frame_equal(model_deltas(_means(grid, same)[1]), paired, rtol=1e-12)


def test_sequences_of_a_document_are_one_unit(make_grid):
    """Every sequence twice, in one document: the differences' intervals are those of 40 units, not of 80."""
    grid = make_grid(depths=("mid",), ks=(8,), seeds=3, n_sequences=40)
    documents = np.random.default_rng(1).integers(0, 2**62, 40)
    once = model_deltas(_means(grid, _by_document(grid, np.arange(40)[::-1], documents))[1])
    doubled = {key: pd.concat([t, t], ignore_index=True) for key, t in grid.sequences.items()}
    twice = type(grid)(grid.cells, doubled, None)
    order = np.random.default_rng(3).permutation(80)
    found = model_deltas(_means(twice, _by_document(twice, order, np.tile(documents, 2)))[1])
    for metric in ("ce_rec", "r2"):
        widths = [float(t[f"delta_{metric}_hi"][0] - t[f"delta_{metric}_lo"][0]) for t in (found, once)]
        assert 0.999 < widths[0] / widths[1] < 1.1  # 80 independent ones: 0.71; less of seed × sequence is taken off


def test_documents_are_the_units_of_one_model_too(make_grid):
    """Each sequence twice in one document: intervals as of the sequences once."""
    grid = make_grid(depths=("mid",), ks=(8,), n_sequences=12)
    once = _means(grid)[1].table
    key = "sequence"
    twice = {
        name: pd.concat([t, t]).assign(sequence=np.arange(24), document=np.tile(t[key].to_numpy(), 2))
        for name, t in grid.sequences.items()
    }
    found = _means(grid, twice)[1].table
    for column in ("ce_rec_lo", "ce_rec_hi", "r2_lo", "r2_hi"):
        assert found[column].tolist() == pytest.approx(once[column].tolist(), rel=1e-12)
    name, table = next(iter(twice.items()))
    limits, plain = ce_rec_interval(table), ce_rec_interval(grid.sequences[name])
    assert (limits.lo, limits.hi) == pytest.approx((plain.lo, plain.hi), rel=1e-12)
    few = ce_rec_interval(table.assign(document=table["document"] % 9))
    assert few.needs == "needs ≥ 10 evaluated documents"


def test_few_documents_give_no_interval_and_older_tables_none_of_their_own(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,), seeds=2, n_sequences=40)
    documents = np.arange(40) // 6
    tables = _by_document(grid, np.arange(40)[::-1], documents)
    row = model_deltas(_means(grid, tables)[1]).iloc[0]
    assert row["delta_ce_rec_needs"] == row["delta_r2_needs"] == "needs ≥ 10 evaluated documents"
    assert np.isnan(row["delta_ce_rec_lo"])
    first = next(iter(tables))
    older = tables | {first: tables[first].drop(columns="document")}  # of a ledger that was begun before
    plain = {key: table.drop(columns="document") for key, table in tables.items()}
    for mixed in (older, pd.concat([t.assign(cell_key=key) for key, t in older.items()])):
        found = model_deltas(_means(grid, mixed)[1])
        pd.testing.assert_frame_equal(found, model_deltas(_means(grid, plain)[1]), check_exact=True)
