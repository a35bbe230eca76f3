"""Every format round-trips in the table's order; anything that does not fit is a one-line error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import embeddings

IDS = ["CCO", "CCN", "C=O"]
X_ND = np.arange(6.0).reshape(3, 2)
SHUFFLED = [2, 0, 1]


def _write(folder: Path, kind: str, ids: list[str], x_ND: np.ndarray) -> Path:
    if kind == "npy":
        path = folder / "e.npy"
        np.save(path, x_ND)
        (folder / "e.ids.txt").write_text("\n".join(ids) + "\n")
    elif kind == "npz":
        path = folder / "e.npz"
        np.savez(path, ids=np.array(ids), embedding=x_ND)
    else:
        path = folder / "e.parquet"
        columns = {"embedding": list(x_ND)} if kind == "lists" else {f"d{i}": x_ND[:, i] for i in range(2)}
        pd.DataFrame({"id": ids, **columns}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "columns", "lists"])
def test_rows_come_back_in_the_order_of_the_table(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path, kind, [IDS[i] for i in SHUFFLED], X_ND[SHUFFLED])
    np.testing.assert_array_equal(embeddings.load_aligned(path, IDS), X_ND)


def test_integer_ids_are_source_rows(tmp_path: Path) -> None:
    path = _write(tmp_path, "npz", ["9", "4", "7"], X_ND)
    np.testing.assert_array_equal(embeddings.load_aligned(path, IDS, [4, 7, 9]), X_ND[[1, 2, 0]])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["CCO", "CCN", "CCC"], "1 of 3 table rows have no embedding and 1 ids are not in the table"),
        (["CCO", "CCN", "CCN"], "1 ids are repeated"),
        (["CCO", "CCN"], "2 ids for 3 rows"),
    ],
)
def test_mismatched_ids_are_refused(tmp_path: Path, ids: list[str], message: str) -> None:
    path = _write(tmp_path, "npz", ids, X_ND)
    with pytest.raises(ValueError, match=message) as caught:
        embeddings.load_aligned(path, IDS)
    assert "\n" not in str(caught.value)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no embedding at"):
        embeddings.load(tmp_path / "absent.npz")
    np.save(tmp_path / "lone.npy", X_ND)
    with pytest.raises(FileNotFoundError, match=r"write them to lone\.ids\.txt"):
        embeddings.load(tmp_path / "lone.npy")
    (tmp_path / "e.csv").write_text("id\n")
    with pytest.raises(ValueError, match=r"use one of \.npy, \.npz, \.parquet"):
        embeddings.load(tmp_path / "e.csv")
    np.savez(tmp_path / "half.npz", embedding=X_ND)
    with pytest.raises(ValueError, match="must hold 'ids' and 'embedding'"):
        embeddings.load(tmp_path / "half.npz")
    pd.DataFrame({"d0": [1.0], "d1": [2.0]}).to_parquet(tmp_path / "noid.parquet")
    with pytest.raises(ValueError, match="must hold 'id'"):
        embeddings.load(tmp_path / "noid.parquet")
    broken = np.where(X_ND == 3, np.nan, X_ND)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 rows"):
        embeddings.load(_write(tmp_path, "npz", IDS, broken))
    with pytest.raises(ValueError, match=r"float64\[6\]; it must be a numeric matrix"):
        embeddings.load(_write(tmp_path, "npy", IDS, X_ND.ravel()))
