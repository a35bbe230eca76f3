"""Copy the ledger to MLflow: one parent run per launch and exactly one run per cell, whatever restarts happen.

The ledger is the record and MLflow a copy of it. A thread makes the run of each cell that is begun, follows it
(`live.Live`), and fills it once the cell is published. Nothing waits for that thread while packs run, so a tracking
server that is slow or down costs nothing but the copy: the next launch copies what is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tenacity

from sweeps.core.cells import Cell, UserError, digest
from sweeps.launch.cell_runs import CellRuns, Run
from sweeps.launch.first_view import SUMMARY, View, runs_address, share
from sweeps.launch.live import CURVE_SECONDS
from sweeps.launch.mlflow_store import (
    GRID,
    LAUNCH,
    PATIENCE,
    TAG_LENGTH,
    alone,
    pages,
    quiet_mlflow,
    quoted,
    sqlite_file,
)
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.logins import http_login, with_login, without_password

_POLL_SECONDS = 0.5  # between looks for newly published cells
_FOLLOW_SHARE = 0.01  # of a core goes to runs of cells that are computed, however many there are
_FOLLOW_PAUSE = 60.0  # at most, however long the first listing of a large ledger took
_SHORT_PATIENCE = 5.0  # seconds for a SQLite file that stayed locked before
_FINISH_TRIES = 4  # of a store that answered before: SQLite may be locked by another launch
_WAIT_SECONDS = 60.0  # for cells that another launch is copying
_CHUNK = 256  # cells claimed and copied at once: few requests per cell, and other launches get a share
_SINGLE_LOOKUPS = 20  # cells looked up one by one; more are found by one listing
_WRITERS = 8  # threads that copy to a server, since each waits for its answers; SQLite allows one writer
_SAY_SECONDS = 15.0  # between lines of progress while `finish` copies
_COMPARE_RUNS = 100  # the compare page slows beyond this
_NO_NAME = re.compile(r"[^\w\-. :/]")  # characters that no name of a metric or tag may have
_BUSY = re.compile(r"database is locked|database table is locked")  # SQLite, while another launch writes
# answers that would be the same next time: no permission, the schema of another MLflow
_FINAL = re.compile(r"error code 40[0134]|PERMISSION_DENIED|UNAUTHENTICATED|out-of-date database schema")


class Refused(Exception):
    """MLflow refuses, and asking again changes nothing; the text gives the remedy."""


@dataclass(frozen=True)
class Plan:
    """What a launch is about. cells: those it may compute, by key. grid: the keys of the whole grid they belong to.

    view: how MLflow shows it, by the name `title`.
    """

    cells: Mapping[str, Cell] = field(default_factory=dict)
    grid: Sequence[str] = ()
    view: View = field(default_factory=View)
    title: str = "grid"

    @property
    def grid_name(self) -> str:
        """The same for the same grid, whoever launches it; empty without cells."""
        return digest(sorted(self.grid))[:8] if self.grid else ""


class Tracker(CellRuns):
    """Copies the cells of one ledger into one MLflow experiment; `say` prints a line for the user.

    Raises UserError for a ledger that MLflow's searches cannot name, and nothing after construction: an unreachable
    server is reported once and tried again by `finish` and later launches.
    """

    def __init__(
        self,
        uri: str,
        ledger: Ledger,
        claims: Claims,
        *,
        artifact_mb: float,
        say: Callable[[str], None],
        named: Sequence[str] = (),
        tracked: Sequence[str] = (),
    ) -> None:
        quoted(ledger.store.uri)
        super().__init__(uri, ledger, claims, artifact_mb=artifact_mb, named=named, tracked=tracked)
        self.say = say
        self._plan = Plan()
        self._parent_params: dict[str, Any] = {}
        self._parent_tags: dict[str, str] = {}
        self._wanted: dict[str, None] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._left = threading.Event()  # set by `leave`
        self._thread: threading.Thread | None = None
        self._shared_view = ""
        self._down = False
        self._refused = False
        self._ended = False  # `finish` or `leave` was called
        self._left_out: set[str] = set()  # damaged cells
        self._follow_at = 0.0
        self._load: _DriverLoad | None = None
        self._description = ""

    def start(self, parent_params: Mapping[str, Any], tags: Mapping[str, str], plan: Plan = Plan()) -> None:
        """Open the launch's parent run in a thread that then follows cells and copies whatever `want` names."""
        self._parent_params, self._parent_tags, self._plan = dict(parent_params), dict(tags), plan
        self._cells, self._grid = plan.cells, plan.grid_name
        self.live.plan(plan.cells)
        self._many = int(parent_params.get("cells", 0)) > _SINGLE_LOOKUPS
        with contextlib.suppress(ImportError):  # MLflow imports it in the thread; Matplotlib fails on one half loaded
            importlib.import_module("IPython")
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def want(self, keys: Iterable[str]) -> None:
        """Add published cells to those that are copied."""
        keys = list(keys)
        self.live.forget(keys)
        with self._lock:
            self._wanted.update(dict.fromkeys(k for k in keys if k not in self._finished))

    def describe(self, lines: Sequence[str]) -> None:
        """The answer in words, which `finish` makes the description of the launch's run."""
        self._description = without_password("\n".join(lines))

    def finish(self, status: str, metrics: Mapping[str, float], files: Sequence[Path], timeout: float = 600.0) -> bool:
        """Copy what is left, close the parent run with its summary and report files; False if MLflow is unreachable."""
        self._stop.set()
        self._ended = True
        if self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():  # copying here as well would make two runs of the cells it is at
                self._unreachable(TimeoutError(f"a copy did not end within {timeout:.0f} s"))
                return False
        if self._refused:
            return False
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._worth_another_try),
            stop=tenacity.stop_after_attempt(_FINISH_TRIES),
            wait=tenacity.wait_random_exponential(multiplier=1, max=10),
            reraise=True,
        )
        try:
            again(self._finish_once, status, metrics, files)
        except Exception as error:
            self._unreachable(error)
            return False
        finally:
            self._say_dropped()
        return not self._wanted

    def _say_dropped(self) -> None:
        if self.live.dropped:
            self.say(
                f"MLflow at {self.uri} was too slow or down: {self.live.dropped} points of curves (live/…) were "
                "dropped; the cells' own numbers are complete"
            )

    def _worth_another_try(self, error: BaseException) -> bool:
        """Whether a store that answered before may answer again: not a file, unless another launch is writing to it."""
        if isinstance(error, Refused) or _FINAL.search(str(error)) or not isinstance(error, Exception):
            return False
        if sqlite_file(self.uri) is not None or self.uri.startswith("file:") or "://" not in self.uri:
            return bool(_BUSY.search(str(error))) and not self._down  # else it was waited for already
        return bool(self._parent)

    def _finish_once(self, status: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        self._open()
        end = time.monotonic() + _WAIT_SECONDS
        said, total = time.monotonic(), len(self._wanted)
        while self._wanted and time.monotonic() < end:
            if self._drain():
                end = time.monotonic() + _WAIT_SECONDS
            else:  # another live launch is copying these
                time.sleep(_POLL_SECONDS)
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                self.say(
                    f"MLflow: {total - len(self._wanted)} of {total} cells copied; the next launch copies the rest"
                )
        self._end_lost()
        self._end_parent(status, metrics, files)

    def _end_parent(self, status: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        now = int(time.time() * 1000)
        numbers, tags = _summary(files)
        if self._description:
            tags["mlflow.note.content"] = f"```\n{self._description[: TAG_LENGTH - 10]}\n```"
        self._log(self._parent, [(n, v, now, 0) for n, v in {**metrics, **numbers}.items()], (), tags)
        for file in files:
            self._client.log_artifact(self._parent, str(file), "report")
        self._client.set_terminated(self._parent, status)
        self._end_followed()

    def leave(self, status: str, metrics: Mapping[str, float], seconds: float) -> None:
        """Copy nothing more and close the parent run, if that works within `seconds`; the next launch does the rest.

        Does nothing after `finish` or `leave`.
        """
        if self._ended:
            return
        self._ended = True
        self._left.set()
        self._stop.set()
        if self._refused or (self._down and not self._parent):  # no run to close, and none can be made
            return

        def close() -> None:
            if self._thread:
                self._thread.join()
            if self._parent:
                with contextlib.suppress(Exception):
                    self._end_parent(status, metrics, ())

        closing = threading.Thread(target=close, name="mlflow-end", daemon=True)
        closing.start()
        closing.join(seconds)

    def _work(self) -> None:
        while True:
            stopping = self._stop.is_set()
            try:
                self._open()
                self._follow()
                while self._drain() and not self._stop.is_set():
                    self._follow()
            except Exception as error:
                self._unreachable(error)
                if self._refused or self._stop.wait(10.0):  # `finish` asks once more itself
                    return
            if stopping or self._stop.wait(_POLL_SECONDS):
                return

    def _unreachable(self, error: Exception) -> None:
        """Report once what is wrong with the store, and whether repeating the command is the remedy."""
        text = without_password(str(error))  # libraries print the address with its password
        self._refused = self._refused or isinstance(error, Refused) or bool(_FINAL.search(text))
        if not self._down:
            reason = text.splitlines()[0] if text else type(error).__name__
            if isinstance(error, Refused):
                self.say(f"MLflow at {self.uri}: {reason}; results are safe in the ledger")
            elif self._refused:
                self.say(
                    f"MLflow at {self.uri} refuses ({reason[:240]}); results are safe in the ledger and the next "
                    "launch after that is repaired copies them"
                )
            else:
                self.say(
                    f"MLflow at {self.uri} does not answer ({reason[:160]}); results are safe in the ledger "
                    "and the next launch copies them"
                )
        self._down = True

    def _open(self) -> None:
        """Connect, end the runs of dead launches, and find or make this launch's run; nothing where that was done."""
        if self._parent:
            return
        self._experiment = self._connect()
        own = self._end_dead_launches()
        self._kill_deserted()
        self._parent = own or self._make_parent()
        self._load = _DriverLoad()
        with contextlib.suppress(Exception):  # a view is a convenience: the address then carries a search
            plan = self._plan
            self._shared_view = share(self._client, self.uri, self._experiment, plan.view, self._grid, plan.title)
        if self._down:
            self.say(f"MLflow at {self.uri} answers again")
            self._down = False

    def _connect(self) -> str:
        """Make the client and return the id of the experiment, which is made where there is none."""
        quiet_mlflow()
        from mlflow.tracking import MlflowClient

        self._address = with_login(self.uri)
        if login := http_login(self.uri):  # MLflow takes them from here, and no address in an error holds them
            os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = login
            self._address = self.uri
        name, file = f"plumbline/{self.ledger.sweep}", sqlite_file(self.uri)
        with contextlib.nullcontext() if file is None else alone(file, _SHORT_PATIENCE if self._down else PATIENCE):
            self._client = MlflowClient(self._address)
            found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = None if file is None else (file.parent / "mlartifacts").as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except Exception:  # another launch made it in between
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise Refused(
                f"the experiment {name} is in the trash, so nothing is copied; bring it back with `"
                f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)} mlflow experiments restore --experiment-id "
                f"{found.experiment_id}`, and the same command copies the cells"
            )
        return str(found.experiment_id)

    def _end_dead_launches(self) -> str:
        """Mark open runs of launches that died as KILLED; returns this launch's own open run, empty if it has none."""
        own = ""
        here = f"tags.`plumbline.ledger` = {quoted(self.ledger.identifier())} and attributes.status = 'RUNNING'"
        for run in self._search(here):
            launch = run.data.tags[LAUNCH]
            if launch == self.claims.launch_id:
                own = run.info.run_id  # made by a call whose answer was lost
            elif not self.claims.alive(launch):
                self._client.set_terminated(run.info.run_id, "KILLED")
        return own

    def _make_parent(self) -> str:
        """Id of a new run for this launch."""
        launch = self.claims.launch_id
        tags = {
            "plumbline.kind": "launch",
            LAUNCH: launch,
            "plumbline.ledger": self.ledger.identifier(),
            GRID: self._grid,
            **self._parent_tags,
            **{f"setting.{name}": str(value)[:TAG_LENGTH] for name, value in self._parent_params.items()},
        }
        made = self._client.create_run(self._experiment, run_name=f"launch {launch}", tags=tags)
        return str(made.info.run_id)

    def _drain(self) -> bool:
        """Copy a chunk of the wanted cells; False where there are none that no other live launch is copying."""
        with self._lock:
            wanted = list(itertools.islice(self._wanted, _CHUNK))
        if not wanted or self._left.is_set():
            return False
        lapses = self.claims.lapses()
        ours = self._claimed(wanted)
        try:
            self._join_grid(key for key in ours if key in self._finished)
            self._copy_all([key for key in ours if key not in self._finished], lapses)
        except BaseException:
            self._listed = False  # a run may have been made whose id did not arrive
            raise
        finally:
            finished = [key for key in wanted if key in self._finished]
            self.claims.done_with(finished, self._group)
            with self._lock:
                for key in wanted:
                    self._wanted.pop(key, None)
                over = self._finished.keys() | self._left_out
                self._wanted.update({key: None for key in wanted if key not in over})
        return bool(finished)

    def _copy_all(self, keys: Sequence[str], lapses: int) -> None:
        pool = ThreadPoolExecutor(_WRITERS if sqlite_file(self.uri) is None else 1)
        try:
            copies = {pool.submit(self._copy, key, self._begun.get(key), lapses): key for key in keys}
            for copy in as_completed(copies):
                try:
                    run = copy.result()
                except UserError as error:  # the cell's fault, not MLflow's: the others go on
                    self._left_out.add(copies[copy])
                    self.say(f"not copied to MLflow: {error}")
                    continue
                if run.id:
                    self._finished[copies[copy]] = run
                    self._followed.pop(copies[copy], None)
                else:
                    self._listed = False
        finally:
            pool.shutdown(cancel_futures=True)

    def _copy(self, key: str, known: Run | None, lapses: int) -> Run:
        """`_fill`, unless the launch is about to end."""
        return Run("") if self._left.is_set() else self._fill(key, known, lapses)

    def _follow(self) -> None:
        """Bring runs up to what was heard of cells that are computed, with at most a hundredth of a core."""
        if time.monotonic() < self._follow_at or self._left.is_set():
            return
        used = time.thread_time()
        try:
            self._still_followed()
            self._begin_all(self.live.begun(_CHUNK))
            self._end_lost()
            self._log_live()
            self._log_load()
        except Exception:
            self._listed = False  # a run may have been made whose id did not arrive
            raise
        finally:
            pause = (time.thread_time() - used) / _FOLLOW_SHARE
            self._follow_at = time.monotonic() + min(pause, _FOLLOW_PAUSE)

    def _begin_all(self, heard: Sequence[str]) -> None:
        keys = [key for key in heard if key not in self._finished]
        if keys:
            lapses = self.claims.lapses()
            if not self._followed:
                self._followed_since = lapses
            for key in self._claimed(keys):
                if key not in self._finished and (run := self._begin(key, lapses)).id:
                    self._followed[key] = run
        self.live.forget(heard)

    def _end_lost(self) -> None:
        """End the runs of cells that were given up."""
        heard = self.live.lost()
        keys = [key for key in heard if key not in self._finished]
        if keys:
            lapses = self.claims.lapses()
            for key in self._claimed(keys):
                if key not in self._finished:
                    self._give_up(key, heard[key], lapses)
                self._followed.pop(key, None)
            self.claims.done_with(keys, self._group)
        self.live.forget(heard)

    def _log_load(self) -> None:
        """What the launch's own machine is busy with, every CURVE_SECONDS, as measured by MLflow's monitors."""
        if self._load is not None and (entries := self._load.due()):
            self._log(self._parent, entries)

    def runs_link(self) -> str:
        """Short address that opens MLflow on the runs of this launch's grid; empty where MLflow was never reached.

        The host is that of `make ui` where the store is a file.
        """
        if not self._experiment:
            return ""
        if self._grid:
            return runs_address(pages(self.uri), self._experiment, self._grid, self._shared_view)
        search = quote(f"tags.`{LAUNCH}` = {quoted(self.claims.launch_id)}", safe="")
        return f"{pages(self.uri)}/#/experiments/{self._experiment}/runs?searchFilter={search}"

    def compare_link(self, keys: Sequence[str]) -> str:
        """Address of MLflow's compare page for the runs of these cells (the first hundred)."""
        runs = [self._finished[k].id for k in keys if k in self._finished][:_COMPARE_RUNS]
        experiments = quote(json.dumps([self._experiment]))
        return f"{pages(self.uri)}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={experiments}"


def _summary(files: Sequence[Path]) -> tuple[dict[str, float], dict[str, str]]:
    """(numbers, words) of the report's file SUMMARY, by names that MLflow takes; empty where there is none."""
    found: dict[str, Any] = {}
    for file in files:
        if file.name == SUMMARY:
            found |= json.loads(file.read_text(encoding="utf-8"))
    named = {_NO_NAME.sub("_", name): value for name, value in found.items()}
    words = {name: value for name, value in named.items() if isinstance(value, str)}
    return {name: float(value) for name, value in named.items() if name not in words}, words


class _DriverLoad:
    """MLflow's monitors of CPU, memory, disk, network and GPUs, without the thread and the client that run them."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no GPU, or no nvidia-ml-py, which asks it
            self._monitors.append(GPUMonitor())
        self._measure()  # the first begins the time that the next is about
        self._began = self._last = time.monotonic()

    def _measure(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return found

    def due(self) -> list[tuple[str, float, int, int]]:
        """(name, value, time in ms, step) entries, the step in seconds; none where the last are too recent."""
        now = time.monotonic()
        if now - self._last < CURVE_SECONDS:
            return []
        self._last = now
        found = self._measure()
        at = int(time.time() * 1000), int(now - self._began)
        return [(f"system/{name}", float(value), *at) for name, value in found.items()]
