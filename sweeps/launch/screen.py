"""The screen: one live table on a terminal, one plain line a minute elsewhere, and lines that outlive their reader."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sweeps.core.units import duration, quantity
from sweeps.launch.lines import Screen, interactive, plain, silence, wrapped

REDRAW_SECONDS = 1.0  # between two drawings of the table
LOG_SECONDS = 60.0  # between two lines where there is no terminal
_ROWS = 12  # packs that the table shows at most
_LEAST_SECONDS = 15.0  # of a phase, before its rate says when it ends
_LEAST_STEPS = 3  # reports of progress in that time
_LEAST_PACKS = 2  # that have ended, before the rate of cells says anything of those that wait
_NAME, _PHASE = 12, 16  # columns that a pack's name and phase get at least
_GAP = 2
_LEAVE_OUT = ("tokens/s", "done", "best", "ETA", "cells")  # columns that a narrow screen loses, in this order


def shorten(text: str, width: int) -> str:
    """A name in at most `width` columns, its middle left out: what tells names apart stands at both ends."""
    if cell_len(text) <= width:
        return text
    if width < 3:
        return set_cell_size(text, max(0, width))
    tail = ""
    while tail != text and cell_len(text[-len(tail) - 1 :]) <= (width - 1) // 2:
        tail = text[-len(tail) - 1 :]
    return f"{set_cell_size(text, width - 1 - cell_len(tail)).rstrip()}…{tail}"


def head_of(text: str, width: int) -> str:
    """The beginning of a text, in at most `width` columns."""
    if cell_len(text) <= width:
        return text
    return f"{set_cell_size(text, width - 1).rstrip()}…" if width > 1 else ""


@dataclass
class Pace:
    """How fast a pack goes in its present phase, from what it reports."""

    kind: str | None = None
    began: float = 0.0
    first: float = 0.0
    done: float = -1.0
    total: float = 0.0
    steps: int = 0

    def note(self, now: float, state: Mapping[str, Any]) -> None:
        """What a pack reported; a new phase, or less than was done before (the next cell), begins anew."""
        done, total = float(state.get("done") or 0.0), float(state.get("total") or 0.0)
        if not total:
            return
        # a pack without a rate counts whole cells, and its phase names the cell
        kind = re.sub(r"[\d.]+", "#", str(state.get("phase", ""))) if state.get("rate") else ""
        if kind != self.kind or done < self.done:
            self.kind, self.began, self.first, self.steps = kind, now, done, 0
        elif done > self.done:
            self.steps += 1
        self.done, self.total = done, total

    def seconds(self, now: float, cells_after: int = 0) -> float:
        """Seconds left, with those of `cells_after` cells like this one; NaN until the phase's rate means something."""
        since = now - self.began
        if self.steps < _LEAST_STEPS or since < _LEAST_SECONDS or self.done >= self.total:
            return math.nan
        return (self.total * (1 + cells_after) - self.done) * since / (self.done - self.first)


@dataclass
class _Pack:
    """What is known of one pack. `cells`: how many it has, 0 where nobody said."""

    state: dict[str, Any] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    cells: int = 0
    ended: bool = False

    @property
    def published(self) -> int:
        return int(self.state.get("published", 0))

    @property
    def failed(self) -> int:
        return int(self.state.get("failed", 0))

    def left(self, now: float) -> float:
        """Seconds until it ends; NaN where it cannot be said."""
        after = self.cells - self.published - self.failed - 1 if "cell" in self.state else 0
        return self.pace.seconds(now, max(0, after))

    def row(self, name: str, now: float) -> dict[str, str]:
        """Its texts by column; an empty one where there is nothing to say."""
        state, total = self.state, self.state.get("total")
        left = self.left(now)
        return {
            "pack": name,
            "cells": f"{self.published}/{self.cells}" if self.cells else str(self.published),
            "done": f"{quantity(state.get('done', 0))}/{quantity(total)}" if total else "",
            "tokens/s": quantity(state["rate"]) if state.get("rate") and not self.ended else "",
            "ETA": "" if self.ended or math.isnan(left) else duration(left),
            "best": f"{state['best']:.3f}" if "best" in state else "",
            "phase": "ended" if self.ended else str(state.get("phase", "")),
        }


class Board:
    """Progress of all packs of a launch. `update` takes what `PackContext.progress` reports.

    Nothing is drawn before `open`. A stream that is gone (a closed terminal, a pipe whose reader ended) ends the
    drawing, never the launch.
    """

    def __init__(
        self,
        title: str,
        cells: int,
        best_name: str,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.cells, self.best_name = title, cells, best_name
        self.console = console or Screen()
        self._clock = clock
        self._packs: dict[str, _Pack] = {}
        self._base, self._base_failed, self._at_start, self._ended = 0, 0, 0, 0
        self._started = clock()
        self._drawn = -math.inf
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._gone = False
        self._over = threading.Event()
        self._beat: threading.Thread | None = None

    def open(self) -> None:
        """Begin to draw, by a thread of its own: a pack may report nothing for minutes."""
        self._at_start = self._base
        if interactive(self.console.file):
            self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            self._guarded(self._live.start)
        self._beat = threading.Thread(target=self._work, name="screen", daemon=True)
        self._beat.start()

    def _work(self) -> None:
        while not self._over.wait(REDRAW_SECONDS):
            self.tick()

    def tick(self) -> None:
        """Draw, if it is time to."""
        with self._lock:
            now = self._clock()
            if now - self._drawn < (REDRAW_SECONDS if self._live else LOG_SECONDS):
                return
            self._drawn = now
            self._guarded(self._draw)

    def _draw(self) -> None:
        if self._live:
            self._live.update(self._picture(), refresh=True)
        else:
            self._print(self.line())

    def _guarded(self, draw: Callable[[], object]) -> None:
        """Draw, unless the stream is gone; what else keeps it from being written to may be over at the next drawing."""
        if self._gone:
            return
        try:
            draw()
        except (BrokenPipeError, ValueError):
            self._gone = True
            live, self._live = self._live, None
            if live:
                with contextlib.suppress(OSError, ValueError):
                    live.stop()
            silence(self.console.file)
        except OSError:
            return

    def _print(self, line: str) -> None:
        text = "\n".join(wrapped(plain(line), self.console.width)) if self._live else plain(line)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print one line above the table."""
        with self._lock:
            self._guarded(lambda: self._print(line))

    def already(self, cells: int, failed: int = 0) -> None:
        """Cells that were done before what runs now, and cells that failed."""
        with self._lock:
            self._base, self._base_failed = cells, failed

    def update(self, pack: str, state: Mapping[str, Any], cells: int = 0) -> None:
        """New state of one pack, which has so many cells."""
        with self._lock:
            known = self._packs.setdefault(pack, _Pack())
            known.state |= state
            known.cells = cells or known.cells
            known.pace.note(self._clock(), known.state)

    def drop(self, pack: str) -> None:
        """A pack that ended: its cells stay counted."""
        with self._lock:
            if pack in self._packs and not self._packs[pack].ended:
                self._packs[pack].ended = True
                self._ended += 1

    def forget(self) -> None:
        """A round is over: its packs leave the table, their cells stay counted until `already` says it anew."""
        with self._lock:
            self._base, self._base_failed = self.published(), self.failed()
            self._packs.clear()

    def published(self) -> int:
        """Cells done so far, those of earlier launches included."""
        return self._base + sum(pack.published for pack in self._packs.values())

    def failed(self) -> int:
        """Cells that failed for good."""
        return self._base_failed + sum(pack.failed for pack in self._packs.values())

    def _running(self) -> dict[str, _Pack]:
        return {name: pack for name, pack in self._packs.items() if not pack.ended}

    def rate(self) -> float:
        """Tokens a second over all running packs."""
        return sum(float(pack.state.get("rate") or 0.0) for pack in self._running().values())

    def best(self) -> float:
        """The best headline number seen; NaN where there is none."""
        return max((float(p.state["best"]) for p in self._packs.values() if "best" in p.state), default=math.nan)

    def left(self) -> float:
        """Seconds until all cells are done; NaN while that cannot be said.

        Where no cell waits, until the last running pack ends; else by the rate of this launch's cells, once several
        packs have ended.
        """
        now, running = self._clock(), list(self._running().values())
        missing = self.cells - self.published() - self.failed()
        if missing <= 0:
            return math.nan
        if running and all(pack.cells for pack in running) and sum(p.cells - p.published for p in running) >= missing:
            return max((pack.left(now) for pack in running), key=lambda s: math.inf if math.isnan(s) else s)
        here = self.published() - self._at_start
        if self._ended < _LEAST_PACKS or here <= 0:
            return math.nan
        return missing * (now - self._started) / here

    def _parts(self) -> list[str]:
        """What the heading says, the most important first."""
        parts = [f"{self.title} {self.published()}/{self.cells} cells"]
        if not self._packs and not self._ended:
            parts.append("starting")
        if failed := self.failed():
            parts.append(f"{failed} failed")
        if not math.isnan(left := self.left()):
            parts.append(f"ETA {duration(left)}")
        parts.append(f"elapsed {duration(self._clock() - self._started)}")
        if self.rate():
            parts.append(f"{quantity(self.rate())} tokens/s")
        if not math.isnan(best := self.best()):
            parts.append(f"best {self.best_name} {best:.3f}")
        return parts

    def line(self) -> str:
        """The state as one line."""
        with self._lock:
            phases = [f"{name}: {p.state['phase']}" for name, p in self._running().items() if p.state.get("phase")]
            return " · ".join([*self._parts(), *(["; ".join(phases[:2])] if phases else [])])

    def _picture(self) -> Group:
        """The table, in lines of at most the screen's columns."""
        with self._lock:
            width = self.console.width
            parts = self._parts()
            while len(parts) > 1 and cell_len(" · ".join(parts)) > width:
                parts.pop()
            heading = Text(head_of(" · ".join(parts), width), style="bold")
            running = self._running()
            rows = max(1, min(_ROWS, self.console.height - 4))
            ended = [(name, pack) for name, pack in self._packs.items() if pack.ended]
            room = max(0, rows - len(running))
            shown = [*(ended[-room:] if room else []), *list(running.items())[:rows]]
            now = self._clock()
            lines = columns([pack.row(name, now) for name, pack in shown], width, self.best_name)
            if len(running) > rows:
                lines.append(head_of(f"and {len(running) - rows} more packs", width))
            return Group(heading, *(Text(plain(line), no_wrap=True, overflow="crop") for line in lines))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._over.set()
        if self._beat:
            self._beat.join()
        with self._lock:
            self._guarded(self._draw)
            if self._live:
                self._guarded(self._live.stop)
                self._live = None


def columns(rows: Sequence[Mapping[str, str]], width: int, best_name: str) -> list[str]:
    """Rows of texts as lines of at most `width` columns, a heading first; nothing for no rows.

    Columns without any text are left out, then those of `_LEAVE_OUT` that do not fit; names are shortened in the
    middle, phases cut to their head.
    """
    if not rows:
        return []
    heads = {name: f"best {best_name}" if name == "best" else name for name in rows[0]}
    need = {name: max(cell_len(head), *(cell_len(row[name]) for row in rows)) for name, head in heads.items()}
    need["ETA"] = max(need["ETA"], len("00:00:00"))
    need["pack"] = min(need["pack"], max(_NAME, width // 3))
    kept = {"ETA": "done"}  # a column that comes and goes would shift the others
    shown = [name for name in heads if any(row[name] or row[kept.get(name, name)] for row in rows)]
    least = {**need, "pack": min(need["pack"], _NAME), "phase": min(need["phase"], _PHASE)}
    for name in _LEAVE_OUT:
        if sum(least[n] + _GAP for n in shown) - _GAP <= width:
            break
        shown = [n for n in shown if n != name]
    free = width - (sum(least[n] + _GAP for n in shown) - _GAP)
    wide = dict(least)
    for name in ("pack", "phase"):
        if name in shown:
            wide[name] = max(1, min(need[name], least[name] + free))
            free -= wide[name] - least[name]
    cut = {"pack": shorten, "phase": head_of}

    def line(texts: Mapping[str, str]) -> str:
        cells = [set_cell_size(cut.get(n, head_of)(texts[n], wide[n]), wide[n]) for n in shown]
        return (" " * _GAP).join(cells).rstrip()

    return [head_of(text, width) for text in (line(heads), *map(line, rows))]
