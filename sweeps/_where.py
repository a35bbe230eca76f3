"""Where a sweep runs: machine, cluster address, storage. None of it is ever part of a cell's identity."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sweeps._cost import asked_types
from sweeps._storage import Store
from sweeps._sweep import UserError

_SHARED = re.compile(r"^file\+shared://")  # a local path that the user says every node mounts
ROOT = Path(__file__).resolve().parents[1]
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
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Machine(
            nodes=1, cpus=cpus, gpus=gpus, memory_bytes=psutil.virtual_memory().available, hardware=hardware()
        )


def hardware() -> str:
    """One line that names this machine's processor, cores, memory and GPUs."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text(encoding="utf-8").splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    text = f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
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
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()


def user_cache() -> Path:
    """Folder for what is made once on a machine: stand-in models, compiled kernels ($PLUMBLINE_CACHE)."""
    return Path(os.environ.get("PLUMBLINE_CACHE", Path.home() / ".cache" / "plumbline"))


def prepare_process() -> None:
    """Environment that must be set before torch, numba and Ray are imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("NUMBA_CACHE_DIR", str(user_cache() / "numba"))
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


def connect(address: str | None, storage: str) -> Machine:
    """Start Ray here, or join the cluster at `address` (`auto`, `HOST:PORT`, or $RAY_ADDRESS).

    Raises UserError when no cluster answers there, when it has several nodes and `storage` is a path of one of them,
    and when the folder for temporary files has too long a name for Ray.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    env_vars = {
        name: os.environ[name]
        for name in (
            "OMP_WAIT_POLICY",
            "NUMBA_CACHE_DIR",
            "PLUMBLINE_CACHE",
            "TOKENIZERS_PARALLELISM",
            "HF_HUB_OFFLINE",
            "HF_ENDPOINT",
        )
        if name in os.environ
    }
    env_vars["TQDM_DISABLE"] = "1"  # progress is the board's business
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    if address == "local":
        here = Machine.here()
        env_vars["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        options |= {
            "num_cpus": here.cpus,
            "include_dashboard": False,
            "object_store_memory": int(min(2e9, max(8e7, here.memory_bytes * 0.1))),
            # else a worker a core starts that no trial can use, as trials have environments of their own
            "_system_config": {"prestart_worker_first_driver": False},
        }
    runtime_env: dict[str, Any] = {"env_vars": env_vars}
    if address != "local":
        env_vars["PLUMBLINE_GIT_COMMIT"] = git_commit()
        runtime_env |= {
            "working_dir": str(ROOT),
            "excludes": [".git", ".venv", "runs", "**/__pycache__", ".mypy_cache", ".ruff_cache"],
        }
    try:
        ray.init(address=address, runtime_env=runtime_env, **options)
    except (ConnectionError, ValueError) as error:  # ValueError: no address at all
        raise UserError(
            f"no Ray cluster answers at {address} ({' '.join(str(error).split())}); start one with `ray start --head` "
            "or leave --address out"
        ) from error
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise UserError(
            f"the folder for temporary files has too long a name for Ray ({error}); give it a shorter one: "
            "export RAY_TMPDIR=/tmp"
        ) from error
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
    return str(Path(text).expanduser().resolve())
