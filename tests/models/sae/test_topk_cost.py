"""Planning numbers against what training really takes, and the choice of the backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.sae.trainer import SAEBank, SAEConfig, SparseTrainer, bank_bytes, step_flops

ROOT = Path(__file__).resolve().parents[3]

MEASURE = """
import ctypes, sys, psutil, torch
torch.set_num_threads(1)
from models.sae.trainer import SAEBank, SAEConfig, bank_bytes
backend = sys.argv[1]

def resident():
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of freed memory differs from run to run
    return psutil.Process().memory_info().rss

def train(configs, batch):
    bank = SAEBank({i: (0, c) for i, c in enumerate(configs)}, backend=backend, n_threads=1)
    x = torch.randn(batch, configs[0].d_in)
    for _ in range(3):
        bank.step({0: x})
    return bank

tiny = train([SAEConfig(d_in=32, d_sae=64, k=4, seed=0, dead_after_steps=0)], 64)
before = resident()
configs = [SAEConfig(d_in=256, d_sae=8192, k=k, seed=0, dead_after_steps=0) for k in (8, 32, 64)]
bank = train(configs, 2048)
print(resident() - before, bank_bytes(configs, 2048, backend=backend))
"""


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_predicted_memory_is_what_the_process_grows_by(backend: str) -> None:
    """Three cells of 8,192 features with dead features in play: what stays resident after a step is
    80% to 105% of the prediction, which counts a step's passing blocks too."""
    command = [sys.executable, "-c", MEASURE, backend]
    out = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    measured, predicted = map(int, out.split())
    assert 0.8 * predicted <= measured <= 1.05 * predicted


def test_shared_scratch_is_counted_once() -> None:
    config = SAEConfig(d_in=64, d_sae=1024, k=16, seed=0)
    one, two, three = (bank_bytes([config] * n, 512) for n in (1, 2, 3))
    assert three - two == two - one
    state = 3 * 4 * (2 * 64 * 1024 + 64 + 1024)
    assert state < two - one < 1.2 * state
    bank = SAEBank({n: (0, config) for n in range(2)}, backend="numba", n_threads=1)
    bank.step({0: torch.randn(512, 64)})
    assert bank.scratch.nbytes() < bank_bytes([], 512) + 2 * one - two


def test_operations_are_those_of_the_products() -> None:
    """At k = d_sae nothing is sparse: screen, re-score, decode, dh and two outer products are 6 dense products."""
    config = SAEConfig(d_in=128, d_sae=4096, k=4096, seed=0)
    adam = 14 * (2 * 128 * 4096 + 128 + 4096)
    assert step_flops(config, 1000) - adam == 6 * 2 * 1000 * 128 * 4096
    small = SAEConfig(d_in=128, d_sae=4096, k=8, seed=0)
    assert step_flops(small, 1000) < step_flops(config, 1000) / 4
    assert step_flops(small, 1000) < step_flops(small, 1000, dead=10) < step_flops(small, 1000, dead=2000)


def test_auto_picks_a_sparse_backend_and_keeps_it() -> None:
    config = SAEConfig(d_in=32, d_sae=512, k=8, seed=0)
    trainer = SparseTrainer(config)
    assert trainer.backend in ("numba", "torch")
    assert SparseTrainer(config).backend == trainer.backend
    assert trainer.state_dict()["backend"] == trainer.backend
    bank = SAEBank({k: (0, SAEConfig(d_in=32, d_sae=512, k=k, seed=0)) for k in (4, 8, 16)})
    assert len({cell.backend for cell in bank.trainers.values()}) == 1
