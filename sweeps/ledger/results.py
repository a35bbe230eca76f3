"""Results as data: what a ledger's published cells measured, as pandas tables.

    from sweeps.ledger.results import open_results, results

    table = results("runs/ledger", sweep="proxy_gap")            # one row per number, with its cell's fields
    found = open_results("runs/ledger", sweep="proxy_gap")       # reads the list of cells and nothing else
    found.cells()                                                # one row per cell, as in a report's cells.parquet
    for part in found.parts(metrics=["ce_rec"]): ...             # the same numbers, a thousand cells at a time

Nothing is written, so a ledger that others are writing to, or that is read-only, is read like any other: the cells that
were published when it was opened are what is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pandas as pd

from sweeps.core.cells import PublishedCell, UserError, nearest
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.logins import given
from sweeps.ledger.published import tables_of
from sweeps.ledger.storage import Store, normal_storage

KEY = "cell_key"
_CELLS = 1000  # in a part


def results(
    storage: str,
    sweep: str,
    *,
    version: str = "",
    metrics: Collection[str] = (),
    where: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """All numbers of a sweep's published cells: see `open_results` and `Results.rows`."""
    return open_results(storage, sweep, version=version).rows(metrics=metrics, where=where)


def open_results(storage: str, sweep: str, *, version: str = "") -> Results:
    """The published cells of a sweep in a ledger, of which nothing but the list is read.

    Args:
        storage: the ledger as `--storage` takes it: a folder, `s3://…` or another address that fsspec knows.
        sweep: the sweep's name, `proxy_gap`.
        version: of the sweep's cells; needed only where the ledger holds cells of several.
    Raises:
        UserError: no such sweep or version is there, or none of its cells is published.
        OSError: the storage does not answer.
    """
    storage = given(storage, "storage")
    if not storage.startswith("memory:"):
        storage = normal_storage(storage)
    ledger = Ledger(storage, sweep, version or _only_version(storage, sweep))
    keys = sorted(ledger.done())
    if not keys:
        there = _folders(storage, sweep)
        held = f"; it holds versions {', '.join(there)}" if version and there and version not in there else ""
        raise UserError(f"no cell of {sweep} version {ledger.version} is published in {storage}{held}; run the sweep")
    return Results(ledger, keys)


def _folders(storage: str, *inside: str) -> list[str]:
    names = Store("/".join([storage.rstrip("/"), *inside])).names()
    return [name for name in names if name[0] not in "_."]


def _only_version(storage: str, sweep: str) -> str:
    """The version of the sweep's cells, where the ledger holds one; raises UserError otherwise."""
    versions = _folders(storage, sweep)
    if len(versions) == 1:
        return versions[0]
    if versions:
        raise UserError(
            f"{storage} holds versions {', '.join(versions)} of {sweep}, which no table can compare; choose one with "
            f'version="{versions[-1]}"'
        )
    sweeps = _folders(storage)
    there = f"{nearest(sweep, sweeps)}; it holds {', '.join(sweeps)}" if sweeps else "; it is empty or not there"
    raise UserError(f"{storage} holds no cell of {sweep}{there}")


class Results:
    """The cells of a sweep that were published when this was made, sorted by key; tables are read when asked for.

    A cell whose files are not those published is left out, warned of and noted in `damaged` ({key: reason}).
    """

    def __init__(self, ledger: Ledger, keys: list[str]) -> None:
        self.ledger, self.keys = ledger, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"{len(self)} cells of {self.ledger.sweep} version {self.ledger.version} in {self.ledger.store.uri}"

    @property
    def damaged(self) -> dict[str, str]:
        """{key: reason} of the cells that were read and found damaged so far."""
        return {key: str(error) for key, error in self.ledger.damaged.items()}

    def stream(self, where: Mapping[str, Any] | None = None) -> Iterator[PublishedCell]:
        """The cells one by one, in the order in which they are stored; few are in memory at once.

        where: {field: value, or a list of values} that a cell must have. Raises UserError for a field that no cell has.
        """
        wanted = {name: _values(value) for name, value in (where or {}).items()}
        before, fields = set(self.damaged), set[str]()
        for cell in self.ledger.stream(self.keys):
            fields |= cell.identity.keys()
            if all(name in cell.identity and cell.identity[name] in values for name, values in wanted.items()):
                yield cell
        for key in sorted(self.damaged.keys() - before):
            warnings.warn(f"left out: {self.damaged[key]}", stacklevel=2)
        for name in wanted.keys() - fields if fields else ():
            raise UserError(
                f"where={name!r} is not a field of {self.ledger.sweep}{nearest(name, fields)}; fields: "
                f"{', '.join(sorted(fields))}"
            )

    def parts(
        self, *, metrics: Collection[str] = (), where: Mapping[str, Any] | None = None, size: int = _CELLS
    ) -> Iterator[pd.DataFrame]:
        """The numbers of `size` cells at a time, for ledgers that do not fit in memory; columns as in `rows`."""
        cells = self.stream(where)
        while part := list(islice(cells, size)):
            yield _with_fields([_chosen(cell.rows, metrics) for cell in part], part)

    def rows(self, *, metrics: Collection[str] = (), where: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One row per number: `cell_key`, the cell's fields, metric, value, unit, and a column per parameter.

        A parameter that has the name of a field is the column `row_NAME`. metrics: only these; all without. where: see
        `stream`. Sorted by key; the rows of a cell are in the order in which it published them.
        """
        parts = list(self.parts(metrics=metrics, where=where))
        return _sorted(pd.concat(parts, ignore_index=True)) if parts else pd.DataFrame(columns=[KEY, "metric", "value"])

    def cells(self, where: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One row per cell: `cell_key`, its fields, and a column per number that was measured of it as a whole."""
        records = [{KEY: cell.key, **cell.identity, **cell.numbers()} for cell in self.stream(where)]
        return _sorted(pd.DataFrame(records)) if records else pd.DataFrame(columns=[KEY])

    def tables(self, name: str, where: Mapping[str, Any] | None = None) -> Iterator[pd.DataFrame]:
        """A Parquet file of each cell that has it ("sequences.parquet"), with the cell's key and fields.

        Raises UserError where no cell has it.
        """
        known: set[str] = set()
        found = 0
        cells = self.stream(where)
        while part := list(islice(cells, _CELLS)):
            known |= {file for cell in part for file in cell.files}
            holders = [cell for cell in part if name in cell.files]
            found += len(holders)
            for cell, table in zip(holders, tables_of(holders, name), strict=True):
                yield _with_fields([table], [cell])
        if not found:
            raise UserError(f"no cell has a file {name!r}{nearest(name, known)}; files: {', '.join(sorted(known))}")


def _values(value: Any) -> Collection[Any]:
    return value if isinstance(value, list | tuple | set | frozenset) else [value]


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(KEY, kind="stable", ignore_index=True)


def _chosen(rows: pd.DataFrame, metrics: Collection[str]) -> pd.DataFrame:
    return rows[rows["metric"].isin(list(metrics))] if metrics else rows


def _with_fields(tables: Sequence[pd.DataFrame], cells: Sequence[PublishedCell]) -> pd.DataFrame:
    """The tables of some cells as one, each row with its cell's key and fields before its own columns."""
    lengths = [len(table) for table in tables]
    fields = pd.DataFrame([{KEY: cell.key, **cell.identity} for cell in cells])
    own = pd.concat(tables, ignore_index=True)
    own = own.rename(columns={name: f"row_{name}" for name in own.columns if name in fields.columns})
    head = fields.loc[fields.index.repeat(lengths)].reset_index(drop=True)
    return pd.concat([head, own], axis=1)
