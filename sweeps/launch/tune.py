"""Packs on Ray Tune: one function trial per pack, retried after crashes, never after bad input."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, cast

from sweeps.core import limits as process_limits
from sweeps.core.cells import Cell, CellT, Pack, described, varying
from sweeps.core.machine import HEADROOM, prepare_process
from sweeps.core.settings import RunSettings
from sweeps.launch.context import NEWS, PackContext, Place
from sweeps.launch.failure import SYSTEM_ERROR, death, last_failure, refusal, settle
from sweeps.launch.pack_queue import Queue
from sweeps.launch.same_code import other_code
from sweeps.launch.screen import Board
from sweeps.launch.stop import PackStopped, listen, terminated, working
from sweeps.launch.sweep import PresetT, Sweep
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.logins import VARIABLE as LOGINS
from sweeps.ledger.logins import without_password

_SAID = 3  # cells that are named when they fail, of each reason
_BUCKETS = 64  # objects that the packs of a launch travel in
_TUNE = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the board says it, a death in one line
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the ledger, not Tune's snapshot, is what restarts read
}


@dataclass(frozen=True, kw_only=True)
class Job(Generic[CellT, PresetT]):
    """What all packs of a launch share. fingerprints: of every planned cell, by key."""

    sweep: Sweep[CellT, PresetT]
    preset: PresetT
    run: RunSettings
    storage: str
    launch_id: str
    fingerprints: Mapping[str, str]

    def fingerprint(self, cell: Cell) -> str:
        """That of a planned cell, or of one that a planned cell needs (`--only` chose the latter alone)."""
        known = self.fingerprints.get(cell.key)
        return known or self.sweep.fingerprint(cast("CellT", cell), self.preset, self.run)


def run_packs(
    job: Job[CellT, PresetT], queue: Queue, board: Board, heard: Callable[[Mapping[str, Any]], None]
) -> dict[str, str]:
    """Run packs as Tune trials; returns {pack name: error line} of those that crashed more than `max_retries` times
    without a cell or a checkpoint in between.

    A pack is taken from the queue when there is room for it. `heard` gets what is new of cells (`context.NEWS`) as
    packs report it; it must not block.

    Raises KeyboardInterrupt when the user stops it; published cells and checkpoints stay.
    """
    os.environ |= _TUNE
    import ray
    from ray import tune
    from ray.air._internal import usage

    usage.tag_callbacks = lambda callbacks: False  # for Ray's usage report, which is off; it imports wandb (2 s)
    packs = queue.packs
    by_name = {pack.name: pack for pack in packs}
    if len(by_name) != len(packs):
        raise ValueError("two packs share a name")
    bundles = {pack.name: _bundle(pack) for pack in packs}
    at_once = _at_once(packs, ray.cluster_resources())
    # with a searcher Tune lets one trial wait at a time, so that workers would start one after the other
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once or _room(list(bundles.values()), ray.cluster_resources()))
    errors: dict[str, str] = {}
    folder = tempfile.mkdtemp(prefix="plumbline-tune-")
    try:
        tune.Tuner(
            tune.with_resources(
                _trainable(job, packs), lambda config: tune.PlacementGroupFactory([bundles[config["pack"]]])
            ),
            tune_config=tune.TuneConfig(
                search_alg=_taking(queue),
                num_samples=len(packs),
                reuse_actors=True,  # a worker imports torch once, not for every pack
                max_concurrent_trials=at_once,
                trial_name_creator=lambda t: t.config["pack"],
                trial_dirname_creator=lambda t: t.trial_id,
            ),
            run_config=tune.RunConfig(
                name=job.launch_id,
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=job.run.max_retries),
                callbacks=[_board_callback(_Attempts(board, by_name, heard, errors, job.run.max_retries))],
            ),
        ).fit()
        return errors
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trainable(job: Job[CellT, PresetT], packs: Sequence[Pack[Cell]]) -> Any:
    """What a trial of Tune is: `run_one` of the pack that its config names, with the cells that were taken."""
    import ray
    from ray import tune
    from ray.tune.trainable import wrap_function

    # a trial fetches one bucket of packs, not the whole plan: with a closure every worker would be sent all cells
    buckets: list[dict[str, tuple[Pack, dict[str, str]]]] = [{} for _ in range(min(_BUCKETS, len(packs)))]
    for pack in packs:
        work = pack, {c.key: job.fingerprints[c.key] for c in pack.cells}
        buckets[_bucket(pack.name, len(buckets))][pack.name] = work
    common = replace(job, fingerprints={})

    def trial(config: dict[str, Any], parts: list[Any], known: str) -> None:
        if known:
            os.environ[LOGINS] = known
        name, keys = config["pack"], set(config["keys"])
        pack, own = ray.get(parts[_bucket(name, len(parts))])[name]
        ours = replace(pack, cells=tuple(cell for cell in pack.cells if cell.key in keys))
        run_one(replace(common, fingerprints=own), ours, tune.report)

    # parameters travel through memory; what the trial's function holds is written to Tune's folder
    secret = os.environ.get(LOGINS, "")
    plain = tune.with_parameters(trial, parts=[ray.put(bucket) for bucket in buckets], known=secret)

    class Listening(wrap_function(plain)):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            listen()  # here, in the main thread; the trial's function runs in another
            super().setup(config)

    return Listening


def _taking(queue: Queue) -> Any:
    """Tune's source of trials: each asks for one more pack when there is room."""
    from ray.tune.search import Searcher

    class Taking(Searcher):
        def suggest(self, trial_id: str) -> Any:
            pack = queue.next()
            return Searcher.FINISHED if pack is None else {"pack": pack.name, "keys": [c.key for c in pack.cells]}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            return

        def __reduce__(self) -> Any:  # Tune pickles its settings for a restart, which reads the ledger instead
            return Searcher, ()

        def save(self, checkpoint_path: str) -> None:
            return

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            return

        def restore(self, checkpoint_path: str) -> None:
            return

    return Taking()


def _bucket(name: str, buckets: int) -> int:
    return zlib.crc32(name.encode()) % buckets


def _at_once(packs: Sequence[Pack], machine: Mapping[str, float]) -> int | None:
    """How many packs may run together when their trials ask for nothing, as their workers do the asking."""
    shares = [{"CPU": p.cpus, "GPU": p.gpus} for p in packs if p.workers]
    return _room(shares, machine) if shares else None


def _room(shares: Sequence[Mapping[str, float]], machine: Mapping[str, float]) -> int:
    """How many of the largest of these shares the machine holds, 1 at least."""
    largest = {name: max(share.get(name, 0.0) for share in shares) for name in ("CPU", "GPU")}
    return max(1, min(int(machine.get(name, 0) / need) for name, need in largest.items() if need))


def _bundle(pack: Pack) -> dict[str, float]:
    if pack.workers:
        return {"CPU": 0.01}
    bundle: dict[str, float] = {"CPU": max(0.01, pack.cpus * HEADROOM)}
    return {**bundle, "GPU": pack.gpus} if pack.gpus else bundle


@dataclass(frozen=True)
class _Attempts:
    """What is heard of packs, for the screen; `errors` gets the line of each pack that is given up.

    Tune counts the failures of a trial's whole life: `max_retries` more are allowed from each progress on.
    """

    board: Board
    packs: Mapping[str, Pack]
    news: Callable[[Mapping[str, Any]], None]
    errors: dict[str, str]
    max_retries: int
    reached: dict[str, str] = field(default_factory=dict)  # by each pack: the last progress that was heard of
    reasons: Counter[str] = field(default_factory=Counter)  # of cells that failed

    def heard(self, trial: Any, progress: Mapping[str, Any]) -> None:
        """A pack reports."""
        name, state = trial.config["pack"], dict(progress)
        for line in state.pop("notes", []):
            self.board.say(f"{name}: {line}")
        if news := {name: state.pop(name) for name in NEWS if name in state}:
            self.news(news)
        for key, reason in news.get("failures", []):
            self.tell_failure(key, reason)
        place = state.pop("reached", "")
        if place and place != self.reached.get(name):
            self.reached[name] = place
            trial.max_failures = trial.num_failures + self.max_retries
        if line := state.pop("refused", None):
            self.errors[name] = line
        self.board.update(name, state, len(self.packs[name].cells))

    def tell_failure(self, key: str, reason: str) -> None:
        """Print which cell failed and why, the first few that fail for one reason; the launch's end lists them."""
        before = self.reasons[reason]
        self.reasons[reason] += 1
        if before < _SAID:
            cell = self.cells[key]
            self.board.say(f"failed {key} {described(cell, self.differing)}: {reason}")
        elif before == _SAID:
            self.board.say(f"more cells fail for the same reason ({reason}); all are counted at the end")

    @functools.cached_property
    def cells(self) -> dict[str, Cell]:
        return {cell.key: cell for pack in self.packs.values() for cell in pack.cells}

    @functools.cached_property
    def differing(self) -> list[str]:
        """Names of the fields in which the cells differ."""
        return varying(list(self.cells.values()))[0]

    def ended(self, trial: Any, outcome: str) -> str:
        """Print why an attempt ended and what follows; returns the reason.

        An error of the code's own comes with its traceback.
        """
        name = trial.config["pack"]
        try:
            text = without_password(last_failure(Path(trial.error_file).read_text(encoding="utf-8")))
        except OSError:
            line = "crashed"
        else:
            found = refusal(text) or death(text, self.packs[name])
            line = found or (text.splitlines()[-1].strip() if text else "crashed")
            if found is None and not SYSTEM_ERROR.search(line):
                self.board.say(text)
            self.board.say(f"{name}: {line}")
        self.board.say(f"{name} crashed {outcome}")
        return line


def _board_callback(attempts: _Attempts) -> Any:
    """Tune's events, handed to `attempts`."""
    from ray import tune

    class BoardCallback(tune.Callback):
        def __reduce__(self) -> Any:  # Tune pickles its settings; a screen cannot be pickled and is not needed there
            return tune.Callback, ()

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            attempts.heard(trial, result.get("progress", {}))

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            attempts.board.drop(trial.config["pack"])

        def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            attempts.ended(trial, f"(attempt {trial.num_failures}); a retry continues from its checkpoint")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            outcome = f"{trial.num_failures} times and is given up; its last checkpoint stays"
            attempts.errors[trial.config["pack"]] = attempts.ended(trial, outcome)
            attempts.board.drop(trial.config["pack"])

    return BoardCallback()


def run_one(job: Job[CellT, PresetT], pack: Pack[CellT], report: Callable[[dict[str, Any]], None]) -> None:
    """Body of a trial, in its worker process: set the threads, run what is not yet published, sort the errors."""
    prepare_process()
    if (line := other_code()) is not None:  # files changed since this worker began
        report({"progress": {"refused": line}})
        return
    threads = max(1, int(pack.cpus))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    sweep = job.sweep
    ledger = Ledger(job.storage, sweep.name, sweep.version)
    done = ledger.done(cell.key for cell in pack.cells)
    cells = tuple(cell for cell in pack.cells if cell.key not in done)
    context = PackContext(
        ledger,
        job.run,
        threads=threads,
        device="cuda" if pack.gpus else "cpu",
        fingerprint=job.fingerprint,
        report=lambda state: report({"progress": state}),
        place=Place(job.launch_id, pack.name, share=pack.gpus or pack.cpus / process_limits.here().cpus),
    )
    context.progress(force=True, published=len(done), keys=sorted(done))
    with contextlib.closing(context):
        refused = cells and _run_cells(
            lambda: sweep.run(replace(pack, cells=cells), job.preset, context), cells, context
        )
    if refused:
        report({"progress": {"refused": refused}})
    else:
        context.progress(force=True, phase="done")


def _run_cells(run: Callable[[], None], cells: Sequence[Cell], context: PackContext) -> str:
    """Do the work; what a retry cannot mend is noted for the cells that are still missing, all else is raised.

    Returns the line of a worker that runs other code (a data task's, or one of Ray Train's), else an empty text.
    """
    try:
        with working():
            context.check_stop()
            run()
    except PackStopped as stop:
        if terminated():  # this node is going away, the launch goes on: a retry finds another place
            raise RuntimeError(f"SIGTERM: {stop}") from stop
    except Exception as error:
        permanent = settle(error)
        if permanent.refused:
            return permanent.line
        published = context.ledger.done(c.key for c in cells)
        missing = [c for c in cells if c.key not in published]
        already = context.ledger.failures([c.key for c in missing])
        for cell in missing:
            if cell.key not in already:
                context.fail(cell, permanent.line)
    return ""
