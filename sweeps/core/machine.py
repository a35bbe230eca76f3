"""The machine that a process runs on: its size, its name in records, the code's commit, folders and environment."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.core import limits as process_limits
from sweeps.core.cells import UserError

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
        limits = process_limits.here()
        return Machine(nodes=1, cpus=limits.cpus, gpus=gpus, memory_bytes=limits.available_bytes, hardware=hardware())


def hardware() -> str:
    """One line that names this machine's processor, cores and memory, as far as this process may use them, and GPUs."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text(encoding="utf-8").splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    limits = process_limits.here()
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
    os.environ.setdefault("NUMBA_CACHE_LOCATOR_CLASSES", KERNEL_CACHE)
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


ROOT = Path(__file__).resolve().parents[2]
KERNEL_CACHE = (  # how numba finds compiled kernels: this checkout's by their content, others as it always does
    "sweeps.core.kernel_cache.ByContent,UserProvidedCacheLocator,InTreeCacheLocator,UserWideCacheLocator,"
    "IPythonCacheLocator,ZipCacheLocator"
)
HEADROOM = 0.9  # share of a CPU that a pack asks of Ray for each it uses; the rest feeds data tasks
