"""Ray for one launch: start it here or join a cluster, pass on what the workers need, and leave again."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

from sweeps.core.cells import UserError
from sweeps.core.machine import ROOT, Machine, git_commit, hardware
from sweeps.launch.address import Address
from sweeps.launch.address import check as check_address
from sweeps.launch.same_code import VARIABLE, own_code, worker_job, worker_setup
from sweeps.ledger.storage import SHARED_PATH, Store, normal_storage

_MANY_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's own, read on every system
_OPTIONS = {"logging_level": "ERROR", "log_to_driver": True}


def connect(address: str | None, storage: str) -> Machine:
    """Start Ray here, or join the cluster at `address` (`auto`, `HOST:PORT`, or $RAY_ADDRESS).

    Raises UserError when no cluster answers there or one of another Ray or Python, when it has several nodes and
    `storage` is a path of one of them, and when the folder for temporary files has too long a name for Ray.
    """
    where = check_address(address)  # before Ray is imported, so that a cluster that is gone is reported in seconds
    with _user_errors(where):
        if where.text == "local":
            _start()
        else:
            _join(where.text)
    return _machine(storage)


def _start() -> None:
    import ray

    with _on_loopback(), _without_servers():
        ray.init(address="local", **_local_options())


def _join(address: str) -> None:
    import ray

    ray.init(address=address, **_cluster_options())


@contextlib.contextmanager
def _user_errors(where: Address) -> Iterator[None]:
    """What Ray raises for a reason that the user can remove becomes a UserError with the remedy."""
    try:
        yield
    except (ConnectionError, ValueError) as error:  # ValueError: no address at all
        raise where.trouble(error) from error
    except RuntimeError as error:
        if "ersion" not in str(error):  # "Version mismatch" or "version"
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"the Ray cluster at {where.text} does not fit ({reason}); install what it has, or restart it with what is "
            "installed here"
        ) from error
    except OSError as error:
        if "AF_UNIX" not in str(error):  # a socket's path has about 100 characters at most
            raise
        raise UserError(
            f"the folder for temporary files has too long a name for Ray ({error}); give it a shorter one: "
            "export RAY_TMPDIR=/tmp"
        ) from error


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts within the block listens on 127.0.0.1 alone, as is its default on macOS and Windows.

    Its argument `_node_ip_address` does not achieve this: Ray replaces 127.0.0.1 by an address that others reach.
    """
    from ray._private import ray_constants

    before, known = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(_MANY_NODES)
    os.environ[_MANY_NODES] = known or "0"  # for the processes that it starts
    ray_constants.ENABLE_RAY_CLUSTER = before if known else False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if known is None:
            del os.environ[_MANY_NODES]


@contextlib.contextmanager
def _without_servers() -> Iterator[None]:
    """A Ray that starts within the block has neither dashboard nor autoscaler, which nobody asks on one machine.

    Ray starts both even where they are switched off, and waits for the first (3.4 of the 19 s before the first cell of
    a trivial launch, on a busy machine).
    """
    from ray._private.node import Node

    names = ("start_api_server", "start_monitor")
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda self, **options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _environment() -> dict[str, str]:
    """The variables that workers get from the launch, wherever they run."""
    names = (
        "OMP_WAIT_POLICY",
        "NUMBA_CACHE_DIR",
        "NUMBA_CACHE_LOCATOR_CLASSES",
        "PLUMBLINE_CACHE",
        "XDG_CACHE_HOME",
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "HF_HOME",
    )
    known = {name: os.environ[name] for name in names if name in os.environ}
    return known | {"TQDM_DISABLE": "1", VARIABLE: own_code()}  # the live table shows progress


def _local_options() -> dict[str, Any]:
    """Options of a Ray on this machine alone: no more than this process may use, and the checkout first on the path."""
    here = Machine.here()
    store = int(min(2e9, max(8e7, here.memory_bytes * 0.1)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return _OPTIONS | {
        "num_cpus": here.cpus,
        "_memory": max(1, here.memory_bytes - store),  # Ray's own guess does not know every limit
        "object_store_memory": store,
        "include_dashboard": False,
        "job_config": worker_job(),
        "runtime_env": {
            "env_vars": _environment() | {"PYTHONPATH": path},
            "worker_process_setup_hook": worker_setup(str(ROOT)),
        },
        # otherwise one worker per core starts that no trial can use, as trials have environments of their own
        "_system_config": {"prestart_worker_first_driver": False},
    }


def _cluster_options() -> dict[str, Any]:
    """Options of a cluster: every worker gets a copy of the checkout as its working folder."""
    return _OPTIONS | {
        "runtime_env": {
            "env_vars": _environment() | {"PLUMBLINE_GIT_COMMIT": git_commit()},
            "working_dir": str(ROOT),
            "excludes": [".git", ".venv", "runs", "**/__pycache__", ".*_cache"],
            "worker_process_setup_hook": worker_setup(None),
        }
    }


def _machine(storage: str) -> Machine:
    """CPUs, GPUs and memory of the Ray that was joined; raises UserError where its nodes cannot share the storage."""
    import ray

    nodes = [n for n in ray.nodes() if n["Alive"]]
    if len(nodes) > 1 and not SHARED_PATH.match(storage) and Store(normal_storage(storage)).local:
        raise UserError(
            f"storage {storage} is a local path but the cluster has {len(nodes)} nodes; use a URI that all nodes "
            "reach (s3://, gs://) or, for a path that every node mounts, --storage file+shared:///PATH"
        )
    total = ray.cluster_resources()
    memory = min(int(n["Resources"].get("memory", 8 * 2**30)) for n in nodes)
    return Machine(
        nodes=len(nodes),
        cpus=int(total.get("CPU", 1)),
        gpus=int(total.get("GPU", 0)),
        memory_bytes=memory,
        hardware=hardware(),
    )


def shutdown_ray() -> None:
    """Leave Ray, if this process joined it.

    References to Ray's objects that Tune left in cycles go first: the collector, running in the lease's or MLflow's
    thread while Ray shuts down, would meet a Ray that is half shut down, which ends the process with exit code 1.
    """
    if "ray" in sys.modules:
        import ray

        gc.collect()
        gc.disable()
        try:
            ray.shutdown()
        finally:
            gc.enable()
