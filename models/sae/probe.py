"""Which CPU backend is faster here: a short measurement instead of a guess about the processor."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache

import torch

from models.sae.engines import PARAMETERS, Backend, Engine, Scratch, TorchEngine, screen_dtype
from models.sae.model import SAEConfig, TopKSAE
from models.sae.numba_engine import NumbaEngine

PROBE_FEATURES = 4096
PROBE_ROWS = 256
PROBE_STEPS = 3
DEAD_EVERY = 3  # of so many features one is dead


def faster_backend(config: SAEConfig, n_threads: int) -> Backend:
    """ "numba" or "torch", whichever took fewer CPU-seconds for a small step of this shape in this process.

    A third of the features is dead, as in most of a training: the auxiliary loss takes up to half of a step, and the
    backends differ most in it. The shape is cut to 4,096 features and 256 tokens, so that the probe takes a fraction of
    a second (plus the compilation of the kernels on a machine's first run). Measured once per process and shape.
    """
    features = min(config.d_sae, PROBE_FEATURES)
    aux_k = None if config.aux_k is None else min(config.aux_k, features)
    small = replace(config, d_sae=features, k=min(config.k, features), aux_k=aux_k, seed=0)
    return _measured(small, n_threads)


@lru_cache(maxsize=64)
def _measured(config: SAEConfig, n_threads: int) -> Backend:
    seconds = {}
    for backend in ("numba", "torch"):
        engine = _engine(backend, config, n_threads)
        x = torch.randn(PROBE_ROWS, config.d_in, generator=torch.Generator().manual_seed(0))
        dead = _dead_features(config)
        _step(engine, x, dead, 1)
        taken = []
        for step in range(PROBE_STEPS):
            start = time.process_time()
            _step(engine, x, dead, 2 + step)
            taken.append(time.process_time() - start)
        seconds[backend] = min(taken)
    return "numba" if seconds["numba"] <= seconds["torch"] else "torch"


def _engine(backend: str, config: SAEConfig, n_threads: int) -> Engine:
    sae = TopKSAE.from_config(config)
    first, second = ({name: torch.zeros_like(getattr(sae, name)) for name in PARAMETERS} for _ in range(2))
    if backend == "numba":
        return NumbaEngine(sae, config, first, second, Scratch(), n_threads=n_threads)
    return TorchEngine(sae, config, first, second, Scratch(), screen_dtype=screen_dtype(torch.device("cpu")))


def _dead_features(config: SAEConfig) -> torch.Tensor | None:
    """Every third feature, or None where no auxiliary loss is asked for."""
    return torch.arange(0, config.d_sae, DEAD_EVERY) if config.aux_coefficient > 0 else None


def _step(engine: Engine, x_BD: torch.Tensor, dead: torch.Tensor | None, step: int) -> None:
    engine.gradients(x_BD, dead)
    engine.update(engine.config.lr, step, float(engine.grad_norm()))
