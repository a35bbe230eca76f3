"""What a running pack may do: publish cells, keep checkpoints of unfinished work, tell how far it is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.core.cells import Cell, Row
from sweeps.core.machine import hardware, provenance
from sweeps.core.settings import RunSettings
from sweeps.core.world import World
from sweeps.launch.live import Curves, Load
from sweeps.launch.stop import PackStopped, StopFlag, terminated
from sweeps.ledger.checkpoints import WorkStore
from sweeps.ledger.ledger import Ledger

PROGRESS_SECONDS = 1.0
NEWS = ("keys", "notes", "begun", "failures", "points")  # lists in a report, each of what is new since the last


@dataclass(frozen=True)
class Place:
    """Where work belongs: its launch, its pack, and the pack's share.

    share: GPUs that the pack holds, or the part of the machine's cores where it holds none; it is what the pack's
    seconds cost.
    """

    launch_id: str = ""
    pack: str = ""
    share: float = 1.0


class PackContext:
    """Handed to `Sweep.run`: the ledger to publish to, the share of the machine to use, and the progress line.

    threads: CPU threads this process may use. device: "cuda" or "cpu". world: the processes that share the pack's work;
    the first of them publishes and reports.
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
        place: Place = Place(),
    ) -> None:
        self.ledger, self.run = ledger, run
        self.threads, self.device = threads, device
        self.work = WorkStore(ledger.store, self.note, threads, self._reach)
        self.world = World()
        self._fingerprint = fingerprint
        self._report = report
        self._place = place
        self._flag = StopFlag(ledger.store, [place.launch_id] if place.launch_id else [])
        self._state: dict[str, Any] = {"published": 0, "failed": 0}
        self._said = 0.0
        self._curves: Curves | None = None
        self._started = time.time()
        self._meta = {**provenance(), "hardware": hardware(), "node": platform.node()}
        self._meta |= {"threads": threads, "device": device}
        self._meta |= {"lm_path": run.lm_path, "stream_path": run.stream_path, "hub_commits": list(run.hub_commits)}
        self._meta |= {"pack": place.pack, "pack_share": place.share, "pack_started_unix": self._started}

    def for_worker(self, world: World, threads: int, report: Callable[[dict[str, Any]], None]) -> PackContext:
        """The same in another process, one of those that share the pack's work."""
        there = PackContext(
            self.ledger,
            self.run,
            threads=threads,
            device=self.device,
            fingerprint=self._fingerprint,
            report=report if world.first else None,
            place=self._place,
        )
        there.world, there._started = world, self._started
        there._state = {name: value for name, value in self._state.items() if name != "reached"}
        there._meta |= {"pack_started_unix": self._started, "processes": world.size}
        there._flag = StopFlag(self.ledger.store, [self._place.launch_id, self.stop_name])
        return there

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_report": None, "_flag": None, "_curves": None}

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
        return f"{self._place.launch_id}-{self._place.pack}"

    def stopping(self) -> bool:
        """Whether the work should save what it has and raise PackStopped at the next safe point."""
        return terminated() or self._flag.raised()

    def check_stop(self) -> None:
        """A safe point where nothing needs saving: raises PackStopped if the work should stop."""
        if self.stopping():
            raise PackStopped("stopped between two cells")

    def note(self, line: str) -> None:
        """Print one line on the launch's screen."""
        self._news("notes", line)
        self.progress(force=True)

    def _news(self, name: str, *entries: Any) -> None:
        """Add to a list of the next report."""
        self._state[name] = [*self._state.get(name, []), *entries]

    def begin(self, *cells: Cell, **state: Any) -> None:
        """Tell that work on these cells begins, so that MLflow shows them; `state` as for `progress`."""
        self._news("begun", *(cell.key for cell in cells))
        self.progress(force=True, **state)

    def curve(self, cell: Cell, step: int, values: Mapping[str, float]) -> None:
        """Tell values of a cell on its way, for MLflow alone, where they are called `live/NAME`.

        Costs next to nothing and may be called at every step: the latest values are passed on, at most every
        CURVE_SECONDS.
        """
        if self._report is None:
            return
        self._curves = self._curves or Curves(Load(self.device))
        if points := self._curves.add(cell.key, step, values):
            self._news("points", *map(list, points))
            self.progress()

    def publish(self, cell: Cell, rows: Sequence[Row], files: Mapping[str, bytes | Path] | None = None) -> bool:
        """Publish a finished cell; False when another launch was first (its result stays)."""
        meta = {
            **self._meta,
            "fingerprint": self._fingerprint(cell),
            "launch": self._place.launch_id,
            "pack_seconds": time.time() - self._started,
        }
        fresh = self.ledger.publish(cell, rows, files or {}, meta)
        self._state["published"] += 1
        self._news("keys", cell.key)
        self._leave(cell)
        self.progress(force=True, reached=cell.key)
        return fresh

    def _leave(self, cell: Cell) -> None:
        """The cell is published or given up."""
        if self._curves is not None:
            self._curves.drop(cell.key)

    def _reach(self, place: str) -> None:
        """Tell how far the work is for good: an end of this process from now on is none without progress."""
        self.progress(force=True, reached=place)

    def fail(self, cell: Cell, error: str) -> None:
        """Give up one cell for a reason that a retry cannot change; the pack continues with the others."""
        self.ledger.record_failure(cell, error, attempts=1)
        self._state["failed"] += 1
        self._news("failures", [cell.key, error])
        self._leave(cell)
        self.progress(force=True)

    def progress(self, *, force: bool = False, **state: Any) -> None:
        """Update the progress line: done, total (tokens), rate (tokens/s), best (headline number), phase (text).

        `reached` names the last published cell or the last checkpoint.
        """
        self._state |= state
        now = time.monotonic()
        if self._report is None or (not force and now - self._said < PROGRESS_SECONDS):
            return
        self._said = now
        self._report(dict(self._state))
        for name in NEWS:
            self._state.pop(name, None)
