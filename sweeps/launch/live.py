"""What is heard of cells while they are computed, on its way from the workers to MLflow.

A worker tells its launch with the progress that it reports anyway; only the launch talks to MLflow. So workers need
neither MLflow's password nor a way to its server, one process decides who makes a cell's run, and a server that is slow
or down is waited for by nobody who computes. Values on the way are worth little once the cell is published, which has
all of them: where they do not fit into the queue they are dropped and counted.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import psutil

CURVE_SECONDS = 10.0  # between two reports of a cell's values
_FIRST_SECONDS = 2.0  # from a cell's start to its first report: what is over sooner needs none
_ROOM = 20_000  # points that wait for MLflow


class Point(NamedTuple):
    """One value of a cell on its way. name: with `live/` or `system/` in front, unlike anything that is published."""

    key: str
    name: str
    value: float
    step: int
    unix_ms: int


class Curves:
    """Thins what a pack measures on the way: of each cell the latest values, at most every CURVE_SECONDS."""

    def __init__(self, load: Callable[[], Mapping[str, float]], clock: Callable[[], float] = time.monotonic) -> None:
        self._load, self._clock = load, clock
        self._due: dict[str, float] = {}
        self._waiting: dict[str, dict[str, tuple[float, int]]] = {}

    def add(self, key: str, step: int, values: Mapping[str, float]) -> list[Point]:
        """Note values of a cell; returns what is to be reported now, mostly nothing.

        Values that are not finite are left out, since MLflow's charts cannot show them.
        """
        now = self._clock()
        waiting = self._waiting.setdefault(key, {})
        for name, value in values.items():
            waiting[name] = value, step
        if now < self._due.setdefault(key, now + _FIRST_SECONDS):
            return []
        self._due[key] = now + CURVE_SECONDS
        latest = {f"live/{name}": value for name, value in self._waiting.pop(key).items()}
        latest |= {f"system/{name}": (value, step) for name, value in self._load().items()}
        at = int(time.time() * 1000)
        return [Point(key, name, float(v), s, at) for name, (v, s) in latest.items() if math.isfinite(v)]

    def drop(self, key: str) -> None:
        """Forget a cell that is published or given up."""
        self._waiting.pop(key, None)
        self._due.pop(key, None)


class Load:
    """What this process and its node use, by MLflow's own names where it has one.

    Measured here and not by MLflow's monitors, whose import takes a worker seconds; the launch's own run has those.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call of each begins the time that the next one is about
        psutil.cpu_percent()

    def __call__(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_cpu_cores": self._process.cpu_percent() / 100,
            "process_memory_megabytes": self._process.memory_info().rss / 1e6,
        }
        return {**found, **self._gpu()} if self._cuda else found

    def _gpu(self) -> dict[str, float]:
        import torch  # the pack runs on a GPU, so it is loaded

        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        name = f"gpu_{torch.cuda.current_device()}"
        found = {f"{name}_memory_usage_megabytes": (total - free) / 1e6}
        try:
            found[f"{name}_utilization_percentage"] = float(torch.cuda.utilization())
        except (ModuleNotFoundError, RuntimeError):  # needs nvidia-ml-py and a driver that answers
            return found
        return found


class Live:
    """What waits for MLflow: cells that were begun or given up, and the points of their curves. Never blocks."""

    def __init__(self, room: int = _ROOM) -> None:
        self._room, self._waiting = room, 0
        self._lock = threading.Lock()
        self._begun: dict[str, None] = {}
        self._points: dict[str, list[Point]] = {}
        self._lost: dict[str, str] = {}
        self._planned: Collection[str] = ()
        self.dropped = 0

    def plan(self, keys: Collection[str]) -> None:
        """The cells that are listened to; a pack may compute others that these need."""
        self._planned = keys

    def hear(self, news: Mapping[str, Any]) -> None:
        """Take in what a pack reported."""
        planned = self._planned
        with self._lock:
            self._begun.update((key, None) for key in news.get("begun", ()) if key in planned)
            self._lost.update((key, line) for key, line in news.get("failures", ()) if key in planned)
            for entry in news.get("points", ()):
                if entry[0] not in planned:
                    continue
                if self._waiting >= self._room:
                    self.dropped += 1
                    continue
                self._points.setdefault(entry[0], []).append(Point(*entry))
                self._waiting += 1

    def forget(self, keys: Iterable[str]) -> None:
        """Cells that need no run of an unfinished cell any more: they are published."""
        with self._lock:
            for key in keys:
                self._begun.pop(key, None)
                self._lost.pop(key, None)

    def begun(self, limit: int) -> list[str]:
        """The first cells that were begun and not yet forgotten."""
        with self._lock:
            return list(self._begun)[:limit]

    def lost(self) -> dict[str, str]:
        """{key: reason} of the cells that were given up."""
        with self._lock:
            return dict(self._lost)

    def points_of(self, keys: Iterable[str]) -> dict[str, list[Point]]:
        """Take out the points of these cells: {key: points}, without cells that have none."""
        with self._lock:
            taken = {key: self._points.pop(key) for key in keys if key in self._points}
            self._waiting -= sum(map(len, taken.values()))
            return taken
