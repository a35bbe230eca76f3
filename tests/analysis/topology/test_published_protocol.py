"""The published number: Morgan bits of the curated odor table, direct route, 8 runs of 1,000 rows."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from analysis.topology import nulls
from analysis.topology.distances import jaccard
from analysis.topology.persistence import h1

NULLS = (nulls.fixed_margin, nulls.bernoulli, nulls.permute_columns)


@pytest.fixture(scope="module")
def morgan_bits(shared_data):
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdFingerprintGenerator

    RDLogger.DisableLog("rdApp.*")
    path = shared_data / "odor" / "curated_GS_LF_merged_4983.csv"
    if not path.is_file():
        pytest.skip(f"no curated odor table at {path}")
    with path.open(newline="") as file:
        smiles = [row["nonStereoSMILES"] for row in csv.DictReader(file)]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=4, fpSize=2048)
    return np.array([generator.GetFingerprintAsNumPy(Chem.MolFromSmiles(s)) for s in smiles], dtype=bool)


def top1(x):
    loops = h1(jaccard(x))
    return float((loops[:, 1].astype(np.float64) - loops[:, 0]).max())


def run_rows(x, run):
    return x[np.sort(np.random.default_rng(run).choice(len(x), 1000, replace=False))]


@pytest.mark.slow
def test_bits_direct_route_reproduces_the_published_ratio(morgan_bits):
    assert morgan_bits.shape == (4983, 2048)
    observed = []
    null_top1 = np.empty((len(NULLS), 8))
    for run in range(8):
        x = run_rows(morgan_bits, run)
        observed.append(top1(x))
        for position, sampler in enumerate(NULLS, start=1):
            null_top1[position - 1, run] = top1(sampler(x, run + 10000 * position, "published"))
    ratio = np.mean(observed) / np.quantile(null_top1, 0.95, axis=1).max()
    assert np.mean(observed) == pytest.approx(0.2028712, abs=1e-6)
    assert ratio == pytest.approx(2.4445, abs=5e-4)


@pytest.mark.slow
def test_fast_nulls_of_the_same_protocol_lie_in_the_monte_carlo_band(morgan_bits):
    """Equal in law, other draws: 95% of 8-run ratios lie in 2.05..3.52; the observed part is the same number."""
    observed = []
    null_top1 = np.empty((len(NULLS), 8))
    for run in range(8):
        x = run_rows(morgan_bits, run)
        observed.append(top1(x))
        for position, sampler in enumerate(NULLS, start=1):
            null_top1[position - 1, run] = top1(sampler(x, run + 10000 * position, "fast"))
    assert np.mean(observed) == pytest.approx(0.2028712, abs=1e-6)
    assert 2.05 < np.mean(observed) / np.quantile(null_top1, 0.95, axis=1).max() < 3.52
