"""Tables that users give: what counts as a label, blank cells, spellings of one molecule, files that are no CSV."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import embeddings, molecules
from data._csv import label_values, read_csv
from sweeps.core.cells import UserError
from sweeps.topology import sources
from sweeps.topology.presets import PRESETS
from sweeps.topology.sweep import SWEEP

HEAD = "smiles,name,weight,sweet,green,empty\n"
BODY = "CCO,a,46.1,1,0,\nCCN,b,45.1,,1,\nCCC,c,44.1,0,0,\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    path.write_text(HEAD + BODY)
    return path


def banner(path: Path, **fields: str) -> list[str]:
    return SWEEP.banner("audit", replace(PRESETS["audit"], table=str(path), **fields))  # type: ignore[arg-type]


def test_a_blank_cell_does_not_remove_its_label_column(table: Path) -> None:
    read = molecules.read_table(table)
    assert read.labels == ("sweet", "green")
    assert np.array_equal(read.labels_NL, [[1, 0], [0, 1], [0, 0]])
    assert read.blank_labels == (("sweet", 1),)
    assert dict(read.no_labels) == {
        "name": "text, such as 'a'",
        "weight": "numbers other than 0 and 1, such as 46.1",
        "empty": "every cell is blank",
    }


def test_the_banner_counts_labels_and_names_what_is_none_and_what_is_blank(table: Path) -> None:
    lines = banner(table)
    (labels,) = [line for line in lines if line.startswith("labels: 2 columns of 0 and 1; no labels: ")]
    assert "name (text, such as 'a'), weight (numbers other than 0 and 1, such as 46.1), empty (every cell" in labels
    assert "labels: 1 blank cells (1 in sweet) count as 0 (blank_labels=absent)" in "\n".join(lines)


def test_blank_labels_can_be_refused(table: Path) -> None:
    preset = replace(PRESETS["audit"], table=str(table), blank_labels="refuse", clouds=())
    with pytest.raises(UserError, match=r"1 blank cells \(1 in sweet\) among its labels and blank_labels=refuse; fill"):
        SWEEP.plan(preset)
    with pytest.raises(UserError, match="blank_labels='absnt' is not known; did you mean absent"):
        SWEEP.plan(replace(preset, blank_labels="absnt"))
    table.write_text(HEAD + BODY.replace("b,45.1,,", "b,45.1,0,"))
    assert SWEEP.plan(replace(preset, representations=("bits_r4",)))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["0", "1", " "], [0, 1, np.nan]),
        ([True, False, None], [1, 0, np.nan]),
        (["TRUE", "false", "1.0"], [1, 0, 1]),
        ([0, 1, 2], "numbers other than 0 and 1, such as 2"),
        ([0.0, 0.5, np.nan], "numbers other than 0 and 1, such as 0.5"),
        (["yes", "no", "1"], "text, such as 'yes'"),
        ([None, "", " "], "every cell is blank"),
    ],
)
def test_label_values(cells: list[object], expected: object) -> None:
    found = label_values(pd.Series(cells))
    if isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_spellings_of_one_molecule_are_one_molecule_counted_aloud(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,sweet\nCCO,1\nOCC,0\nC(O)C,1\nCCO,1\nCC=CC,0\nC/C=C/C,0\nCCN,0\n")
    read = molecules.read_table(path)
    assert read.smiles == ["CCO", "CC=CC", "C/C=C/C", "CCN"]
    assert read.invalid["row"].tolist() == [1, 2, 3]
    assert read.invalid["reason"].tolist() == ["another spelling of an earlier row"] * 2 + ["repeats an earlier row"]
    line = "\n".join(banner(path))
    assert "4 molecules, 2 kept out (another spelling of an earlier row), 1 kept out (repeats an earlier row)" in line
    assert "; 1 of the 3 repeats have other labels than the row that is kept" in line


def test_a_table_where_every_molecule_repeats_says_so_and_one_molecule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,sweet\nCCO,1\nOCC,1\nCCN,0\nNCC,0\n")
    assert "; every molecule stands in several rows, of which the first is kept" in "\n".join(banner(path))
    path.write_text("smiles,sweet\nCCO,1\nOCC,1\nC(O)C,0\n")
    with pytest.raises(UserError, match=r"^t\.csv: its 3 readable rows are all one molecule, CCO; give a table of"):
        SWEEP.plan(replace(PRESETS["audit"], table=str(path)))


def test_an_embedding_of_all_rows_of_the_source_fits_a_table_that_keeps_some_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles\nCCO\nOCC\nbad!\nCCN\n")
    rows = molecules.read_table(path)
    x_ND = np.arange(8.0).reshape(4, 2)
    for ids in (["CCO", "OCC", "bad!", "CCN"], ["0", "1", "2", "3"]):
        np.savez(tmp_path / "e.npz", ids=np.array(ids), embedding=x_ND)
        found = embeddings.load_aligned(tmp_path / "e.npz", rows.ids, rows.frame["row"].tolist(), rows.invalid)
        assert np.array_equal(found, x_ND[[0, 3]])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "t.csv is empty; give a CSV with a line of column names"),
        ("smiles,sweet\nCCO,1\nCCN,é\n".encode("latin-1"), "t.csv line 3 is not UTF-8 (byte 0xe9); save it as UTF-8"),
        ("smiles\nCCO\n".encode("utf-16"), "t.csv line 1 is not UTF-8 (byte 0xff)"),
        (b"smiles,sweet\nCCO,1\nCCN,1,2,3\n", "t.csv cannot be read as CSV (Error tokenizing data."),
        (b"smiles,sweet\n", "t.csv: 0 of 0 rows have a SMILES"),
    ],
)
def test_files_that_are_no_csv_are_one_line_with_their_name(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        SWEEP.plan(replace(PRESETS["audit"], table=str(path)))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_name_and_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    marked = tmp_path / "m.csv"
    marked.write_bytes(b"\xef\xbb\xbfsmiles,sweet\r\nCCO,1\r\nCCN,0\r\n")
    assert molecules.read_table(marked).labels == ("sweet",)
    packed = tmp_path / "p.csv.gz"
    packed.write_bytes(gzip.compress(marked.read_bytes())[:-12])
    with pytest.raises(ValueError, match=r"p\.csv\.gz cannot be read as CSV"):
        read_csv(packed)


def test_every_reader_of_embeddings_names_the_file_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "e.ids.txt").write_text("CCO\r\nCCN\r\n", newline="")
    np.save(tmp_path / "e.npy", np.eye(2))
    assert embeddings.load(tmp_path / "e.npy")[0] == ["CCO", "CCN"]
    for name in ("e.npy", "e.npz", "e.parquet"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no archive" if name == "e.npz" else b"")
        with pytest.raises(ValueError, match=f"^{name} cannot be read") as caught:
            embeddings.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_published_table_holds_no_molecule_twice(shared_data: Path) -> None:
    """So its rows, keys and fingerprints are what they were when repeats were found by string."""
    table = molecules.curated(shared_data / "odor" / "curated_GS_LF_merged_4983.csv")
    assert len(table) == molecules.CURATED_ROWS
    assert len(table.invalid) == table.repeated == 0
    assert table.blank_labels == ()
    assert [name for name, _ in table.no_labels] == ["descriptors"]
    assert sources._label_lines(table)[0].startswith("labels: 138 columns of 0 and 1; no labels: descriptors")
