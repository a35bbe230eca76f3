"""The compacted index of a ledger: its published cells in a few Parquet files instead of one file per cell.

The index only saves reading; the folders are the record. A cell is done if and only if its folder is published, and an
entry without a folder is ignored. Any file of the index may be lost, and removing `_index/` costs one slow start.

Files are written once and never changed, so launches need no lock. `_index/G-*.parquet` of the highest generation G
count. Cells are added as further files, and small files are merged into larger ones, at most a logarithm of the number
of cells. After a published folder was removed, the next generation begins with a base file that leaves its entry
out; the base is created by exactly one launch, and a launch that still adds to the old generation adds nothing.
"""

from __future__ import annotations

import io
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sweeps.core.cells import PublishedCell
from sweeps.core.names import checked
from sweeps.ledger.storage import Store

FOLDER = "_index"
_SEGMENT_CELLS = 250_000  # larger files are not merged any more, which bounds the memory of one merge
_BATCH = 4096  # cells that are decoded at once
_INLINE_BYTES = 64 * 1024  # longer rows stay in their folder alone, so that the index stays quick to read
# entries of cell.json that differ from cell to cell; the others are stored once for all cells that share them
_OWN = (
    *("key", "identity", "attempt", "published_unix", "pack_seconds", "pack_started_unix", "pack"),
    *("fingerprint", "files"),
)
# columns that planning reads
_PLANNING = ["key", "fingerprint", "stamp", "pack", "seconds", "share", "device"]
_FAULTS = (
    pa.ArrowInvalid,
    OSError,
)  # of a file that was merged away (FileNotFoundError), is damaged, or unreadable now

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("fingerprint", pa.string()),
        ("stamp", pa.int64()),
        ("pack", pa.string()),
        ("seconds", pa.float64()),
        ("share", pa.float64()),
        ("device", pa.string()),
        ("own", pa.string()),
        ("common", pa.dictionary(pa.int32(), pa.string())),
        ("files", pa.list_(pa.string())),
        ("schema", pa.dictionary(pa.int32(), pa.binary())),
        ("rows", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """What planning needs of a published cell.

    stamp: of its marker (0 on object stores). pack: names one attempt of one pack, the same for all cells it published.
    seconds: from the attempt's start to this cell's publication. share: GPUs held where device is "cuda", else the part
    of a machine's cores.
    """

    fingerprint: str
    stamp: int
    pack: str
    seconds: float
    share: float
    device: str


@dataclass(frozen=True)
class Record:
    """A published cell as read from its folder. rows: the table of `rows.parquet`, None where it is too long."""

    key: str
    meta: Mapping[str, Any]
    files: tuple[str, ...]
    rows: pa.Table | None
    stamp: int


class Index:
    """The index of one ledger as this process knows it; `refresh` brings it up to date."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.generation = 0
        self.entries: dict[str, Entry] = {}
        self._sizes: dict[str, int] = {}  # {file name: cells in it}
        self._place: dict[str, tuple[str, int]] = {}  # {key: (file name, row)}
        self._broken: set[str] = set()

    def refresh(self) -> None:
        """One listing, and one read for each file not seen before."""
        for _ in range(3):
            names = [n for n in self.store.names(FOLDER) if n.endswith(".parquet") and n[:6].isdigit()]
            newest = max((int(n[:6]) for n in names), default=0)
            current = [n for n in names if int(n[:6]) == newest]
            if newest != self.generation or not self._sizes.keys() <= set(current):
                self.generation = newest
                self.entries, self._sizes, self._place = {}, {}, {}
            missing = [n for n in current if n not in self._sizes and n not in self._broken]
            if all([self._load(name) for name in missing]):
                return

    def _load(self, name: str) -> bool:
        """Read a file's entries; False when another launch has merged the file into another one meanwhile."""
        try:
            table = pq.read_table(io.BytesIO(self.store.read(f"{FOLDER}/{name}")), columns=_PLANNING)
        except FileNotFoundError:
            return False
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                return True  # the storage did not answer; the file may be intact, and is read next time
            self._broken.add(name)  # its cells are read from their folders and written to another file
            return True
        columns = [table[column].to_pylist() for column in _PLANNING]
        for row, (key, *values) in enumerate(zip(*columns, strict=True)):
            entry = Entry(*values)
            if entry.stamp >= (self.entries[key].stamp if key in self.entries else -1):
                self.entries[key] = entry
                self._place[key] = (name, row)
        self._sizes[name] = table.num_rows
        return True

    def read(self, keys: Iterable[str]) -> dict[str, PublishedCell]:
        """The cells among `keys` that the index holds with their rows: one read per index file, none per cell."""
        return {cell.key: cell for cell in self.stream(keys)}

    def stream(self, keys: Iterable[str]) -> Iterator[PublishedCell]:
        """`read`, file by file and a batch at a time, so that only one file and one batch are in memory."""
        for batch in self._batches(keys, None):
            yield from _cells(batch, self.store.uri)

    def rows(self, keys: Iterable[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
        """(key, rows) of the same cells, without all else: a tenth of the work."""
        for batch in self._batches(keys, ["key", "schema", "rows"]):
            yield from _rows(batch)

    def _batches(self, keys: Iterable[str], columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        """The index's records of these cells, those columns of them or all."""
        wanted: dict[str, list[int]] = {}
        for key in keys:
            if key in self._place:
                name, row = self._place[key]
                wanted.setdefault(name, []).append(row)
        for name, rows in wanted.items():
            try:
                table = pq.read_table(io.BytesIO(self.store.read(f"{FOLDER}/{name}")), columns=columns)
            except _FAULTS:
                continue
            rows.sort()
            for start in range(0, len(rows), _BATCH):
                yield from table.take(rows[start : start + _BATCH]).to_batches()

    def add(self, records: Sequence[Record]) -> None:
        """Write the records as one file, merged with every file that is at most twice as large."""
        tables = [_table(records)]
        total, merged = len(records), []
        for name, cells in sorted(self._sizes.items(), key=lambda item: item[1]):
            if cells > 2 * total or total + cells > _SEGMENT_CELLS or name.endswith("-base.parquet"):
                break
            try:
                tables.append(pq.read_table(io.BytesIO(self.store.read(f"{FOLDER}/{name}")), schema=_SCHEMA))
            except _FAULTS:
                break
            total += cells
            merged.append(name)
        name = f"{self.generation:06d}-{uuid.uuid4().hex}.parquet"
        self.store.replace(f"{FOLDER}/{name}", _bytes(_first_of_each(pa.concat_tables(tables))))
        for old in [*merged, *self._broken]:
            self.store.remove_file(f"{FOLDER}/{old}")
            self._sizes.pop(old, None)
        self._broken.clear()
        self._load(name)

    def keep_only(self, keys: Iterable[str]) -> bool:
        """Begin a generation that holds these entries alone; False when another launch began it first."""
        places: dict[str, list[int]] = {name: [] for name in self._sizes}
        for key in keys:
            name, row = self._place[key]
            places[name].append(row)
        tables = [_table([])]
        for name, rows in places.items():
            try:
                data = self.store.read(f"{FOLDER}/{name}")
                tables.append(pq.read_table(io.BytesIO(data), schema=_SCHEMA).take(pa.array(sorted(rows), pa.int64())))
            except _FAULTS:
                continue
        base = f"{FOLDER}/{self.generation + 1:06d}-base.parquet"
        made = self.store.create(base, _bytes(pa.concat_tables(tables)))
        if made:
            for name in self.store.names(FOLDER):
                if name[:6].isdigit() and int(name[:6]) <= self.generation:
                    self.store.remove_file(f"{FOLDER}/{name}")
        self.refresh()
        return made


def rows_table(data: bytes) -> pa.Table | None:
    """The table of a `rows.parquet`, None where it is too long for the index."""
    return None if len(data) > _INLINE_BYTES else pq.read_table(io.BytesIO(data))


def work_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Which attempt of which pack made a cell, in how many seconds, holding which share of GPUs or of a machine."""
    return {
        "pack": f"{meta.get('launch', '')}/{meta.get('pack', '')}/{meta.get('pack_started_unix', '')}",
        "seconds": float(meta.get("pack_seconds", math.nan)),
        "share": float(meta.get("pack_share", math.nan)),
        "device": str(meta.get("device", "")),
    }


def _table(records: Sequence[Record]) -> pa.Table:
    columns: dict[str, list[Any]] = {field.name: [] for field in _SCHEMA}
    for r in records:
        columns["key"].append(r.key)
        columns["fingerprint"].append(str(r.meta.get("fingerprint")))
        columns["stamp"].append(r.stamp)
        for name, value in work_of(r.meta).items():
            columns[name].append(value)
        columns["own"].append(json.dumps({k: r.meta[k] for k in _OWN if k in r.meta}))
        columns["common"].append(json.dumps({k: v for k, v in r.meta.items() if k not in _OWN}))
        columns["files"].append(list(r.files))
        columns["schema"].append(None if r.rows is None else r.rows.schema.serialize().to_pybytes())
        columns["rows"].append(None if r.rows is None else _only_batch(r.rows).serialize().to_pybytes())
    return pa.table({name: pa.array(v, type=_SCHEMA.field(name).type) for name, v in columns.items()}, schema=_SCHEMA)


def _only_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _rows(batch: pa.RecordBatch) -> Iterable[tuple[str, pa.RecordBatch]]:
    """(key, rows) of the records that hold rows."""
    schemas: dict[bytes, pa.Schema] = {}
    for key, schema, rows in zip(*(batch[name].to_pylist() for name in ("key", "schema", "rows")), strict=True):
        if rows is None:
            continue
        if schema not in schemas:
            schemas[schema] = pa.ipc.read_schema(pa.py_buffer(schema))
        yield key, pa.ipc.read_record_batch(pa.py_buffer(rows), schemas[schema])


def _cells(batch: pa.RecordBatch, uri: str) -> Iterable[PublishedCell]:
    commons: dict[str, dict[str, Any]] = {}
    known = dict(_rows(batch))
    for record in batch.select(["key", "common", "own", "files"]).to_pylist():
        if record["key"] not in known:
            continue
        if record["common"] not in commons:
            commons[record["common"]] = json.loads(record["common"])
        meta = {**json.loads(record["own"]), **commons[record["common"]]}
        key = record["key"]
        attempt = meta.get("attempt")
        home = f"{uri}/{key}/{checked(attempt, f'cell {key} of {uri}')}" if attempt else f"{uri}/{key}"
        yield PublishedCell(key, meta["identity"], known[key].to_pandas(), tuple(record["files"]), home, meta)


def _first_of_each(table: pa.Table) -> pa.Table:
    """One row per key; where launches added the same cell twice the rows are equal."""
    keys = table["key"].to_pylist()
    rows = list({key: row for row, key in reversed(list(enumerate(keys)))}.values())
    return table if len(rows) == len(keys) else table.take(sorted(rows))


def _bytes(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()
