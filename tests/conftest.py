"""Shared fixtures: CPU only, fixed seeds, and the real data sets where the machine has them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers beside any other load
os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets: $PLUMBLINE_DATA, or shared/data beside the checkout."""
    path = Path(os.environ.get("PLUMBLINE_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set PLUMBLINE_DATA to the folder that holds odor/")
    return path
