"""A pack on the workers of Ray Train: one trainer a pack, built inside the pack's Tune trial.

The worker processes hold the pack's CPUs and GPUs, the trial holds nothing and waits. Checkpoints are the ledger's own
(`checkpoints.WorkStore`), so that a restarted group, a retried trial and a later launch continue alike. Ray Train
starts the group again when a worker dies; a cell that keeps killing its workers is given up alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import ray
import torch.distributed as dist
from ray.experimental import internal_kv
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import (
    PlacementGroup,
    PlacementGroupID,
    get_current_placement_group,
    remove_placement_group,
)

from sweeps.core.cells import CellT, Pack, UserError
from sweeps.core.machine import HEADROOM
from sweeps.core.world import World
from sweeps.launch.context import NEWS, PackContext
from sweeps.launch.failure import SYSTEM_ERROR, death, one_line, refusal, settle
from sweeps.launch.same_code import other_code
from sweeps.launch.stop import PackStopped, listen, lower_flag, raise_flag, terminated, working
from sweeps.launch.sweep import PresetT
from sweeps.ledger.logins import VARIABLE as LOGINS

_RELAY_SECONDS = 1.0
_POINTS = 500  # points of curves that wait for the trial's next look
_ENVIRONMENT = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class WorkersFailed(ValueError):
    """The workers ended more often than `max_retries` allows, before any cell was begun."""


def fit(
    job: Callable[[list[CellT], PresetT, PackContext], None], pack: Pack[CellT], preset: PresetT, context: PackContext
) -> None:
    """Run `job`, called with cells, preset and context, in the pack's workers.

    Each worker's context says which of how many it is. Raises UserError for what a retry cannot change, PackStopped
    when the work was stopped, WorkersFailed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if len(ray.nodes()) == 1:  # a node that drains takes the launch with it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    _require(pack, context)
    reserved = _Reserved(context.stop_name)
    reserved.free()
    cells = list(pack.cells)
    while cells:
        board = _Board(f"plumbline/{uuid.uuid4().hex}")
        with _relay(board, context), tempfile.TemporaryDirectory(prefix="plumbline-train-") as folder:
            try:
                result = _trainer(job, pack, cells, preset, context, board, folder).fit()
            except TrainingFailedError as error:
                current = board.state().get("cell")
                line = _reason(error, pack)
                if (refused := refusal(line)) is not None:
                    raise UserError(refused) from error
                if SYSTEM_ERROR.search(line):  # no fault of the cell's: a later launch tries again
                    raise OSError(line) from error
                begun = [cell for cell in cells if cell.key == current]
                if not begun:
                    raise WorkersFailed(line) from error
                context.fail(begun[0], f"its workers ended {context.run.max_retries + 1} times in a row: {line}")
                missing = {c.key for c in cells} - context.ledger.done(c.key for c in cells)
                cells = [c for c in cells if c.key in missing - {current}]
                continue
            if (text := board.error()) is not None:
                raise UserError(text)
            reserved.free()
            if result.return_value == _STOPPED:  # type: ignore[attr-defined]
                raise PackStopped("its workers saved and ended")
            return


_STOPPED = "stopped"


def _require(pack: Pack, context: PackContext) -> None:
    """Raise UserError where the cluster can never hold the workers."""
    least = context.run.min_workers or pack.workers
    have = ray.cluster_resources()
    for name, share in (("GPU", pack.gpus), ("CPU", pack.cpus * HEADROOM)):
        need = share / pack.workers * least
        if need > have.get(name, 0.0) + 1e-6:
            raise UserError(
                f"workers={least} need {need:g} {name} and the cluster has {have.get(name, 0.0):g}; choose fewer with "
                "--set workers=N, or start at a smaller number with --set min_workers=N"
            )


class _Reserved:
    """The placement group of a pack's workers, so that a retry of a killed trial frees what that one had reserved.

    Ray removes the group of a dead actor only with its whole job, and Ray Train's own cleaner needs a dashboard.
    """

    def __init__(self, pack: str) -> None:
        self.key = f"plumbline/placement/{pack}"

    def note(self) -> None:
        """Note the group that this worker runs in."""
        if (group := get_current_placement_group()) is not None:
            internal_kv._internal_kv_put(self.key, group.id.hex().encode())

    def free(self) -> None:
        """Remove the group that was noted, with whatever still runs in it."""
        noted = internal_kv._internal_kv_get(self.key)
        if noted is not None:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(noted.decode()))))
            internal_kv._internal_kv_del(self.key)


class _Trainer(TorchTrainer):
    """Ray Train without the actors that these trials have no use for: each imports torch and pandas before it waits.

    reached: names the last progress of the workers.
    """

    reached: Callable[[], str]

    def _create_default_callbacks(self) -> list[Any]:
        # the cleaner asks the dashboard, which a local Ray lacks (see _Reserved); no worker asks for a data set
        unused = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        """The controller runs here, in the trial, which would otherwise wait for it."""
        policy = parts["scaling_policy"]
        if len(ray.nodes()) == 1 and isinstance(policy, FixedScalingPolicy):
            parts["scaling_policy"] = _OnOneNode(policy.scaling_config)
        parts["failure_policy"] = _SinceProgress(parts["failure_policy"].failure_config, self.reached)
        controller = TrainController(**parts)
        asyncio.run(controller.run())
        return controller.get_result()


class _SinceProgress(DefaultFailurePolicy):
    """Counts the ends of worker groups since the last progress, where Ray Train counts those of the whole run."""

    def __init__(self, config: FailureConfig, reached: Callable[[], str]) -> None:
        super().__init__(config)
        self._reached, self._seen = reached, ""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        place = self._reached()
        if place and place != self._seen:
            self._seen = place
            self._worker_group_failures = self._controller_failures = self._preemption_failures = 0
        return super().make_decision(training_failed_error)


class _OnOneNode(FixedScalingPolicy):
    """Asks no autoscaler for the nodes of its workers: there is one, and `_require` knows that it is large enough."""

    def _maybe_send_resource_request(self) -> None: ...

    def _send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...


class _Config(TorchConfig):
    @property
    def backend_cls(self) -> Any:
        class Backend(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                if len(worker_group) > 1:  # one alone needs no process group, whose store listens on every interface
                    super().on_start(worker_group, backend_config)
                worker_group.execute(listen)  # in each worker's main thread; the work runs in another

        return Backend


def _trainer(
    job: Callable[[list[CellT], PresetT, PackContext], None],
    pack: Pack[CellT],
    cells: list[CellT],
    preset: PresetT,
    context: PackContext,
    board: _Board,
    folder: str,
) -> _Trainer:
    workers, least = pack.workers, context.run.min_workers or pack.workers
    resources = {"CPU": max(0.01, pack.cpus * HEADROOM / workers)}
    if pack.gpus:
        resources["GPU"] = pack.gpus / workers
    trainer = _Trainer(
        _work,
        train_loop_config={
            "logins": _Logins(os.environ.get(LOGINS, "")),  # first: the context opens the ledger as it arrives
            "job": job,
            "cells": cells,
            "preset": preset,
            "context": context,
            "threads": max(1, int(pack.cpus / workers)),
            "board": board.name,
        },
        torch_config=_Config(),
        scaling_config=ScalingConfig(
            num_workers=workers if least == workers else (least, workers),
            use_gpu=bool(pack.gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=pack.name.replace("/", "-"),
            storage_path=folder,  # Ray Train's own notes, needed by nobody later
            failure_config=FailureConfig(max_failures=context.run.max_retries),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    trainer.reached = lambda: str(board.state().get("reached", ""))
    return trainer


class _Logins:
    """The storage's logins on their way to a worker, which knows them as soon as they are unpickled there.

    Without a representation: Ray Train shows the settings of a run to whoever asks.
    """

    def __init__(self, known: str) -> None:
        self._known = known

    def __reduce__(self) -> tuple[Any, ...]:
        return _know, (self._known,)

    def __repr__(self) -> str:
        return "logins"


def _know(known: str) -> _Logins:
    if known:
        os.environ[LOGINS] = known
    return _Logins(known)


def _work(config: dict[str, Any]) -> str:
    """What each worker does: the whole job, in step with the others."""
    board = _Board(config["board"])
    if board.error() is not None:
        return "failed"
    if (line := other_code()) is not None:
        board.fail(line)
        return "failed"
    world = World.join()
    planned, preset, job = config["cells"], config["preset"], config["job"]
    if world.first:
        _Reserved(config["context"].stop_name).note()
    with closing(config["context"].for_worker(world, config["threads"], board.put)) as context:
        published = context.ledger.done([c.key for c in planned])
        failed = context.ledger.failures([c.key for c in planned])
        over = world.share(published | failed.keys())  # before this group was started again
        context.progress(published=context.published + len(published))
        cells = [c for c in planned if c.key not in over]
        return _outcome(lambda: job(cells, preset, context), world, board)


def _outcome(run: Callable[[], None], world: World, board: _Board) -> str:
    """Do the work; how it ended, in a word that the trial understands."""
    try:
        with working():
            run()
    except PackStopped as stop:
        if world.sum([float(terminated())])[0]:
            raise RuntimeError(f"a worker got SIGTERM: {stop}") from stop
        return _STOPPED
    except Exception as error:
        board.fail(settle(error).line)
        if world.size > 1:  # the others may wait for this one
            dist.destroy_process_group()
        return "failed"
    return "done"


class _Board:
    """Progress and the fatal error of a trainer's first worker, where the trial can read them: Ray's key-value store.

    Ray Train's own `report` would make every worker wait for the controller's next poll.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lists: dict[str, list[Any]] = {name: [] for name in NEWS if name != "points"}
        self._points: deque[Any] = deque(maxlen=_POINTS)
        self._points_told = 0

    def put(self, state: Mapping[str, Any]) -> None:
        """Replace the state; lists of news only grow, so that none is lost between two looks.

        Of the points of curves the last _POINTS are kept, with the number of all so far.
        """
        for name, items in self._lists.items():
            items += state.get(name, [])
        points = state.get("points", [])
        self._points.extend(points)
        self._points_told += len(points)
        kept = {"points": list(self._points), "points_told": self._points_told}
        self._write("state", dict(state) | self._lists | kept)

    def state(self) -> dict[str, Any]:
        return self._read("state") or {}

    def fail(self, text: str) -> None:
        self._write("error", text)

    def error(self) -> str | None:
        return self._read("error")

    def clear(self) -> None:
        for name in ("state", "error"):
            internal_kv._internal_kv_del(f"{self.name}/{name}")

    def _write(self, name: str, value: Any) -> None:
        internal_kv._internal_kv_put(f"{self.name}/{name}", json.dumps(value).encode())

    def _read(self, name: str) -> Any:
        data = internal_kv._internal_kv_get(f"{self.name}/{name}")
        return None if data is None else json.loads(data)


@contextmanager
def _relay(board: _Board, context: PackContext) -> Iterator[None]:
    """Pass the workers' progress on to the trial's, and the trial's SIGTERM on to the workers."""
    over = threading.Event()
    seen: dict[str, Any] = {}

    def look() -> None:
        state = board.state()
        if not state or state == seen:
            return
        news = {name: state[name][len(seen.get(name, [])) :] for name in NEWS if name != "points"}
        fresh = state["points_told"] - seen.get("points_told", 0)
        news["points"] = state["points"][-fresh:] if fresh else []
        seen.clear()
        seen.update(state)
        told = {name: value for name, value in (state | news).items() if name != "points_told"}
        context.progress(force=True, **told)

    def watch() -> None:
        told = False
        while not over.wait(_RELAY_SECONDS):
            look()
            if terminated() and not told:
                raise_flag(context.ledger.store, context.stop_name)
                told = True

    thread = threading.Thread(target=watch, name="relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
        board.clear()
        if terminated():
            lower_flag(context.ledger.store, context.stop_name)


def _reason(error: BaseException, pack: Pack) -> str:
    """The first worker's error as one line, or the death of one, which makes the others fail."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = [one_line(getattr(failure, "_base_exc", failure)) for failure in failures.values()]
    return next((said for line in lines if (said := refusal(line) or death(line, pack))), lines[0][:500])
