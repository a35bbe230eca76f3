"""Tables rebuilt exactly, features equal to RDKit's legacy interface, bad rows listed, bad tables refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rdkit import rdBase
from rdkit.Chem import AllChem, MolFromSmiles
from rdkit.DataStructs import ConvertToNumpyArray

from data import molecules

SMILES = ["CCO", "COc1cc(C=O)ccc1O", "CC(=C)[C@@H]1CCC(C)=CC1", "C1CCNCC1", "CC/C=C\\CCO", "O=[Zn]", "S"]


def _odor(shared_data: Path) -> Path:
    return shared_data / "odor"


def test_curated_table_is_the_published_one(shared_data: Path) -> None:
    table = molecules.curated(_odor(shared_data) / "curated_GS_LF_merged_4983.csv")
    assert len(table) == molecules.CURATED_ROWS
    assert len(table.labels) == 138
    assert "descriptors" not in table.labels
    assert len(set(table.ids)) == len(table)
    assert table.labels_NL.shape == (4983, 138)
    assert table.labels_NL.sum(axis=0).min() == 31
    assert len(table.invalid) == 0
    assert "NOT" not in table.note


def test_broader_and_nonoverlap_counts_and_measured_dependence(shared_data: Path) -> None:
    folder = _odor(shared_data)
    broad = molecules.broader(folder / "pyrfume_goodscents_molecules.csv", folder / "pyrfume_leffingwell_molecules.csv")
    assert len(broad) == molecules.BROADER_ROWS
    assert broad.frame["row"].is_monotonic_increasing
    curate = molecules.curated(folder / "curated_GS_LF_merged_4983.csv")
    rest = molecules.nonoverlap(broad, curate)
    assert len(rest.table) == 1608
    assert rest.published_rows == 1600
    assert rest.stereo_share == pytest.approx(0.9117, abs=5e-4)
    assert "91%" in rest.note
    assert "not an independent sample" in rest.note


def test_nonoverlap_counts_stereo_variants_in_a_table_small_enough_to_count_by_hand() -> None:
    def table(smiles: list[str]) -> molecules.MoleculeTable:
        return molecules.MoleculeTable(
            name="t", frame=pd.DataFrame({"id": smiles, "row": range(len(smiles)), "smiles": smiles})
        )

    broad = table(["C/C=C/C", "C/C=C\\C", "CCO", "CCN"])
    rest = molecules.nonoverlap(broad, table(["CC=CC", "CCO"]))
    assert rest.table.smiles == ["C/C=C/C", "C/C=C\\C", "CCN"]
    assert rest.stereo_variants == 2


@pytest.mark.parametrize("radius", [2, 4])
def test_morgan_equals_the_legacy_interface(radius: int) -> None:
    smiles = [*SMILES, *molecules.embedded().smiles]
    bits_NB = molecules.morgan(smiles, radius, 2048)
    counts_NB = molecules.morgan(smiles, radius, 2048, counts=True)
    assert bits_NB.dtype == bool
    with rdBase.BlockLogs():
        for row, string in enumerate(smiles):
            mol = MolFromSmiles(string)
            legacy = np.zeros(2048, np.int64)
            ConvertToNumpyArray(AllChem.GetMorganFingerprintAsBitVect(mol, radius, nBits=2048), legacy)
            np.testing.assert_array_equal(bits_NB[row], legacy.astype(bool))
            hashed = AllChem.GetHashedMorganFingerprint(mol, radius, nBits=2048).GetNonzeroElements()
            dense = np.zeros(2048, np.int64)
            dense[list(hashed)] = list(hashed.values())
            np.testing.assert_array_equal(counts_NB[row], dense)
    assert counts_NB.max() > 1


def test_chirality_does_not_enter_the_fingerprint() -> None:
    pair = molecules.morgan(["CC(=C)[C@@H]1CCC(C)=CC1", "CC(=C)[C@H]1CCC(C)=CC1"])
    np.testing.assert_array_equal(pair[0], pair[1])


def test_physchem_of_vanillin_and_ethanol() -> None:
    ethanol, vanillin = molecules.physchem(["CCO", "COc1cc(C=O)ccc1O"])
    named = dict(zip(molecules.PHYSCHEM, vanillin, strict=True))
    assert named["MolWt"] == pytest.approx(152.149, abs=1e-3)
    assert named["TPSA"] == pytest.approx(46.53, abs=0.01)
    assert (named["HDonors"], named["HAcceptors"], named["RingCount"], named["AromaticRings"]) == (1, 3, 1, 1)
    assert named["HeavyAtomCount"] == 11
    assert named["FractionCSP3"] == pytest.approx(1 / 8)
    assert dict(zip(molecules.PHYSCHEM, ethanol, strict=True))["FractionCSP3"] == 1.0


def test_zscore_has_unit_columns_and_keeps_constants_finite() -> None:
    x = np.random.default_rng(0).normal(3.0, 5.0, size=(50, 3))
    x[:, 2] = 7.0
    z = molecules.zscore(x)
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(z.std(axis=0), [1.0, 1.0, 0.0], atol=1e-12)


def test_unreadable_and_repeated_rows_are_listed_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,name,sweet,green\nCCO,a,1,0\nnot_smiles,b,0,1\nCCO,c,0,0\n,d,1,1\nCCN,e,0,1\n")
    table = molecules.read_table(path)
    assert table.smiles == ["CCO", "CCN"]
    assert table.labels == ("sweet", "green")
    assert table.frame["row"].tolist() == [0, 4]
    assert table.invalid["row"].tolist() == [1, 2, 3]
    assert table.invalid["reason"].tolist() == [
        "RDKit cannot read it",
        "repeats an earlier row",
        "RDKit cannot read it",
    ]
    np.testing.assert_array_equal(table.labels_NL, [[1, 0], [0, 1]])


def test_bad_tables_are_one_line_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("molecule,sweet\nCCO,1\n")
    with pytest.raises(ValueError, match=r"^t\.csv has columns molecule, sweet; a table needs one of .*smiles$"):
        molecules.read_table(path)
    path.write_text("smiles,sweet\n%%%,1\n")
    with pytest.raises(ValueError, match="0 of 1 rows"):
        molecules.read_table(path)
    with pytest.raises(FileNotFoundError, match="--set table=PATH"):
        molecules.curated(tmp_path / "absent.csv")
    path.write_text("smiles\nCCO\n")
    with pytest.raises(ValueError, match="0 label columns"):
        _ = molecules.read_table(path).labels_NL


def test_another_file_is_never_called_the_published_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("smiles,sweet\nCCO,1\n")
    assert "NOT the published curated table" in molecules.curated(path).note


def test_features_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match="1 of 2 SMILES cannot be read by RDKit, the first 'x!' at row 1"):
        molecules.morgan(["CCO", "x!"])
    with pytest.raises(ValueError, match="radius=-1"):
        molecules.morgan(["CCO"], radius=-1)
    with pytest.raises(ValueError, match="what='bits' is no feature set"):
        molecules.featurise(["CCO"], "bits")


def test_embedded_table_is_readable_distinct_and_labelled() -> None:
    table = molecules.embedded()
    assert len(table) >= 300
    assert len(table.invalid) == 0
    assert len({molecules.canonical(s) for s in table.smiles}) == len(table)
    assert table.labels_NL.sum(axis=1).min() >= 1
    labelled = table.frame.set_index("smiles")
    assert labelled.loc["COc1cc(C=O)ccc1O", "vanilla"] == 1
    assert labelled.loc["CC(=C)[C@@H]1CCC(C)=CC1", ["citrus", "orange"]].tolist() == [1, 1]
    assert "stand-in" in table.note


def test_skeletons_keep_likes_together_and_others_apart() -> None:
    def same(*smiles: str) -> bool:
        return len(set(molecules.skeletons(smiles))) == 1

    assert same("CC(=C)[C@@H]1CCC(C)=CC1", "CC(=C)[C@H]1CCC(C)=CC1")
    assert same("OCC", "C(O)C", "CCN")
    assert same("c1ccccc1CCO", "COc1ccc(C=O)cc1", "C1CCOCC1")
    assert not same("c1ccccc1", "c1ccoc1")
    assert not same("CCCO", "CC(C)O")
    assert not same("C1CC1", "CCC")
    assert not same("c1ccc2ccccc2c1", "c1ccccc1")
    with pytest.raises(ValueError, match="'x!' at row 1"):
        molecules.skeletons(["CCO", "x!"])


@pytest.mark.slow
def test_ray_features_equal_the_local_ones_also_from_within_a_trial() -> None:
    import ray

    smiles = molecules.embedded().smiles[:150]

    @ray.remote(num_cpus=0.9)  # what a pack holds of its core
    def trial(what: str) -> np.ndarray:
        from sweeps.topology import sources

        sources.SPREAD_ROWS = 100
        return sources._features(smiles, what)

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    try:
        for what in ("bits_r4", "physchem"):
            local = molecules.featurise(smiles, what)
            np.testing.assert_array_equal(molecules.featurise(smiles, what, ray=True, batch_size=40), local)
            np.testing.assert_array_equal(ray.get(trial.remote(what), timeout=120), local)
    finally:
        ray.shutdown()
