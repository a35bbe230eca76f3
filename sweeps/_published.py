"""What published cells hold: their files, their tables as they are written and read, what they were computed with."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pandas as pd

from sweeps._storage import Store
from sweeps._sweep import PublishedCell


def file_of(cell: PublishedCell, name: str) -> bytes:
    """Bytes of one of the cell's files."""
    return Store(cell.uri).read(name)


def table_of(cell: PublishedCell, name: str) -> pd.DataFrame:
    """One of the cell's Parquet files."""
    return pd.read_parquet(io.BytesIO(file_of(cell, name)))


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as a Parquet file, without its index."""
    sink = io.BytesIO()
    table.to_parquet(sink, index=False)
    return sink.getvalue()


def recorded(cells: Iterable[PublishedCell], name: str) -> str:
    """What the cells' records say under `name` ("hardware", "git_commit"), each answer once."""
    return ", ".join(sorted({str(c.meta.get(name)) for c in cells}))
