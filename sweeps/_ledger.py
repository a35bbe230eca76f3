"""The ledger: `{storage}/{sweep}/{VERSION}/{cell.key}/` holds everything known of a finished cell.

`cell.json` (identity, fingerprint, commit, package versions, hardware), `rows.parquet` (tidy rows) and the
sweep's own files. A cell is done if and only if its folder is published. `_failed/` holds the last error of cells
that failed, `_work/` the checkpoints of unfinished ones, `_claims/` the leases.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from sweeps._storage import MARKER, Store
from sweeps._sweep import Cell, PublishedCell, Row, UserError

_READERS = 16


class Ledger:
    """Finished cells of one (sweep, version) on a storage URI."""

    def __init__(self, storage: str, sweep: str, version: str) -> None:
        self.sweep, self.version = sweep, version
        self.store = Store(f"{storage.rstrip('/')}/{sweep}/{version}")

    def done(self, keys: Iterable[str] | None = None) -> set[str]:
        """Keys of published cells, or of the published ones among `keys`: one listing, never a call a cell."""
        if self.store.local:
            root = Path(self.store.root)
            found = {p.parent.name for p in root.glob(f"[!._]*/{MARKER}")} if root.is_dir() else set()
        else:
            found = {
                name.split("/", 1)[0] for name in self.store.files() if name.endswith(f"/{MARKER}") and name[0] != "_"
            }
        return found if keys is None else found & set(keys)

    def publish(
        self, cell: Cell, rows: Sequence[Row], files: Mapping[str, bytes | Path], meta: Mapping[str, Any]
    ) -> bool:
        """Publish a finished cell; False when it was published before (the first result stays)."""
        contents: dict[str, bytes | Path] = {
            "cell.json": json.dumps(
                {
                    "key": cell.key,
                    "sweep": self.sweep,
                    "version": self.version,
                    "identity": cell.identity(),
                    "published_unix": time.time(),
                    **meta,
                },
                indent=1,
            ).encode(),
            "rows.parquet": _rows_to_parquet(rows),
            **files,
        }
        fresh = self.store.publish_folder(cell.key, contents)
        self.store.remove(f"_failed/{cell.key}.json")
        return fresh

    def read(self, key: str) -> PublishedCell:
        """A published cell; raises FileNotFoundError."""
        meta = json.loads(self.store.read(f"{key}/cell.json"))
        rows = pd.read_parquet(io.BytesIO(self.store.read(f"{key}/rows.parquet")))
        names = tuple(n for n in self.store.files(key) if n != MARKER)
        return PublishedCell(key, meta["identity"], rows, names, f"{self.store.uri}/{key}", meta)

    def read_many(self, keys: Iterable[str]) -> list[PublishedCell]:
        """Published cells in the order of `keys`, read by a pool of threads."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read, keys))

    def file(self, key: str, name: str) -> bytes:
        """Bytes of one file of a published cell."""
        return self.store.read(f"{key}/{name}")

    def verify(self, cells: Mapping[str, str]) -> None:
        """Compare recorded fingerprints with {key: fingerprint of the code and data at hand}.

        Raises UserError at the first cell that was computed from something else.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            metas = pool.map(lambda k: self.store.read_json(f"{k}/cell.json"), cells)
        for (key, expected), meta in zip(cells.items(), metas, strict=True):
            recorded = (meta or {}).get("fingerprint")
            if recorded != expected:
                raise UserError(
                    f"cell {key} in {self.store.uri} has fingerprint {str(recorded)[:12]} but this code and data give "
                    f"{expected[:12]}; its data, weights or code differ. Use another --storage, or move that "
                    "cell's folder away to recompute it"
                )

    def failures(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """{key: record} of the cells among `keys` whose last attempt failed for good."""
        wanted = set(keys)
        names = [n for n in self.store.names("_failed") if n.removesuffix(".json") in wanted]
        return {n.removesuffix(".json"): self.store.read_json(f"_failed/{n}") or {} for n in names}

    def record_failure(self, cell: Cell, error: str, attempts: int) -> None:
        """Note that a cell failed for good, with the line that says why."""
        record = {"identity": cell.identity(), "error": error, "attempts": attempts, "unix": time.time()}
        self.store.replace(f"_failed/{cell.key}.json", json.dumps(record, indent=1).encode())

    def forget_failures(self, keys: Iterable[str]) -> None:
        """Let failed cells run again."""
        for key in keys:
            self.store.remove(f"_failed/{key}.json")


def _rows_to_parquet(rows: Sequence[Row]) -> bytes:
    names = sorted({name for row in rows for name in row.params})
    frame = pd.DataFrame(
        {
            "metric": [r.metric for r in rows],
            "value": [float(r.value) for r in rows],
            "unit": [r.unit for r in rows],
            **{name: [r.params.get(name) for r in rows] for name in names},
        }
    )
    out = io.BytesIO()
    frame.to_parquet(out, index=False)
    return out.getvalue()
