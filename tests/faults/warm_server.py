"""A process that has imported everything and forks launches; packs run in the driver instead of on Ray.

A real launch takes many seconds to start Python, Ray and torch and does its work in a fraction of one. Where Ray adds
nothing (storage, ledger, claims, MLflow) the same command line runs here in a second: `command.main` with its real
arguments, but for `run_packs`, which calls `run_one` in this process and retries what raises, as Tune would, and for
Ray Train's workers, whose job is done in this process, too.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

_CALLS = ("create_run", "update_run", "log_batch", "log_artifacts", "log_artifact", "set_terminated", "set_tag")


def _serve() -> None:
    """Read orders from stdin, one JSON line each, until it is closed."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - what every launch imports
    import pyarrow.parquet  # noqa: F401
    import transformers  # noqa: F401

    import analysis
    import sweeps.launch.workers
    from data.token_stream import TokenStream

    for package in (analysis, sweeps):
        for part in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(part.name)
    sweeps.launch.workers.fit = _fit
    TokenStream.sequences = functools.partialmethod(TokenStream.sequences, use_ray=False)  # type: ignore[method-assign]
    for line in sys.stdin:
        order = json.loads(line)
        answer = _fork(order) if order["do"] == "start" else _reap(order["pid"], order["seconds"])
        print(json.dumps(answer), flush=True)


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = _launch(order)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 71
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def _launch(order: dict[str, Any]) -> int:
    os.chdir(order["folder"])
    out = os.open(order["out"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, out), (2, out)):
        os.dup2(source, target)
    import faultpoints
    import objectstore

    from sweeps.core.machine import Machine
    from sweeps.launch import command
    from sweeps.ledger.claims import Claims

    objectstore.register()
    if order["lease"]:
        Claims.__init__.__defaults__ = (order["lease"],)  # type: ignore[misc]
    _announce_calls()
    faultpoints.arm(order["plan"])
    machine = Machine(nodes=1, cpus=order["cpus"], gpus=0, memory_bytes=8 * 2**30, hardware="a machine of the tests")
    command.connect = lambda *a: machine  # type: ignore[assignment]
    command.run_packs = _in_process  # type: ignore[assignment]
    return command.main(importlib.import_module(order["module"]).SWEEP, order["arguments"])


def _in_process(
    job: Any, queue: Any, board: Any, heard: Callable[[dict[str, Any]], None] = lambda news: None
) -> dict[str, str]:
    from sweeps.launch.failure import one_line
    from sweeps.launch.tune import run_one

    def report(result: dict[str, Any]) -> None:
        heard(result["progress"])

    errors = {}
    while (pack := queue.next()) is not None:
        for _ in range(job.run.max_retries + 1):
            try:
                run_one(job, pack, report)
                errors.pop(pack.name, None)
                break
            except Exception as error:
                errors[pack.name] = one_line(error)
    return errors


def _fit(job: Callable[..., None], pack: Any, preset: Any, context: Any) -> None:
    """Stands in for the workers of Ray Train: the job in this process."""
    job(list(pack.cells), preset, context)


def _announce_calls() -> None:
    """Make calls to MLflow visible to `faultpoints`, before they begin and after they have ended."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.tracking import MlflowClient

    def announced(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            sys.audit("plumbline.operation", f"call {name}")
            answer = call(*arguments, **options)
            sys.audit("plumbline.operation", f"return {name}")
            return answer

        return wrapper

    for name in _CALLS:
        setattr(MlflowClient, name, announced(name, getattr(MlflowClient, name)))
    store = LocalArtifactRepository.log_artifacts  # a new run's files go there without the client
    LocalArtifactRepository.log_artifacts = announced("store artifacts", store)  # type: ignore[method-assign]


def _reap(pid: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        select.select([], [], [], 0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1000


if __name__ == "__main__":
    _serve()
