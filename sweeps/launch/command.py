"""The one command line of every sweep: plan → skip what is done → pack → Ray Tune → report.

    python sweeps/NAME.py [--preset P] [--plan [--all]] [--only KEY ...] [--report] [--open] [--retry-failed]
                          [--storage URI] [--tracking-uri URI] [--report-dir DIR] [--address ADDR]
                          [--set field=value ...]
                          [--search KIND --objective COLUMN:min|max --set field=RANGE ...]

Exit codes: 0 when every planned cell is published, 2 for bad arguments, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

from sweeps.core.cells import CellT, Pack, UserError, nearest
from sweeps.core.machine import Machine, check_folder, git_commit, prepare_process
from sweeps.core.settings import RunSettings, add_settings, apply_settings
from sweeps.core.units import duration
from sweeps.launch.address import check as check_address
from sweeps.launch.cost import cost_lines, most_it_costs, open_search
from sweeps.launch.ending import failure_lines, mlflow_lines, next_lines, open_page
from sweeps.launch.failure import SYSTEM_ERROR, one_line
from sweeps.launch.first_view import View
from sweeps.launch.lines import tell
from sweeps.launch.mlflow_store import default_uri, normal_uri, sqlite_file
from sweeps.launch.pack_queue import Queue
from sweeps.launch.plan import PlanText
from sweeps.launch.ray_session import connect, shutdown_ray
from sweeps.launch.report_folder import keep_runs, put_in_place, say_partial, say_runs, say_settings
from sweeps.launch.report_page import write_page
from sweeps.launch.same_code import OTHER_CODE, own_code
from sweeps.launch.screen import Board
from sweeps.launch.stop import Stopper
from sweeps.launch.sweep import PresetT, Sweep
from sweeps.launch.tracking import Plan, Tracker
from sweeps.launch.tune import Job, run_packs
from sweeps.ledger.checkpoints import WorkStore
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.logins import clean_arguments, given, hide_arguments
from sweeps.ledger.storage import normal_storage
from sweeps.search.options import add_search, read_asked
from sweeps.search.search import Search

_WAIT_SECONDS = 4.0  # before the ledger is looked at again for the cells of other launches
_WAIT_SHARE = 20  # ... and at least so many times what the last look took
_INDEX_SECONDS = 30.0
_LEAVE_SECONDS = 5.0  # that a launch which got SIGTERM gives MLflow
_LEFT_OUT = "report       left out, as are the copies in MLflow: the same command makes both, --report the report alone"
_CLOSE_SECONDS = 60.0  # ... and one that an error ended: a new database takes some seconds to make


def parser(sweep: Sweep[Any, Any]) -> argparse.ArgumentParser:
    """The command line of a sweep."""
    p = argparse.ArgumentParser(
        prog=f"python sweeps/{sweep.name}.py",
        description=sweep.question,
        epilog="Running the same command again continues; finished cells are never computed twice. "
        "Exit codes: 0 all planned cells published, 2 bad arguments, 1 otherwise.",
    )
    p.add_argument("--preset", default=sweep.default_preset, metavar="P", help=f"one of {', '.join(sweep.presets)}")
    p.add_argument("--plan", action="store_true", help="print cells, work, memory, time and cost; run nothing")
    p.add_argument("--all", action="store_true", help="with --plan: list every cell of a large grid")
    p.add_argument("--only", nargs="+", default=[], metavar="KEY", help="only cells whose key starts with KEY")
    p.add_argument("--report", action="store_true", help="write the report from what is published; run nothing")
    p.add_argument("--open", action="store_true", help="open the report (report.html) in a browser at the end")
    p.add_argument("--retry-failed", action="store_true", help="run cells again that failed for good")
    storage = os.environ.get("PLUMBLINE_STORAGE") or "runs/ledger"
    p.add_argument("--storage", default=storage, metavar="URI", help="ledger: a path, s3:// or another object store")
    p.add_argument("--tracking-uri", default=None, metavar="URI", help="MLflow; default: SQLite under runs/")
    p.add_argument("--report-dir", default="runs/reports", metavar="DIR", help="reports; default: runs/reports")
    p.add_argument("--address", default=None, metavar="ADDR", help="Ray cluster to join (auto, HOST:PORT)")
    add_settings(p, sweep.options)
    add_search(p)
    return p


def main(sweep: Sweep[CellT, PresetT], argv: Sequence[str] | None = None) -> int:
    """Run the sweep; returns the exit code.

    A script that imports its sweep from this checkout calls `own_code` before it does, so that the launch's digest is
    that of the code it runs, whatever changes on disk meanwhile.
    """
    if argv is None:
        hide_arguments()
    try:
        prepare_process()
    except UserError as error:
        tell([f"{sweep.name}: {one_line(error)}"], error=True)
        return 2
    own_code()
    typed = clean_arguments(sys.argv[1:] if argv is None else argv)
    arguments = parser(sweep).parse_args(typed)
    arguments.typed = typed
    arguments.script = sys.argv[0] if argv is None else f"sweeps/{sweep.name}.py"
    stopper = Stopper()
    stopper.install()
    try:
        return _Launch(sweep, arguments, stopper).go()
    except UserError as error:
        tell([f"{sweep.name}: {one_line(error)}"], error=True)
        return 2
    except OSError as error:
        tell([f"{sweep.name}: {one_line(error)}; what is published stays: run the same command again"], error=True)
        return 1
    except KeyboardInterrupt:
        tell(["", "stopped; run the same command to continue where it was"], error=True)
        return 1


class _Launch(Generic[CellT, PresetT]):
    """One invocation: what was asked, what is planned, what the ledger already holds."""

    def __init__(self, sweep: Sweep[CellT, PresetT], arguments: argparse.Namespace, stopper: Stopper) -> None:
        if arguments.preset not in sweep.presets:
            hint = nearest(arguments.preset, sweep.presets)
            raise UserError(f"preset {arguments.preset!r} is not known{hint}; presets: {', '.join(sweep.presets)}")
        if arguments.plan and arguments.open:
            raise UserError("--open shows a report and --plan writes none; leave one of them out")
        if arguments.all and not arguments.plan:
            raise UserError("--all lists the cells of a plan; give it together with --plan")
        self.sweep, self.arguments, self.stopper = sweep, arguments, stopper
        self.preset: PresetT
        self.run: RunSettings
        settings, asked = read_asked(arguments)
        self.preset, self.run = apply_settings(settings, sweep.presets[arguments.preset], RunSettings())
        arguments.storage = given(arguments.storage, "--storage")
        self.storage = normal_storage(arguments.storage)
        tracking = arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri()
        self.tracking_uri = normal_uri(given(tracking, "--tracking-uri"))
        self.ledger = Ledger(self.storage, sweep.name, sweep.version)
        self.search = open_search(asked, sweep, self.preset, self.run, self.ledger) if asked else None
        if asked and asked.stop:  # a trial that goes on continues from what its last rung kept
            self.run = replace(self.run, keep_checkpoints=True)
        self.cells = self._planned()
        self.by_key = {cell.key: cell for cell in self.cells}
        self.done = self.ledger.done(self.by_key)
        self.failures = self.ledger.failures(set(self.by_key) - self.done)
        self._verified: set[str] = set()  # finished cells whose fingerprint was looked at
        folder = arguments.preset + ("-search" if self.search else "")
        self.out = Path(arguments.report_dir).expanduser() / sweep.name / folder

    def _planned(self) -> list[CellT]:
        if self.search is not None:
            self.whole = self.search.planned(record=not self.arguments.plan, ask=not self.arguments.report)
            return self.whole
        cells = list({cell.key: cell for cell in self.sweep.plan(self.preset)}.values())  # a grid may name one twice
        if not cells:
            raise UserError("the plan has no cells; give every grid field at least one value")
        self.whole = cells
        if not self.arguments.only:
            return cells
        chosen = _chosen(cells, self.arguments.only)
        if not chosen:
            raise UserError(f"--only {' '.join(self.arguments.only)} matches none of the {len(cells)} planned cells")
        return chosen

    def go(self) -> int:
        if self.arguments.plan:
            self._print_plan()
            return 0
        if self.arguments.report:
            if not self.done:
                raise UserError(f"none of the {len(self.cells)} cells is published in {self.ledger.store.uri}")
            self._check_report_folder()
            with tempfile.TemporaryDirectory(prefix="plumbline-report-") as made:
                lines, _ = self._report(Path(made))
            self._print_banner()
            self._close(lines)
            return 0 if self._whole else 1
        return self._execute()

    def _print_plan(self) -> None:
        missing = [c for c in self.cells if c.key not in self.done]
        machine = Machine.here()
        tell([f"{self.sweep.name} --preset {self.arguments.preset}: {self.sweep.question}"])
        self._settle_threads(machine)
        plan = PlanText(
            cells=self.cells,
            done=self.done,
            failed=self.failures,
            packs=len(self._rounds(missing, machine)),
            estimate=self.sweep.estimate(missing, self.preset, machine, self.run),
            machine=machine,
        )
        tell([plan.summary()])
        self._print_banner()
        tell(plan.details())
        tell(cost_lines(plan.estimate, machine, self.run, self.ledger.work(sorted(self.done))))
        if self.search is not None:
            tell([most_it_costs(self.search, self.sweep, self.preset, self.run, machine)])
        tell(plan.table(self.arguments.all))
        tell(["nothing was run"])

    def _rounds(self, missing: list[CellT], machine: Machine) -> list[Pack[CellT]]:
        """The packs of every round to come."""
        packs: list[Pack[CellT]] = []
        while missing:
            fresh = self.sweep.pack(missing, self.preset, machine, self.run)
            taken = {cell.key for pack in fresh for cell in pack.cells}
            packs += fresh
            missing = [cell for cell in missing if cell.key not in taken]
        return packs

    def _print_banner(self) -> None:
        lines = self.sweep.banner(self.arguments.preset, self.preset)
        for name in ("lm_path", "stream_path"):
            if path := getattr(self.run, name):
                lines.append(f"{name}: read from {path} instead")
        tell(f"  {line}" for line in (*lines, *self.sweep.remarks(self.preset, self.run)))

    def _check_report_folder(self) -> None:
        check_folder(self.out, "the folder for reports", "choose another with --report-dir DIR")

    def _check_places(self, missing: list[CellT]) -> None:
        """Raise UserError for a place that cannot be written and a cluster that is gone, before work is spent."""
        self.ledger.store.check_writable()
        self._check_report_folder()
        if (database := sqlite_file(self.tracking_uri)) is not None:
            remedy = "name another store with --tracking-uri, such as sqlite:////tmp/mlflow.db"
            check_folder(database.parent, "the folder of MLflow's database", remedy)
        if missing:
            check_address(self.arguments.address)

    def _execute(self) -> int:
        missing = [c for c in self.cells if c.key not in self.done]
        self._check_places(missing)
        self.ledger.store.remove_leftovers()
        started = time.monotonic()
        tell([f"{self.sweep.name} --preset {self.arguments.preset} → {self.ledger.store.uri}"])
        self._print_banner()
        if missing:
            tell(f"  {line}" for line in self.sweep.preflight(missing, self.preset, self.run))
        self.run = self.sweep.pin(self.cells, self.run)
        tell(f"  from the hub: {entry}" for entry in self.run.hub_commits)
        fingerprints = {c.key: self.sweep.fingerprint(c, self.preset, self.run) for c in self.cells}
        if self.arguments.retry_failed:
            self.ledger.check(self.done)
        self.ledger.compact(self.done)
        self.done = self.ledger.done(self.by_key)  # without those that were found damaged
        self.failures = self.ledger.failures(self.by_key.keys() - self.done)
        self._verify(self.done, fingerprints)
        if self.arguments.retry_failed:
            self.ledger.forget_failures(self.failures)
            self.failures = {}
            if self.search is not None:
                self.search.forget_failures()
        board = Board(self.sweep.name, len(self.cells), self.sweep.headline)
        board.already(len(self.done), len(self.failures))
        claims = Claims(self.ledger.store)
        try:
            return self._execute_with(claims, fingerprints, board, started)
        finally:
            claims.release()

    def _verify(self, keys: Iterable[str], fingerprints: Mapping[str, str]) -> None:
        """Raises UserError when one of these finished cells, whoever finished it, is of other code or data."""
        fresh = [key for key in keys if key not in self._verified]
        self.ledger.verify({key: fingerprints[key] for key in fresh})
        self._verified.update(fresh)

    def _execute_with(self, claims: Claims, fingerprints: dict[str, str], board: Board, started: float) -> int:
        tracker = Tracker(
            self.tracking_uri,
            self.ledger,
            claims,
            artifact_mb=self.run.mlflow_artifact_mb,
            say=board.say,
            named=self.sweep.named,
            tracked=self.sweep.tracked,
        )
        tracker.start(
            {"preset": self.arguments.preset, "cells": len(self.cells), "storage": self.storage},
            {"plumbline.preset": self.arguments.preset, "plumbline.git_commit": git_commit()},
            Plan(self.by_key, [cell.key for cell in self._sizing], self._view, self.out.name),
        )
        tracker.want(sorted(self.done))
        status = "FAILED"
        try:
            return self._work_and_report(fingerprints, claims, tracker, board, started)
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:  # whatever ended the launch, its run does not stay open
            tracker.leave(status, self._metrics(started), _CLOSE_SECONDS)

    def _metrics(self, started: float) -> dict[str, float]:
        return {
            "cells_done": len(self.done),
            "cells_planned": len(self.cells),
            "seconds": time.monotonic() - started,
        }

    def _work_and_report(
        self, fingerprints: dict[str, str], claims: Claims, tracker: Tracker, board: Board, started: float
    ) -> int:
        interrupted = False
        trouble: OSError | None = None
        try:
            board.open()
            self._work(fingerprints, claims, tracker, board)
        except KeyboardInterrupt:
            interrupted = True
            board.say("stopping: finished cells and checkpoints are kept")
        except OSError as error:
            trouble = error
        finally:
            shutdown_ray()
            self.done = self.ledger.done(self.by_key)
            failed = self.ledger.failures(self.by_key.keys() - self.done)
            board.forget()
            board.already(len(self.done), len(failed))
            board.close()
        if interrupted and self.stopper.terminated:  # SIGKILL follows soon: others may go on at once
            claims.release()
            tracker.leave(self._status(interrupted), self._metrics(started), _LEAVE_SECONDS)
            self._close([_LEFT_OUT], started)
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # the index only saves reading
            self.ledger.compact(self.done)
        self._verify(self.done, fingerprints)  # another launch may have published until this one was stopped
        tracker.want(sorted(self.done))
        self.failures = self.ledger.failures(self.by_key.keys() - self.done)
        tracker.live.hear({"failures": [(key, str(record.get("error"))) for key, record in self.failures.items()]})
        with tempfile.TemporaryDirectory(prefix="plumbline-report-") as made:
            lines, files = self._report(Path(made)) if self.done else ([], [])
            tracker.describe(lines)
            synced = tracker.finish(self._status(interrupted), self._metrics(started), files)
            if synced and self.done:
                self._say_runs(Path(made), tracker)
        if synced:
            lines += mlflow_lines(self.tracking_uri, tracker.runs_link())
        self._close(lines, started)
        if interrupted:
            raise KeyboardInterrupt
        if trouble is not None:
            raise trouble
        return 0 if self._whole else 1

    @property
    def _sizing(self) -> Sequence[CellT]:
        """The grid, or of a search what does not grow with it: the first batch."""
        return self.whole if self.search is None else self.search.first_cells()

    @property
    def _view(self) -> View:
        """What MLflow opens on."""
        view = self.sweep.view
        return view if self.search is None else view.of_search(self.search.cell_fields(), self.search.rules.columns)

    @property
    def _whole(self) -> bool:
        return len(self.done) == len(self.cells) and (self.search is None or self.search.finished)

    def _status(self, interrupted: bool) -> str:
        """What the launch's run in MLflow says of its end."""
        return "FINISHED" if self._whole else "KILLED" if interrupted else "FAILED"

    def _work(self, fingerprints: dict[str, str], claims: Claims, tracker: Tracker, board: Board) -> None:
        """Rounds of work until nothing is left that this launch could do or wait for."""
        machine: Machine | None = None
        waiting_said = False
        while True:
            looked = time.monotonic()
            missing = self._missing(fingerprints, tracker)
            if not missing:
                if self._grown(fingerprints, board):
                    continue
                return
            others = claims.held(missing, fingerprints=fingerprints)
            self._refuse_foreign(claims.foreign())
            looked = time.monotonic() - looked
            board.already(len(self.done), len(self.failures))
            if free := [self.by_key[key] for key in missing if key not in others]:
                self.ledger.compact((), missing)
                if machine is None:
                    machine = connect(self.arguments.address, self.arguments.storage)
                    self._settle_threads(machine)
                    self._say_other_threads(board)
                queue = Queue(self.sweep.pack(free, self.preset, machine, self.run), claims, fingerprints)
                self._run_round(queue, fingerprints, claims, tracker, board)
                if queue.taken:
                    continue
            if others and not waiting_said:
                board.say(f"{len(others)} cells are being computed by launch {next(iter(others.values()))}; waiting")
                waiting_said = True
            time.sleep(max(_WAIT_SECONDS, _WAIT_SHARE * looked))

    def _grown(self, fingerprints: dict[str, str], board: Board) -> bool:
        """Whether a search has asked for more cells, which are part of the plan now."""
        if self.search is None:
            return False
        self.whole = self.cells = self.search.advance(record=True)
        self._drop_checkpoints(self.search)
        fresh = [cell for cell in self.cells if cell.key not in self.by_key]
        self.by_key.update((cell.key, cell) for cell in fresh)  # in place: MLflow's thread looks cells up there
        self.run = self.sweep.pin(self.cells, self.run)
        fingerprints.update({c.key: self.sweep.fingerprint(c, self.preset, self.run) for c in fresh})
        board.cells = len(self.cells)
        board.say(f"search: {self.search.progress()}")
        return bool(fresh)

    def _drop_checkpoints(self, search: Search[CellT]) -> None:
        """Forget what finished cells kept for trials that do not go on any more."""
        if not search.rules.stop:
            return
        ended, going = ({self._checkpoint_of(cell) for cell in cells} for cells in search.ended_cells())
        work = WorkStore(self.ledger.store)
        for name in sorted((ended - going) & set(work.names())):
            work.drop(name)

    def _checkpoint_of(self, cell: CellT) -> str:
        return self.sweep.checkpoint(cell, self.preset, self.run)

    def _missing(self, fingerprints: dict[str, str], tracker: Tracker) -> list[str]:
        """Keys that are neither done nor failed; what others have done meanwhile is checked and copied, too.

        Asked again and again while others work, so it takes few requests, however many cells are missing.
        """
        if fresh := self.ledger.news(k for k in self.by_key if k not in self.done):
            self.ledger.compact(fresh)
            fresh -= self.ledger.damaged.keys()
            self._verify(fresh, fingerprints)
            tracker.want(sorted(fresh))
            self.done |= fresh
        self.failures = self.ledger.failures(self.by_key.keys() - self.done)
        return [k for k in self.by_key if k not in self.done and k not in self.failures]

    def _refuse_foreign(self, foreign: Mapping[str, str]) -> None:
        """Raises UserError when another launch computes planned cells from other code or data."""
        for key, launch in foreign.items():
            raise UserError(
                f"cell {key} is being computed by launch {launch} from other code or data than this launch has "
                f"({len(foreign)} such cells); wait for it and choose, or use another --storage"
            )

    def _settle_threads(self, machine: Machine) -> None:
        """Threads of a pack follow from the whole plan: an interrupted run continues with as many as it began with."""
        if not self.run.threads:
            self.run = replace(self.run, threads=self.sweep.threads(self._sizing, self.preset, machine, self.run))

    def _say_other_threads(self, board: Board) -> None:
        """A change of threads since the cells that are done: another machine, or a setting."""
        before = {int(self.ledger.read(key).meta.get("threads", 0)) for key in sorted(self.done)[:1]} - {0}
        if self.run.threads and before and before != {self.run.threads}:
            board.say(
                f"cells so far were computed with {before.pop()} threads, now there are {self.run.threads}; numbers "
                "may differ by rounding (--set threads=N keeps them)"
            )

    def _run_round(
        self, queue: Queue, fingerprints: dict[str, str], claims: Claims, tracker: Tracker, board: Board
    ) -> None:
        watch = _Watch(self.ledger)

        def heard(news: Mapping[str, Any]) -> None:
            tracker.live.hear(news)
            if keys := news.get("keys"):
                tracker.want(keys)
                watch.note(keys)

        job = Job(
            sweep=self.sweep,
            preset=self.preset,
            run=self.run,
            storage=self.storage,
            launch_id=claims.launch_id,
            fingerprints=fingerprints,
        )
        try:
            with self.stopper.asking(self.ledger.store, claims.launch_id, self.run.grace_seconds, board.say):
                errors = run_packs(job, queue, board, heard)
        finally:
            watch.stop()
        packs = queue.taken
        board.forget()
        done = self.ledger.done(c.key for p in packs for c in p.cells)
        failed = self.ledger.failures({c.key for p in packs for c in p.cells} - done)
        claims.done_with(done)
        trouble = ""
        for pack in packs:
            for cell in pack.cells:
                if cell.key not in done and cell.key not in failed:
                    reason = errors.get(pack.name, "its pack ended without publishing it")
                    if OTHER_CODE in reason:
                        raise UserError(reason)
                    if SYSTEM_ERROR.search(reason):  # the storage's or the machine's fault, not the cell's
                        trouble = reason
                    else:
                        self.ledger.record_failure(cell, reason, attempts=self.run.max_retries + 1)
        if trouble:
            raise OSError(trouble.removeprefix("OSError: "))

    def _report(self, made: Path) -> tuple[list[str], list[Path]]:
        """Write the report into an empty folder and put it in place; returns (lines for the screen, its files)."""
        cells = self.ledger.sound(key for key in self.by_key if key in self.done)
        keys = [cell.key for cell in cells]
        self.done = set(keys)  # without what was found damaged
        if not cells:
            return ["report       left out: no cell can be read"], []
        if self.search is None:
            lines = self.sweep.report(cells, self.arguments.preset, self.preset, made)
        else:
            from sweeps.search.report import write_evidence  # here: it loads Matplotlib

            lines = write_evidence(self.search, self.sweep.question, made)
        if len(keys) < len(self.whole):
            say_partial(made / "report.md", len(keys), len(self.whole))
            lines = [*lines, f"partial      {len(keys)} of {len(self.whole)} planned cells"]
        settings = [part for setting in self.arguments.set for part in ("--set", setting)]
        only = ["--only", *self.arguments.only] if self.arguments.only else []
        searched = self.search.asked.arguments() if self.search else []
        say_settings(made / "report.md", shlex.join(["--preset", self.arguments.preset, *settings, *only, *searched]))
        keep_runs(made / "report.md", self.out / "report.md")
        write_page(made)
        return [*lines, f"report       {self.out / 'report.md'} (report.html shows it)"], put_in_place(made, self.out)

    def _say_runs(self, made: Path, tracker: Tracker) -> None:
        """Add to the report the address with the runs of its cells, which are known once they are copied."""
        say_runs(made / "report.md", tracker.compare_link([k for k in self.by_key if k in self.done]))
        write_page(made)
        put_in_place(made, self.out)

    def _close(self, lines: Sequence[str], started: float | None = None) -> None:
        """The last lines: what failed, how many cells there are, the answer and where it is, what one would type."""
        failed = self.ledger.failures(self.by_key.keys() - self.done)
        reasons = {key: str(failed[key].get("error")) for key in self.by_key if key in failed}
        tell(failure_lines(self.by_key, reasons), error=True)
        took = "" if started is None else f" in {duration(time.monotonic() - started)}"
        tell([f"cells        {len(self.done)}/{len(self.cells)} published{took}", *lines])
        if self.arguments.open and self.done:
            tell([open_page(self.out / "report.html")])
        missing = len(self.cells) - len(self.done)
        follow_up = "" if self.search else self.sweep.follow_up.get(self.arguments.preset, "")
        tell(
            next_lines(
                self.arguments.script,
                self.arguments.typed,
                missing=missing,
                failed=len(reasons),
                follow_up=follow_up,
            ),
            error=bool(missing),
        )


class _Watch:
    """Writes the index of what is published while Tune holds the main thread, so that a crash loses little of it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._keys: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="index", daemon=True)
        self._thread.start()

    def note(self, keys: list[str]) -> None:
        """Cells that were published."""
        with self._lock:
            self._keys += keys

    def _work(self) -> None:
        while not self._stop.wait(_INDEX_SECONDS):
            with self._lock:
                keys, self._keys = self._keys, []
            if keys:
                with contextlib.suppress(OSError):  # the index only saves reading; the next launch makes up for it
                    self._ledger.compact(keys)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _chosen(cells: Sequence[CellT], only: Sequence[str]) -> list[CellT]:
    """Cells whose key starts with one of the texts; raises UserError for a text that no key can start with."""
    for text in only:
        if not re.fullmatch(r"[0-9a-f]{1,16}", text):
            raise UserError(
                f"--only {text!r} is not the beginning of a key (up to 16 of 0-9 a-f); --plan prints the keys"
            )
    by_length: dict[int, set[str]] = {}
    for text in only:
        by_length.setdefault(len(text), set()).add(text)
    return [c for c in cells if any(c.key[:length] in texts for length, texts in by_length.items())]
