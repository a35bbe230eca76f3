"""The ledger: `{storage}/{sweep}/{VERSION}/{cell.key}/` holds everything known of a finished cell.

`cell.json` (identity, fingerprint, commit, package versions, hardware, and the size and SHA-256 of every other file),
`rows.parquet` (tidy rows) and the sweep's own files; on object stores they lie in the folder of the attempt that the
marker names. A cell is done if and only if its folder is published. `_failed/` holds the last error of cells that
failed, `_work/` the checkpoints of unfinished ones, `_claims/` the leases, `_index/` what saves reading one file per
cell (see `index`), `_codecs/` the stand-in codecs that its cells were coded with, `_id.json` the ledger's name, by
which it is known wherever it is moved.

A cell whose files differ from what cell.json and the marker record is damaged: readers name it and its file, a launch
counts it as failed, and `--retry-failed` sets it aside and computes it again.
"""

from __future__ import annotations

import functools
import io
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from sweeps.core.cells import Cell, PublishedCell, Row, UserError
from sweeps.core.names import checked
from sweeps.ledger.index import Index, Record, rows_table, work_of
from sweeps.ledger.published import DamagedCell, damaged, facts, file_of, in_order, parquet_bytes
from sweeps.ledger.storage import MARKER, Facts, Store, facts_of

_FEW = 64  # cells looked up one by one; for more, one listing takes less time
_HEADS = 1000  # markers looked up one by one after a listing of folders; for more, listing every file is cheaper
_COMPACT = 5000  # cells read before a file of the index is written: what an interruption can cost
_ID = "_id.json"


class Ledger:
    """Finished cells of one (sweep, version) on a storage URI."""

    def __init__(self, storage: str, sweep: str, version: str) -> None:
        self.sweep, self.version = sweep, version
        self.store = Store(f"{storage.rstrip('/')}/{sweep}/{version}")
        self.index = Index(self.store)
        self.damaged: dict[str, DamagedCell] = {}  # cells that were read and found damaged
        self._stamps: dict[str, int] = {}  # of the cells that `done` saw
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:  # another process reads the storage itself
        return Ledger, (self.store.uri.removesuffix(f"/{self.sweep}/{self.version}"), self.sweep, self.version)

    def done(self, keys: Iterable[str] | None = None) -> set[str]:
        """Keys of published cells, or of the published ones among `keys`.

        A few keys are looked up marker by marker; more take one listing, on object stores of the folders alone, and
        then the markers of `keys` (up to _HEADS) and of the folders that the index does not hold. Damaged cells that
        were found so far are left out.
        """
        wanted = None if keys is None else list(dict.fromkeys(keys))
        with self._lock:
            if wanted is None or len(wanted) > _FEW:
                self._stamps = self._scan(wanted or ())
            else:
                for key, stamp in zip(wanted, in_order(self.store.stamp, wanted), strict=True):
                    self._stamps.pop(key, None)
                    if stamp is not None:
                        self._stamps[key] = stamp
            found = set(self._stamps) if wanted is None else {k for k in wanted if k in self._stamps}
            return found - self.damaged.keys()

    def news(self, missing: Iterable[str]) -> set[str]:
        """Keys among `missing` that are published now: one listing of the folders, and the markers of those there."""
        wanted = list(missing)
        with self._lock:
            there = set(self.store.names())
            appeared = [key for key in wanted if key in there]
            stamps = zip(appeared, in_order(self.store.stamp, appeared), strict=True)
            fresh = {key: stamp for key, stamp in stamps if stamp is not None}
            self._stamps.update(fresh)
            return fresh.keys() - self.damaged.keys()

    def _scan(self, wanted: Sequence[str]) -> dict[str, int]:
        """{key: stamp} of all published cells."""
        if self.store.local:
            return self.store.markers()
        # folders first, index second: a folder that is seen was made after any generation that leaves its key out
        folders = [name for name in self.store.names() if name[0] not in "_."]
        self.index.refresh()
        known = self.index.entries.keys() & set(folders)
        if len(wanted) <= _HEADS:  # a folder may have lost its marker to an interrupted removal
            known = known - set(wanted)
        others = [name for name in folders if name not in known]
        if len(others) <= _HEADS:
            marked = [n for n, there in zip(others, in_order(self.store.published, others), strict=True) if there]
        else:
            marked = [n.split("/", 1)[0] for n in self.store.files() if n.endswith(f"/{MARKER}") and n[0] not in "_."]
        return dict.fromkeys([*known, *marked], 0)

    def compact(self, done: Iterable[str], missing: Iterable[str] = ()) -> None:
        """Bring the index up to date, for the driver alone: published cells go in, `missing` ones go out.

        A cell that was removed must be among `missing` here before any launch computes it again.
        """
        with self._lock:
            self.index.refresh()
            gone = set(missing) & self.index.entries.keys()
            while gone and not self.index.keep_only(k for k in self.index.entries if k not in gone):
                gone &= self.index.entries.keys()
            fresh = [key for key in done if not self._indexed(key)]
            for i in range(0, len(fresh), _COMPACT):
                records = in_order(self._record, fresh[i : i + _COMPACT])
                if found := [r for r in records if r is not None]:
                    self.index.add(found)

    def _indexed(self, key: str) -> bool:
        """Whether the index holds this very publication of the cell."""
        entry = self.index.entries.get(key)
        return entry is not None and self._stamps.get(key) == entry.stamp

    def _record(self, key: str) -> Record | None:
        """What the index keeps of a cell; None where it is gone, or damaged (noted in `damaged`)."""
        try:
            stamp = self.store.stamp(key) if self.store.local else 0
            home, meta = self._meta(key)
            rows = self._checked_file(key, home, facts(meta).get("rows.parquet"), "rows.parquet")
            table = rows_table(rows)
        except FileNotFoundError:
            if self.store.published(key):
                self.damaged[key] = damaged(key, self.store.uri, "cell.json", "is missing")
            return None
        except DamagedCell as damage:
            self.damaged[key] = damage
            return None
        return None if stamp is None else Record(key, meta, _names(meta), table, stamp)

    def _meta(self, key: str) -> tuple[str, dict[str, Any]]:
        """(folder of the cell's files, cell.json); raises FileNotFoundError, DamagedCell."""
        home, meta, _ = self._opened(key)
        return home, meta

    def _opened(self, key: str) -> tuple[str, dict[str, Any], str | None]:
        """`_meta`, and the text of cell.json where the marker carries it."""
        marker = self._marker(key)
        attempt = marker.get("attempt", "")
        if not isinstance(attempt, str):
            raise damaged(key, self.store.uri, MARKER, f"names no attempt ({attempt!r})")
        home = f"{key}/{checked(attempt, key)}" if attempt else key
        text = _text_in(marker)
        meta = _json_object(self.store.read(f"{home}/cell.json") if text is None else text.encode())
        if meta is None or not isinstance(meta.get("files"), dict) or not isinstance(meta.get("identity"), dict):
            raise damaged(key, self.store.uri, "cell.json", "is no JSON object with identity and files")
        for name in meta["files"]:
            checked(name, f"cell {key} of {self.store.uri}")
        return home, meta, text

    def _marker(self, key: str) -> dict[str, Any]:
        """The contents of the cell's marker; raises FileNotFoundError, DamagedCell."""
        try:
            return self.store.marker(key)
        except ValueError as error:
            raise damaged(key, self.store.uri, MARKER, "is no JSON object") from error

    def _checked_file(self, key: str, home: str, known: Facts | None, name: str) -> bytes:
        return self.store.read_sound(f"{home}/{name}", known, lambda fault: damaged(key, self.store.uri, name, fault))

    def publish(
        self, cell: Cell, rows: Sequence[Row], files: Mapping[str, bytes | Path], meta: Mapping[str, Any]
    ) -> bool:
        """Publish a finished cell; False when it was published before (the first result stays)."""

        def describe(found: Mapping[str, Facts], attempt: str) -> dict[str, bytes]:
            record = {
                "key": cell.key,
                "sweep": self.sweep,
                "version": self.version,
                "attempt": attempt,
                "identity": cell.identity(),
                "published_unix": time.time(),
                "files": {name: asdict(known) for name, known in found.items()},
                **meta,
            }
            return {"cell.json": json.dumps(record, indent=1).encode()}

        fresh = self.store.publish_folder(cell.key, {"rows.parquet": rows_to_parquet(rows), **files}, describe)
        self.store.remove_file(f"_failed/{cell.key}.json")
        return fresh

    def read(self, key: str) -> PublishedCell:
        """A published cell; raises FileNotFoundError where there is none, DamagedCell (one line) where it is one."""
        home, meta = self._meta(key)
        data = self._checked_file(key, home, facts(meta).get("rows.parquet"), "rows.parquet")
        try:
            rows = pd.read_parquet(io.BytesIO(data))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(key, self.store.uri, "rows.parquet", f"is no table ({error})") from error
        return PublishedCell(key, meta["identity"], rows, _names(meta), f"{self.store.uri}/{home}", meta)

    def check(self, keys: Iterable[str]) -> None:
        """Read every file of published cells and compare it with cell.json; notes what is `damaged`."""

        def look(key: str) -> None:
            try:
                home, meta, text = self._opened(key)
                known = facts(meta) | ({} if text is None else {"cell.json": facts_of(text.encode())})
                for name in _names(meta):
                    self._checked_file(key, home, known.get(name), name)
            except FileNotFoundError:
                self.damaged[key] = damaged(key, self.store.uri, "cell.json", "is missing")
            except DamagedCell as damage:
                self.damaged[key] = damage

        list(in_order(look, keys))

    def sound(self, keys: Iterable[str]) -> list[PublishedCell]:
        """`read_many` of the cells whose rows can be read; the others are noted in `damaged`."""
        wanted = list(keys)

        def look(key: str) -> None:
            try:
                self.read(key)
            except DamagedCell as damage:
                self.damaged[key] = damage

        try:
            return self.read_many(wanted)
        except DamagedCell:
            list(in_order(look, wanted))
        return self.read_many(key for key in wanted if key not in self.damaged)

    def read_many(self, keys: Iterable[str]) -> list[PublishedCell]:
        """Published cells in the order of `keys`: from the index, or by a pool of threads where it lacks them."""
        wanted = list(keys)
        found: dict[str, PublishedCell] = {}
        if len(wanted) > _FEW:
            self.done(wanted)
            with self._lock:
                self.index.refresh()
                found = self.index.read(k for k in wanted if self._indexed(k))
        missing = [k for k in wanted if k not in found]
        found.update(zip(missing, in_order(self.read, missing), strict=True))
        return [found[k] for k in wanted]

    def stream(self, keys: Iterable[str]) -> Iterator[PublishedCell]:
        """Published cells one after another: those of the index, file by file, then the others in the order of `keys`.

        Keys that are not published are passed over, as are cells that turn out `damaged`. Few cells are in memory at
        once, whatever the ledger's size.
        """
        wanted, indexed = self._published(keys)
        seen = set()
        for cell in self.index.stream(indexed):
            seen.add(cell.key)
            yield cell
        yield from self._alone(key for key in wanted if key not in seen)

    def stream_rows(self, keys: Iterable[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
        """(key, rows) of the cells that `stream` gives, in its order: several times faster where rows are enough."""
        wanted, indexed = self._published(keys)
        seen = set()
        for key, rows in self.index.rows(indexed):
            seen.add(key)
            yield key, rows
        for cell in self._alone(key for key in wanted if key not in seen):
            yield cell.key, pa.RecordBatch.from_pandas(cell.rows, preserve_index=False)

    def _published(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """(the published ones of these, each once, those of them in the index)."""
        wanted = list(dict.fromkeys(keys))
        there = self.done(wanted)
        wanted = [key for key in wanted if key in there]
        with self._lock:
            self.index.refresh()
            return wanted, [key for key in wanted if self._indexed(key)]

    def _alone(self, keys: Iterable[str]) -> Iterator[PublishedCell]:
        """The cells that can be read, each from its own folder; those that turn out `damaged` are passed over."""

        def look(key: str) -> PublishedCell | None:
            try:
                return self.read(key)
            except FileNotFoundError:
                return None
            except DamagedCell as damage:
                self.damaged[key] = damage
                return None

        yield from (cell for cell in in_order(look, keys) if cell is not None)

    def work(self, keys: Iterable[str]) -> list[tuple[str, float, float, str]]:
        """(pack attempt, seconds, share, device) of published cells, see `index.Entry`."""
        wanted = list(keys)
        with self._lock:
            self.index.refresh()
            known = [self.index.entries[k] for k in wanted if self._indexed(k)]
            others = [k for k in wanted if not self._indexed(k)]
        found = [work_of(meta) for _, meta in in_order(self._meta, others)]
        names = ("pack", "seconds", "share", "device")
        return [*((e.pack, e.seconds, e.share, e.device) for e in known), *(tuple(w[n] for n in names) for w in found)]

    def file(self, key: str, name: str) -> bytes:
        """Bytes of one file of a published cell; raises FileNotFoundError, DamagedCell."""
        return file_of(self.read(key), name)

    def identifier(self) -> str:
        """The ledger's name: made once, the same wherever the ledger is moved or mounted."""
        return str(self._id["ledger"])

    @property
    def had_no_name(self) -> bool:
        """Whether the ledger held cells before it got its name: MLflow may know them by their address alone."""
        return bool(self._id["had_cells"])

    @functools.cached_property
    def _id(self) -> dict[str, Any]:
        if (made := self.store.read_json(_ID)) is None:
            self.store.create(_ID, json.dumps({"ledger": uuid.uuid4().hex, "had_cells": bool(self.done())}).encode())
            made = self.store.read_json(_ID)
        if not isinstance(made, dict) or not {"ledger", "had_cells"} <= made.keys():
            raise UserError(
                f"{self.store.uri}/{_ID} is not what a launch writes; remove it, and the next one does again"
            )
        return made

    def verify(self, cells: Mapping[str, str]) -> None:
        """Compare recorded fingerprints with {key: fingerprint of the code and data at hand}.

        Raises UserError at the first cell that was computed from something else.
        """
        with self._lock:
            self.index.refresh()
            known = {k: self.index.entries[k].fingerprint for k in cells if self._indexed(k)}
        others = [k for k in cells if k not in known]
        metas = in_order(self._meta, others)
        known.update((k, str(meta.get("fingerprint"))) for k, (_, meta) in zip(others, metas, strict=True))
        for key, expected in cells.items():
            recorded = known[key]
            if recorded != expected:
                raise UserError(
                    f"cell {key} in {self.store.uri} has fingerprint {recorded[:12]} but this code and data give "
                    f"{expected[:12]}; its data, weights or code differ. Use another --storage, or move that "
                    "cell's folder away to recompute it"
                )

    def failures(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """{key: record} of the cells among `keys` whose last attempt failed for good, or which are damaged."""
        wanted = set(keys)
        broken = {key: {"error": str(fault)} for key, fault in self.damaged.items() if key in wanted}
        names = [n for n in self.store.names("_failed") if n.removesuffix(".json") in wanted]
        records = in_order(lambda n: self.store.read_json(f"_failed/{n}") or {}, names)
        return {n.removesuffix(".json"): record for n, record in zip(names, records, strict=True)} | broken

    def record_failure(self, cell: Cell, error: str, attempts: int) -> None:
        """Record that a cell failed for good, with one line of reason."""
        record = {"identity": cell.identity(), "error": error, "attempts": attempts, "unix": time.time()}
        self.store.replace(f"_failed/{cell.key}.json", json.dumps(record, indent=1).encode())

    def forget_failures(self, keys: Iterable[str]) -> None:
        """Let failed cells run again, and set damaged ones aside."""
        wanted = list(keys)
        list(in_order(lambda key: self.store.remove_file(f"_failed/{key}.json"), wanted))
        gone = [key for key in wanted if key in self.damaged]
        list(in_order(self.store.set_aside, gone))
        for key in gone:
            del self.damaged[key]
        self.compact((), gone)


def _names(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of all files of a cell but its marker, sorted."""
    return tuple(sorted(["cell.json", *meta["files"]]))


def _text_in(marker: Mapping[str, Any]) -> str | None:
    """The text of cell.json that a marker carries; None in markers of older programs."""
    last = marker.get("last")
    text = last.get("cell.json") if isinstance(last, dict) else None
    return text if isinstance(text, str) else None


def _json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that the bytes spell, None where they spell something else."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def rows_to_parquet(rows: Sequence[Row]) -> bytes:
    """The tidy table as it is stored: metric, value, unit and one column per parameter."""
    names = sorted({name for row in rows for name in row.params})
    frame = pd.DataFrame(
        {
            "metric": [r.metric for r in rows],
            "value": [float(r.value) for r in rows],
            "unit": [r.unit for r in rows],
            **{name: [r.params.get(name) for r in rows] for name in names},
        }
    )
    return parquet_bytes(frame)
