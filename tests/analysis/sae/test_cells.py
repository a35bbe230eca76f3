"""The cells table: contract columns, one record built from streams, paired resampling of sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.bootstrap import count_blocks
from analysis.sae import cells as cells_module
from analysis.sae.budget import FeatureCounts, rate_bits
from analysis.sae.cells import SequenceTables, cell_numbers, prepare_cells, tokens_label
from analysis.sae.columns import CELL_COLUMNS
from analysis.sae.fidelity import SequenceSums
from analysis.sae.geometry import CovarianceSums

IDENTITY = {"model": "m", "layer": 3, "depth": "mid", "k": 4, "seed": 0, "tokens": 1000, "cell_key": "abc"}


def _streams() -> tuple[SequenceSums, FeatureCounts, CovarianceSums]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 16, 8, generator=generator) * torch.arange(1.0, 9.0)
    a_hat = a + 0.2 * torch.randn(a.shape, generator=generator)
    covariance, features = CovarianceSums(), FeatureCounts(64)
    covariance.update(a)
    features.update(torch.randint(0, 40, (480, 4), generator=generator))
    sums = SequenceSums(covariance.mean_D)
    sums.update(a, a_hat, range(30), torch.randn(a.shape, generator=generator))
    return sums, features, covariance


def test_record_has_the_contract_columns_and_consistent_values():
    sums, features, covariance = _streams()
    original = torch.linspace(2, 4, 30)
    sums.add_losses(range(30), original, original * 1.2, original + 5)
    record = cell_numbers(4, sums, features, covariance.summary())
    assert tuple(record) == tuple(name for name in CELL_COLUMNS if name not in IDENTITY)
    assert record["ce_rec"] == pytest.approx(0.8)
    assert record["ce_rec_lo"] == pytest.approx(0.8)
    assert record["rate_bits"] == rate_bits(64, 4)
    assert record["alive"] == features.alive()
    assert record["pr"] == covariance.summary()["pr"]
    assert (record["d_model"], record["d_sae"]) == (8, 64)


def test_record_without_losses_is_refused():
    sums, features, covariance = _streams()
    sums.add_losses([0, 1], [3.0, 3.0], [4.0, 4.0], [9.0, 9.0])
    with pytest.raises(ValueError, match="28 of 30 sequences have no losses"):
        cell_numbers(4, sums, features, covariance.summary())


def test_cells_are_ordered_and_bad_tables_are_named(make_grid):
    grid = make_grid(ks=(8, 16), n_sequences=5)
    shuffled = grid.cells.sample(frac=1.0, random_state=0)
    ordered = prepare_cells(shuffled)
    assert ordered.equals(prepare_cells(grid.cells))
    assert ordered["d_model"].is_monotonic_increasing
    with pytest.raises(ValueError, match=r"lacks columns \['r2', 'alive'\]"):
        prepare_cells(grid.cells.drop(columns=["r2", "alive"]))
    with pytest.raises(ValueError, match="occur twice"):
        prepare_cells(grid.cells.iloc[[0, 0]])
    with pytest.raises(ValueError, match="is empty"):
        prepare_cells(grid.cells.iloc[:0])


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(10_000_000, "10M"), (1_048_576, "1.049M"), (250_000, "250k"), (4096, "4.096k"), (512, "512")],
)
def test_token_labels(tokens, label):
    assert tokens_label(tokens) == label


def test_blocks_equal_explicit_resampling_and_are_paired(make_grid):
    grid = make_grid(depths=("mid",), ks=(8, 32), n_sequences=21)
    cells = prepare_cells(grid.cells)
    tables = SequenceTables(cells, grid.sequences)
    names = ["ce_rec", "r2", "cosine", "nmse", "swd", "abs_gdelta"]
    blocks = list(tables.blocks(names, n_resamples=70, seed=3, block=32))
    assert [len(b["r2"]) for b in blocks] == [32, 32, 6]
    counts = np.concatenate(list(count_blocks(21, 70, [3, 0], 32)))
    for column, key in enumerate(cells["cell_key"]):
        t = grid.sequences[key]
        for r in (0, 40, 69):
            s = t.iloc[np.repeat(np.arange(21), counts[r].astype(int))]
            expected = {
                "ce_rec": 2 - (s.n_tokens * s.loss_recon).sum() / (s.n_tokens * s.loss_orig).sum(),
                "r2": 1 - s.sse.sum() / s.sst.sum(),
                "cosine": s.cos_sum.sum() / s.n_tokens.sum(),
                "nmse": s.sse.sum() / s.sum_sq.sum(),
                "swd": s.swd_sum.sum() / s.n_tokens.sum(),
                "abs_gdelta": s.abs_sum.sum() / s.n_tokens.sum(),
            }
            for name in names:
                assert blocks[r // 32][name][r % 32, column] == pytest.approx(expected[name], rel=1e-12), name


def test_tables_as_one_frame_equal_tables_by_key(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,), n_sequences=9)
    cells = prepare_cells(grid.cells)
    long = cells_module.pd.concat([t.assign(cell_key=key) for key, t in grid.sequences.items()])
    (first,) = SequenceTables(cells, grid.sequences).blocks(["r2"], n_resamples=5, seed=0)
    (second,) = SequenceTables(cells, long).blocks(["r2"], n_resamples=5, seed=0)
    np.testing.assert_array_equal(first["r2"], second["r2"])


def test_models_on_other_sequences_are_resampled_apart(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,), n_sequences=30)
    cells = prepare_cells(grid.cells)
    same = dict.fromkeys(cells["cell_key"], grid.sequences[cells["cell_key"][0]])
    apart = dict(same)
    apart[cells["cell_key"][1]] = same[cells["cell_key"][1]].assign(sequence=np.arange(100, 130))
    (paired,) = SequenceTables(cells, same).blocks(["ce_rec"], n_resamples=50, seed=0)
    (unpaired,) = SequenceTables(cells, apart).blocks(["ce_rec"], n_resamples=50, seed=0)
    np.testing.assert_array_equal(paired["ce_rec"][:, 0], paired["ce_rec"][:, 1])
    assert abs(np.corrcoef(unpaired["ce_rec"].T)[0, 1]) < 0.5


def test_partial_sequence_tables_are_refused(make_grid):
    grid = make_grid(depths=("mid",), ks=(8, 16), n_sequences=9)
    cells = prepare_cells(grid.cells)
    some = dict(list(grid.sequences.items())[:2])
    with pytest.raises(ValueError, match="have no sequence table"):
        SequenceTables(cells, some)
    (block,) = SequenceTables(cells, None).blocks(["r2"], n_resamples=4, seed=0)
    np.testing.assert_array_equal(block["r2"], np.tile(cells["r2"], (4, 1)))
