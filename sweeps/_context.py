"""What a running pack may do: publish cells, keep checkpoints of unfinished work, tell how far it is."""

from __future__ import annotations

import json
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from sweeps._ledger import Ledger
from sweeps._stop import PackStopped, StopFlag, terminated
from sweeps._storage import Facts, Store, facts_of
from sweeps._sweep import Cell, Row
from sweeps._where import RunSettings, hardware, provenance
from sweeps._world import World

PROGRESS_SECONDS = 1.0
_KINDS = ("latest", "best")


class WorkStore:
    """Checkpoints of unfinished work under `_work/` of the ledger: for each name the latest and, if asked, the best.

    A checkpoint is a torch file with a name of its own; the pointer of its kind (a small JSON, replaced last) names the
    file, its size and SHA-256, and the fingerprint of the code and data that it was made with. A crash or a full disk
    at any moment leaves the old pointer and the old file, and so does another process that writes the same name.
    Loading is weights-only: no pickled code is ever run. State passes through one file, never a second copy in memory:
    what `load` gives is mapped from the file, and takes memory as it is copied to where it is used.

    `origin` is that fingerprint where a name does not follow from it already. A checkpoint of another origin is not
    continued, one that was made with another number of `threads` is, and `say` hears of both. `reached` hears of each
    step that is further than the checkpoint before it.
    """

    def __init__(
        self,
        store: Store,
        say: Callable[[str], None] = lambda line: None,
        threads: int = 0,
        reached: Callable[[str], None] = lambda place: None,
    ) -> None:
        self.store, self._say, self._threads, self._reached = store, say, threads, reached

    def save(self, name: str, step: int, state: Mapping[str, Any], kind: str = "latest", origin: str = "") -> None:
        """Keep `state` (tensors, numbers, texts, nested dicts and lists) as the one checkpoint of its kind of `name`.

        Raises OSError where it cannot be written; the checkpoint before it stays.
        """
        import torch  # here: the driver knows this module too, and starts two seconds sooner without it

        old = self._pointer(name, kind)
        file = f"{kind}-{step:012d}-{uuid.uuid4().hex[:12]}.pt"
        with self.store.aside(f"_work/{name}/{file}") as made:
            with open(made, "wb") as out:
                tape = _Tape(out)
                try:
                    torch.save(dict(state), cast("IO[bytes]", tape))
                except Exception:
                    if tape.error is not None:
                        raise tape.error from None
                    raise
            known = facts_of(made)
            self.store.replace(f"_work/{name}/{file}", made)
        pointer = {"file": file, "step": step, "bytes": known.size, "sha256": known.sha256}
        pointer |= {"origin": origin, "threads": self._threads}
        self.store.replace(f"_work/{name}/{kind}.json", json.dumps(pointer).encode())
        if old and old["file"] not in self._named(name):
            self.store.remove_file(f"_work/{name}/{old['file']}")
        if kind == "latest" and step > (old["step"] if old else 0):
            self._reached(f"{name} {step}")

    def _pointer(self, name: str, kind: str) -> dict[str, Any] | None:
        return self.store.read_json(f"_work/{name}/{kind}.json")

    def _named(self, name: str) -> set[str]:
        """Files that the pointers of a name lead to now."""
        found = (self._pointer(name, kind) for kind in _KINDS)
        return {str(pointer["file"]) for pointer in found if pointer}

    def step(self, name: str, kind: str = "latest") -> int:
        """Step of the checkpoint of a kind, 0 where there is none."""
        pointer = self._pointer(name, kind)
        return int(pointer["step"]) if pointer else 0

    def load(self, name: str, kind: str = "latest", origin: str | None = None) -> dict[str, Any] | None:
        """The whole checkpoint of a kind of `name`, or None; one that is damaged, missing or of another origin (where
        one is given) counts as none, and `say` hears which.
        """
        import torch

        pointer = self._pointer(name, kind)
        if pointer is None:
            return None
        if origin is not None and pointer.get("origin", "") != origin:
            self._say(f"checkpoint of {name} at step {pointer['step']} was made with other code or data: starting anew")
            return None
        if (before := pointer.get("threads", self._threads)) != self._threads:
            self._say(
                f"step {pointer['step']} of {name} was reached with {before} threads, now there are {self._threads}; "
                f"the numbers change by rounding (--set threads={before} keeps them)"
            )
        place = f"_work/{name}/{pointer['file']}"
        try:
            with self.store.fetched(place) as file:
                if not _as_saved(file, pointer):
                    self._say(f"checkpoint of {name} at step {pointer['step']} is damaged: starting anew")
                    return None
                return torch.load(file, weights_only=True, mmap=True)
        except FileNotFoundError:
            self._say(f"checkpoint of {name} at step {pointer['step']} is missing: starting anew")
            return None

    def drop(self, name: str) -> None:
        """Forget the checkpoints of finished work."""
        self.store.remove(f"_work/{name}")


class _Tape:
    """A file for torch that keeps the OSError of a write (a full disk), which torch turns into a RuntimeError."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._out.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._out.flush()


def _as_saved(file: Path, pointer: Mapping[str, Any]) -> bool:
    """Whether the file is the one that the pointer tells of; pointers had no digest once."""
    if "sha256" not in pointer:
        return file.stat().st_size == pointer["bytes"]
    return facts_of(file) == Facts(pointer["bytes"], pointer["sha256"])


class PackContext:
    """Handed to `Sweep.run`: the ledger to publish to, the share of the machine to use, and the progress line.

    threads: CPU threads this process may use. device: "cuda" or "cpu". share: GPUs that the pack holds, or the part of
    the machine's cores where it holds none; it is what the pack's seconds cost. world: the processes that share the
    pack's work; the first of them publishes and reports.
    """

    def __init__(
        self,
        ledger: Ledger,
        run: RunSettings,
        *,
        threads: int,
        device: str,
        fingerprint: Callable[[Cell], str],
        report: Callable[[dict[str, Any]], None] | None = None,
        launch_id: str = "",
        pack: str = "",
        share: float = 1.0,
    ) -> None:
        self.ledger, self.run = ledger, run
        self.threads, self.device = threads, device
        self.work = WorkStore(ledger.store, self.note, threads, self._reach)
        self.world = World()
        self._fingerprint = fingerprint
        self._report = report
        self._launch_id = launch_id
        self._flag = StopFlag(ledger.store, [launch_id] if launch_id else [])
        self._state: dict[str, Any] = {"published": 0, "failed": 0}
        self._said = 0.0
        self._started = time.time()
        self._meta = {**provenance(), "hardware": hardware(), "node": platform.node()}
        self._meta |= {"threads": threads, "device": device}
        self._meta |= {"lm_path": run.lm_path, "stream_path": run.stream_path, "hub_commits": list(run.hub_commits)}
        self._meta |= {"pack": pack, "pack_share": share, "pack_started_unix": self._started}

    def for_worker(self, world: World, threads: int, report: Callable[[dict[str, Any]], None]) -> PackContext:
        """The same in another process, one of those that share the pack's work."""
        there = PackContext(
            self.ledger,
            self.run,
            threads=threads,
            device=self.device,
            fingerprint=self._fingerprint,
            report=report if world.first else None,
            launch_id=self._launch_id,
        )
        pack = {name: self._meta[name] for name in ("pack", "pack_share", "pack_started_unix")}
        there.world, there._started = world, self._started
        there._state = {name: value for name, value in self._state.items() if name != "reached"}
        there._meta |= {**pack, "processes": world.size}
        there._flag = StopFlag(self.ledger.store, [self._launch_id, self.stop_name])
        return there

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_report": None, "_flag": None}

    def close(self) -> None:
        """End what watches for the pack's stop; to be called when the pack's work is over."""
        self._flag.close()

    def fingerprint(self, cell: Cell) -> str:
        """Digest of all that decides a cell's numbers, as the launch computed it."""
        return self._fingerprint(cell)

    @property
    def published(self) -> int:
        """Cells of the pack that are published."""
        return int(self._state["published"])

    @property
    def stop_name(self) -> str:
        """Name of the flag that stops this pack alone."""
        return f"{self._launch_id}-{self._meta['pack']}"

    def stopping(self) -> bool:
        """Whether the work should save what it has and raise PackStopped at the next safe point."""
        return terminated() or self._flag.raised()

    def check_stop(self) -> None:
        """A safe point where nothing needs saving: raises PackStopped if the work should stop."""
        if self.stopping():
            raise PackStopped("stopped between two cells")

    def note(self, line: str) -> None:
        """Print one line on the launch's screen."""
        self._state["notes"] = [*self._state.get("notes", []), line]
        self.progress(force=True)

    def publish(self, cell: Cell, rows: Sequence[Row], files: Mapping[str, bytes | Path] | None = None) -> bool:
        """Publish a finished cell; False when another launch was first (its result stays)."""
        meta = {
            **self._meta,
            "fingerprint": self._fingerprint(cell),
            "launch": self._launch_id,
            "pack_seconds": time.time() - self._started,
        }
        fresh = self.ledger.publish(cell, rows, files or {}, meta)
        self._state["published"] += 1
        self.progress(force=True, keys=[*self._state.get("keys", []), cell.key], reached=cell.key)
        return fresh

    def _reach(self, place: str) -> None:
        """Tell how far the work is for good: an end of this process from now on is none without progress."""
        self.progress(force=True, reached=place)

    def fail(self, cell: Cell, error: str) -> None:
        """Give up one cell for a reason that a retry cannot change; the pack goes on with the others."""
        self.ledger.record_failure(cell, error, attempts=1)
        self._state["failed"] += 1
        self.progress(force=True)

    def progress(self, *, force: bool = False, **state: Any) -> None:
        """Update the progress line: done, total (tokens), rate (tokens/s), best (headline number), phase (text).

        `keys` are cells published since the last report, `reached` names the last of them or the last checkpoint.
        """
        self._state |= state
        now = time.monotonic()
        if self._report is None or (not force and now - self._said < PROGRESS_SECONDS):
            return
        self._said = now
        self._report(dict(self._state))
        for name in ("keys", "notes"):
            self._state.pop(name, None)
