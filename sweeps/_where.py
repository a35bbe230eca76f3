"""Where a sweep runs: machine, cluster address, storage. None of it is ever part of a cell's identity."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps import _limits
from sweeps._address import check as check_address
from sweeps._code import ROOT, VARIABLE, own_code, worker_job, worker_setup
from sweeps._cost import asked_types
from sweeps._storage import Store, absolute
from sweeps._sweep import UserError

_SHARED = re.compile(r"^file\+shared://")  # a local path that the user says every node mounts
_PACKAGES = (
    "ray",
    "torch",
    "numpy",
    "numba",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "mlflow",
    "pyarrow",
)


_CACHE_REMEDY = "name a folder that can be written: export PLUMBLINE_CACHE=DIR"
_MANY_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's own, read on every system
_OPTIONS = {"logging_level": "ERROR", "log_to_driver": True}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How to run, settable with `--set`; nothing here changes a result (tests hold this)."""

    cells_per_pack: int = 0  # 0: as many as memory allows and devices can share
    threads: int = 0  # CPU threads a pack; 0: the machine's cores divided among the packs that run at once
    max_retries: int = 2  # of a pack after a crash; bad input is never retried
    checkpoint_seconds: float = 30.0  # between checkpoints of unfinished work
    checkpoint_steps: int = 0  # also a checkpoint every so many steps of a language model; 0: by time alone
    workers: int = 1  # processes that train one language model together, each with its own GPU or share of the cores
    min_workers: int = 0  # go on with as few, and with more when there is room again; 0: always `workers`
    grace_seconds: float = 25.0  # that running packs get to save when the launch is stopped
    lm_path: str = ""  # local folder with the language model (Hugging Face format) instead of the hub
    stream_path: str = ""  # local folder with the token shards (same Parquet schema) instead of the hub
    hub_commits: tuple[str, ...] = ()  # owner/name@commit to read from the hub; else what `main` is at the start
    on_corrupt: str = "raise"  # a corrupt shard: "raise" names it and stops, "skip" names it and goes on
    gpu_memory_gb: float = 0.0  # of one GPU; 0: asked of this node's first GPU
    price_per_hour: float = 0.0  # for --plan: money per GPU hour where the machine has GPUs, else per machine hour
    gpu: tuple[str, ...] = ()  # for --plan: GPU types to estimate for, with a price or without: h100-sxm:2.5,l4
    mlflow_artifact_mb: float = 64.0  # larger files stay in the ledger alone; MLflow gets their address
    probe: bool = True  # --plan measures a few steps to calibrate its estimate

    def __post_init__(self) -> None:
        if self.on_corrupt not in ("raise", "skip"):
            raise UserError(f"on_corrupt={self.on_corrupt!r} is not known; choose raise or skip")
        for entry in self.hub_commits:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", entry):
                raise UserError(f"hub_commits={entry!r} names no commit; write owner/name@COMMIT, 40 digits of 0-9 a-f")
        for name in ("cells_per_pack", "threads", "max_retries", "checkpoint_steps", "min_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} is negative; choose 0 or more")
        for name in ("checkpoint_seconds", "grace_seconds", "gpu_memory_gb", "mlflow_artifact_mb", "price_per_hour"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} is not a finite number of 0 or more; choose one")
        if self.workers < 1 or self.min_workers > self.workers:
            raise UserError(
                f"workers={self.workers} with min_workers={self.min_workers}; choose workers >= 1 and min_workers in "
                "0..workers"
            )
        asked_types(self.gpu)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the packs can use: the sum over the cluster, and the memory of its smallest node."""

    nodes: int
    cpus: int
    gpus: int
    memory_bytes: int
    hardware: str

    @staticmethod
    def here() -> Machine:
        """This machine, without asking Ray."""
        gpus = 0  # counted without importing torch: --plan and --report must be quick
        if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") != "":
            gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        limits = _limits.here()
        return Machine(nodes=1, cpus=limits.cpus, gpus=gpus, memory_bytes=limits.available_bytes, hardware=hardware())


def hardware() -> str:
    """One line that names this machine's processor, cores and memory, as far as this process may use them, and GPUs."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text(encoding="utf-8").splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    limits = _limits.here()
    text = f"{model}, {limits.cpus} cores, {limits.total_bytes / 2**30:.0f} GiB"
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            text += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return text


def provenance() -> dict[str, Any]:
    """Commit, package versions and Python of this process, as recorded in every cell."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"git_commit": git_commit(), "python": platform.python_version(), "packages": versions}


def git_commit() -> str:
    """Commit of the code, `-dirty` when tracked files differ; on a pod what `make cluster-up` noted; or `unknown`."""
    if noted := os.environ.get("PLUMBLINE_GIT_COMMIT"):  # the driver's, on the workers of a cluster
        return noted
    if (note := ROOT / ".commit").is_file():
        return note.read_text(encoding="utf-8").strip()
    try:
        run = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()


def user_cache() -> Path:
    """Folder for what is made once on a machine: stand-in models, compiled kernels ($PLUMBLINE_CACHE).

    Raises UserError where that names none and the user has no home folder.
    """
    if named := os.environ.get("PLUMBLINE_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "plumbline"
    except RuntimeError as error:  # a user without an entry in the system's list, as containers have them
        raise UserError(f"this user has no home folder ({error}); {_CACHE_REMEDY}") from error


def prepare_process() -> None:
    """Environment that must be set before torch, numba and Ray are imported; printing that no encoding can stop.

    Raises UserError where the folder for compiled kernels cannot be made or written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow on a latin-1 terminal must not end a launch
    if not os.environ.get("NUMBA_CACHE_DIR"):
        kernels = user_cache() / "numba"
        check_folder(kernels, "the cache folder", _CACHE_REMEDY)
        os.environ["NUMBA_CACHE_DIR"] = str(kernels)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 starves trials beside any other work
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run otherwise


def check_folder(folder: Path, what: str, remedy: str) -> None:
    """Raise UserError where `folder` cannot be made or written, before anything is computed; leaves nothing there."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{what} {folder} cannot be written ({error.strerror or error}); {remedy}") from error


def connect(address: str | None, storage: str) -> Machine:
    """Start Ray here, or join the cluster at `address` (`auto`, `HOST:PORT`, or $RAY_ADDRESS).

    Raises UserError when no cluster answers there or one of another Ray or Python, when it has several nodes and
    `storage` is a path of one of them, and when the folder for temporary files has too long a name for Ray.
    """
    where = check_address(address)  # before Ray is imported: a cluster that is gone is told in seconds
    import ray

    try:
        if where.text == "local":
            with _on_loopback():
                ray.init(address="local", **_local_options())
        else:
            ray.init(address=where.text, **_cluster_options())
    except (ConnectionError, ValueError) as error:  # ValueError: no address at all
        raise where.trouble(error) from error
    except RuntimeError as error:
        if "ersion" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"the Ray cluster at {where.text} does not fit ({reason}); install what it has, or restart it with what is "
            "installed here"
        ) from error
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise UserError(
            f"the folder for temporary files has too long a name for Ray ({error}); give it a shorter one: "
            "export RAY_TMPDIR=/tmp"
        ) from error
    return _machine(storage)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a Ray that starts meanwhile listen on 127.0.0.1 alone, as it does by itself on macOS and Windows.

    Its argument `_node_ip_address` does not: Ray replaces 127.0.0.1 there by an address that others reach.
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


def _environment() -> dict[str, str]:
    """The variables that workers get from the launch, wherever they run."""
    names = (
        "OMP_WAIT_POLICY",
        "NUMBA_CACHE_DIR",
        "PLUMBLINE_CACHE",
        "XDG_CACHE_HOME",
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "HF_HOME",
    )
    known = {name: os.environ[name] for name in names if name in os.environ}
    return known | {"TQDM_DISABLE": "1", VARIABLE: own_code()}  # progress is the board's business


def _local_options() -> dict[str, Any]:
    """What a Ray on this machine alone is told: no more than this process may use, and the checkout before all else."""
    here = Machine.here()
    store = int(min(2e9, max(8e7, here.memory_bytes * 0.1)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return _OPTIONS | {
        "num_cpus": here.cpus,
        "_memory": max(1, here.memory_bytes - store),  # else Ray's own guess, which knows not every limit
        "object_store_memory": store,
        "include_dashboard": False,
        "job_config": worker_job(),
        "runtime_env": {
            "env_vars": _environment() | {"PYTHONPATH": path},
            "worker_process_setup_hook": worker_setup(str(ROOT)),
        },
        # else a worker a core starts that no trial can use, as trials have environments of their own
        "_system_config": {"prestart_worker_first_driver": False},
    }


def _cluster_options() -> dict[str, Any]:
    """What a cluster is told: to give every worker a copy of the checkout as its working folder."""
    return _OPTIONS | {
        "runtime_env": {
            "env_vars": _environment() | {"PLUMBLINE_GIT_COMMIT": git_commit()},
            "working_dir": str(ROOT),
            "excludes": [".git", ".venv", "runs", "**/__pycache__", ".mypy_cache", ".ruff_cache"],
            "worker_process_setup_hook": worker_setup(None),
        }
    }


def _machine(storage: str) -> Machine:
    """What the Ray that was joined has; raises UserError where its nodes cannot share the storage."""
    import ray

    nodes = [n for n in ray.nodes() if n["Alive"]]
    if len(nodes) > 1 and not _SHARED.match(storage) and Store(normal_storage(storage)).local:
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


def normal_storage(storage: str) -> str:
    """The storage text as fsspec takes it: relative local paths made absolute, `file+shared://` stripped.

    Raises UserError for an address that was mistyped as a path, and for one that the workers cannot share.
    """
    text = _SHARED.sub("", storage)
    if text.startswith("memory:"):
        raise UserError(
            f"storage {text} is the memory of one process, which Ray's workers do not share; choose a folder or "
            "s3://BUCKET/PREFIX"
        )
    if "://" in text:
        return text
    if mistyped := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(
            f"storage {text} has one slash behind its scheme; write {mistyped[0]}/…, or ./{text} for a local folder"
        )
    return absolute(text)  # no link is followed here: those of the workers may lead elsewhere
