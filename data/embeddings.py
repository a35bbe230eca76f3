"""Embeddings made elsewhere, read from .npy, .npz or .parquet and put in the order of a table by row id.

Row ids are the table's SMILES strings, or its 0-based source rows. Where each format keeps them:

- `.npy`: a matrix [N, D], with its ids in `NAME.ids.txt` next to it, one per line;
- `.npz`: arrays `ids` [N] and `embedding` [N, D];
- `.parquet`: a column `id`; the other columns are the dimensions, or one column `embedding` holds lists.

Shapes: N rows, D dimensions (`x_ND`).
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data._content import file_sha256
from data._text import decode_text, lines


def load(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Ids (as strings) and matrix float64 [N, D] of an embedding file, in the file's order.

    Raises:
        FileNotFoundError: no file, or no ids beside a `.npy`.
        ValueError: another format, a missing array or column, not a finite N × D matrix, or ids that do not fit it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no embedding at {path}; pass an existing .npy, .npz or .parquet")
    readers = {".npy": _npy, ".npz": _npz, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path.name} is {path.suffix or 'without suffix'}; use one of {', '.join(readers)}")
    try:
        ids, values = readers[path.suffix](path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError) as error:
        if getattr(error, "errno", None) is not None or str(error).startswith(path.name):
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise ValueError(f"{path.name} cannot be read ({reason}); write the file again") from error
    x_ND = np.asarray(values)
    if x_ND.ndim != 2 or not np.issubdtype(x_ND.dtype, np.number):
        raise ValueError(f"{path.name} holds {x_ND.dtype}{list(x_ND.shape)}; it must be a numeric matrix [N, D]")
    x_ND = x_ND.astype(np.float64)
    if len(ids) != len(x_ND):
        raise ValueError(f"{path.name} has {len(ids)} ids for {len(x_ND)} rows; give one id per row")
    if not np.isfinite(x_ND).all():
        bad = int((~np.isfinite(x_ND)).any(axis=1).sum())
        raise ValueError(f"{path.name} has NaN or infinity in {bad} of {len(x_ND)} rows; leave such rows out")
    return ids, x_ND


def align(
    ids: Sequence[str],
    x_ND: np.ndarray,
    table_ids: Sequence[str],
    name: str = "embedding",
    kept_out: Collection[str] = (),
) -> np.ndarray:
    """The rows of `x_ND` in the order of `table_ids`: float64 [N, D]; rows named in `kept_out` are passed over.

    Raises:
        ValueError: repeated ids, ids the table does not have, or table rows without an embedding.
    """
    position = {key: row for row, key in enumerate(ids)}
    if len(position) != len(ids):
        raise ValueError(f"{name}: {len(ids) - len(position)} ids are repeated; give every row its own id")
    missing = [key for key in table_ids if key not in position]
    extra = set(position).difference(table_ids, kept_out)
    if missing or extra:
        example = f"missing {missing[0]!r}" if missing else f"unknown {min(extra)!r}"
        raise ValueError(
            f"{name}: {len(missing)} of {len(table_ids)} table rows have no embedding and {len(extra)} ids are not "
            f"in the table ({example}); the ids must be those of the table, no more and no fewer"
        )
    return x_ND[[position[key] for key in table_ids]]


def load_aligned(
    path: str | Path,
    table_ids: Sequence[str],
    source_rows: Sequence[int] = (),
    kept_out: pd.DataFrame | None = None,
) -> np.ndarray:
    """`load`, then `align` to a table by its ids; a file whose ids are all integers is aligned by source row.

    The file may also hold rows of the source that the table keeps out, listed in `kept_out` (`smiles`, `row`).

    Raises:
        FileNotFoundError, ValueError: see `load` and `align`.
    """
    ids, x_ND = load(path)
    by_row = len(source_rows) > 0 and all(key.isdecimal() for key in ids)
    out = [] if kept_out is None else [str(key) for key in kept_out["row" if by_row else "smiles"]]
    if by_row:
        return align([str(int(key)) for key in ids], x_ND, [str(row) for row in source_rows], Path(path).name, out)
    return align(ids, x_ND, table_ids, Path(path).name, out)


def content_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of the bytes that `load` reads: the file's, followed by those of the ids next to a `.npy`.

    Raises:
        FileNotFoundError: no file, or no ids beside a `.npy`.
    """
    path = Path(path)
    return file_sha256(path, _ids_beside(path)) if path.suffix == ".npy" else file_sha256(path)


def _ids_beside(path: Path) -> Path:
    return path.with_suffix(".ids.txt")


def _npy(path: Path) -> tuple[list[str], np.ndarray]:
    beside = _ids_beside(path)
    if not beside.is_file():
        raise FileNotFoundError(
            f"{path.name} has no row ids; write them to {beside.name} in the same folder, one per line"
        )
    return lines(decode_text(beside.read_bytes()).rstrip("\n")), np.load(path, allow_pickle=False)


def _npz(path: Path) -> tuple[list[str], np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        absent = {"ids", "embedding"}.difference(arrays.files)
        if absent:
            raise ValueError(f"{path.name} has arrays {arrays.files}; it must hold 'ids' and 'embedding'")
        return [str(key) for key in arrays["ids"]], arrays["embedding"]


def _parquet(path: Path) -> tuple[list[str], np.ndarray]:
    frame = pd.read_parquet(path)
    if "id" not in frame.columns or frame.shape[1] < 2:
        shown = ", ".join(map(str, frame.columns[:5]))
        raise ValueError(f"{path.name} has columns {shown}; it must hold 'id' and the embedding's dimensions")
    ids = [str(key) for key in frame["id"]]
    rest = frame.drop(columns="id")
    if list(rest.columns) == ["embedding"]:
        lengths = {len(row) for row in rest["embedding"]}
        if len(lengths) != 1:
            raise ValueError(f"{path.name} has embeddings of lengths {sorted(lengths)[:5]}; all must be equal")
        return ids, np.stack(rest["embedding"].to_list())
    return ids, rest.to_numpy()
