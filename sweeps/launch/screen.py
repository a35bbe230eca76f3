"""The screen: one live table on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

PLAIN_SECONDS = 5.0


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`; `?` for a time that is not known."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def quantity(x: float) -> str:
    """A number with three digits and a metric prefix."""
    if x != x:
        return "?"
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{suffix}"
    return f"{x:.3g}"


class Board:
    """Progress of all packs of a launch. `update` takes what `PackContext.progress` reports."""

    def __init__(self, title: str, cells: int, best_name: str) -> None:
        self.title, self.cells, self.best_name = title, cells, best_name
        self.console = Console(highlight=False)
        self._packs: dict[str, dict[str, Any]] = {}
        self._base = 0
        self._started = time.monotonic()
        self._said = 0.0
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(self._table(), console=self.console, refresh_per_second=2, transient=False)
            self._live.start()

    def say(self, line: str) -> None:
        """Print one line above the table."""
        self.console.print(line, markup=False, soft_wrap=True)

    def already(self, cells: int) -> None:
        """Cells that were done before this launch."""
        self._base = cells

    def update(self, pack: str, state: dict[str, Any]) -> None:
        """New state of one pack."""
        self._packs[pack] = {**self._packs.get(pack, {}), **state, "seen": time.monotonic()}
        if self._live:
            self._live.update(self._table())
        elif time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            self.say(self.line())

    def drop(self, pack: str) -> None:
        """A pack that ended: its cells stay counted."""
        if pack in self._packs:
            self._packs[pack]["ended"] = True

    def forget(self) -> None:
        """A round is over: its cells are counted by `already` from now on."""
        self._packs.clear()

    def published(self) -> int:
        """Cells done so far, those of earlier launches included."""
        return self._base + sum(int(p.get("published", 0)) for p in self._packs.values())

    def _running(self) -> list[dict[str, Any]]:
        return [p for p in self._packs.values() if not p.get("ended")]

    def rate(self) -> float:
        """Tokens a second over all running packs."""
        return sum(float(p.get("rate") or 0.0) for p in self._running())

    def eta(self) -> float:
        """Seconds until the slowest running pack is done, among those that can say."""
        return max((float(p["eta"]) for p in self._running() if "eta" in p), default=float("nan"))

    def best(self) -> float:
        """The best headline number seen."""
        return max((float(p["best"]) for p in self._packs.values() if "best" in p), default=float("nan"))

    def line(self) -> str:
        """The state as one line."""
        best = self.best()
        text = f"{self.title}: cells {self.published()}/{self.cells}"
        if self.rate():
            text += f" · {quantity(self.rate())} tokens/s"
        text += f" · ETA {duration(self.eta())} · elapsed {duration(time.monotonic() - self._started)}"
        if best == best:
            text += f" · best {self.best_name} {best:.3f}"
        phases = [f"{name}: {p['phase']}" for name, p in self._packs.items() if p.get("phase") and not p.get("ended")]
        return f"{text} · {'; '.join(phases[:2])}" if phases else text

    def _table(self) -> Table:
        table = Table(title=self.line() if self._packs else f"{self.title}: starting", title_justify="left")
        for column in ("pack", "cells", "tokens", "tokens/s", "ETA", f"best {self.best_name}", "phase"):
            table.add_column(column)
        for name, p in list(self._packs.items())[-12:]:
            total = p.get("total")
            table.add_row(
                name,
                str(p.get("published", 0)),
                f"{quantity(p.get('done', 0))}/{quantity(total)}" if total else "",
                quantity(p["rate"]) if p.get("rate") else "",
                "done" if p.get("ended") else duration(float(p.get("eta", float("nan")))),
                f"{p['best']:.3f}" if "best" in p else "",
                str(p.get("phase", "")),
            )
        return table

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live:
            self._live.update(self._table())
            self._live.stop()
        else:
            self.say(self.line())
        sys.stdout.flush()
