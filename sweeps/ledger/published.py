"""What published cells hold: their files, their tables as they are written and read, what they were computed with."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pandas as pd

from sweeps.core.cells import PublishedCell, UserError
from sweeps.ledger.storage import Facts, Store

_READERS = 32  # requests under way at once: they mostly wait for the storage
_T = TypeVar("_T")
_R = TypeVar("_R")


def in_order(call: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """`call` of each item, in their order, by a pool of threads that is at most two answers per thread ahead."""
    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[Future[_R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(call, item))
                if len(ahead) >= 2 * _READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


class DamagedCell(UserError):
    """A published cell with a file that is missing or is not what was published."""


def damaged(key: str, ledger: str, name: str, fault: str) -> DamagedCell:
    """The error of a cell in the ledger at this address whose file `name` has a fault, in a few words."""
    return DamagedCell(
        f"cell {key} in {ledger} is damaged: {name} {fault}; --retry-failed sets the cell aside and computes it again"
    )


def facts(meta: Mapping[str, Any]) -> dict[str, Facts]:
    """{name: Facts} of the files that a cell.json describes; cells published before SHA-256 was recorded have none."""
    files = meta.get("files", {})
    return {
        name: Facts(known.get("size", -1), known.get("sha256", ""))
        for name, known in (files.items() if isinstance(files, dict) else ())
        if isinstance(known, dict)
    }


def file_sizes(meta: Mapping[str, Any]) -> dict[str, int]:
    """{name: bytes} of the files that a cell.json describes."""
    return {n: int(known["size"] if isinstance(known, dict) else known) for n, known in meta.get("files", {}).items()}


def file_of(cell: PublishedCell, name: str) -> bytes:
    """Bytes of one of the cell's files; raises FileNotFoundError, DamagedCell where they are not those published."""
    known = facts(cell.meta).get(name)
    if known is None:
        return Store(cell.uri).read(name)
    ledger = cell.uri.split(f"/{cell.key}", 1)[0]
    return Store(cell.uri).read_sound(name, known, lambda fault: damaged(cell.key, ledger, name, fault))


def table_of(cell: PublishedCell, name: str) -> pd.DataFrame:
    """One of the cell's Parquet files."""
    return pd.read_parquet(io.BytesIO(file_of(cell, name)))


def files_of(cells: Iterable[PublishedCell], name: str) -> Iterator[bytes]:
    """Bytes of the file `name` of each cell, in the cells' order, by many requests at once."""
    return in_order(lambda cell: file_of(cell, name), cells)


def tables_of(cells: Iterable[PublishedCell], name: str) -> Iterator[pd.DataFrame]:
    """The Parquet file `name` of each cell, like `files_of`."""
    return in_order(lambda cell: table_of(cell, name), cells)


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as a Parquet file, without its index."""
    sink = io.BytesIO()
    table.to_parquet(sink, index=False)
    return sink.getvalue()


def recorded(cells: Iterable[PublishedCell], name: str) -> str:
    """The distinct values of `name` ("hardware", "git_commit") in the cells' records, sorted."""
    return ", ".join(sorted({str(c.meta.get(name)) for c in cells}))
