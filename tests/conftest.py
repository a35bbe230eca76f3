"""Shared fixtures: CPU only, fixed seeds, and the real data sets where the machine has them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers on a machine that has other work
os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")

import numpy as np
import pytest

from sweeps.core.machine import KERNEL_CACHE, user_cache

# kernels are compiled once per machine, not once per test that has a cache folder of its own (20 to 60 s of a core)
os.environ.setdefault("NUMBA_CACHE_DIR", str(user_cache() / "numba"))
os.environ.setdefault("NUMBA_CACHE_LOCATOR_CLASSES", KERNEL_CACHE)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets: $PLUMBLINE_DATA, or shared/data next to the checkout."""
    path = Path(os.environ.get("PLUMBLINE_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set PLUMBLINE_DATA to the folder that holds odor/")
    return path


LONGEST = (  # files by the time they take, the longest first
    "faults/test_storage_faults.py",
    "sweeps/launch/test_train_ray.py",
    "faults/test_ray_kills.py",
    "faults/test_claim_faults.py",
    "faults/test_ledger_faults.py",
    "sweeps/sae/test_proxy_gap_cli.py",
    "sweeps/launch/test_launch.py",
    "cluster/test_ray_up.py",
    "sweeps/codec/test_codec_cli.py",
    "faults/test_tracking_faults.py",
    "sweeps/test_every_sweep.py",
    "models/odor/test_pom.py",
    "models/host/test_smollm2.py",
    "sweeps/launch/test_crash.py",
    "sweeps/test_security.py",
    "models/cpu/test_bfloat16.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with slow tests: two processes that share the files end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    place = {ROOT / "tests" / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path, len(place)), item.path not in slow))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from tests.faults.fault_rig import SEED, Injection, table

    reports = [r for some in terminalreporter.stats.values() for r in some if getattr(r, "when", "") == "call"]
    survived = [Injection(**value) for r in reports for name, value in r.user_properties if name == "survived"]
    if survived:
        terminalreporter.section(f"faults survived, seed {SEED}")
        terminalreporter.write("\n".join(table(survived)) + "\n")
