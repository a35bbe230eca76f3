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


def faster_backend(config: SAEConfig, n_threads: int) -> Backend:
    """ "numba" or "torch", whichever took fewer CPU-seconds for a small step of this shape in this process.

    The shape is cut to 4,096 features and 256 tokens, so that the probe takes a fraction of a second (plus the
    compilation of the kernels on a machine's first run). Measured once per process and shape.
    """
    features = min(config.d_sae, PROBE_FEATURES)
    small = replace(config, d_sae=features, k=min(config.k, features), aux_k=None, seed=0)
    return _measured(small, n_threads)


@lru_cache(maxsize=64)
def _measured(config: SAEConfig, n_threads: int) -> Backend:
    seconds = {}
    for backend in ("numba", "torch"):
        engine = _engine(backend, config, n_threads)
        x = torch.randn(PROBE_ROWS, config.d_in, generator=torch.Generator().manual_seed(0))
        _step(engine, x, 1)
        taken = []
        for step in range(PROBE_STEPS):
            start = time.process_time()
            _step(engine, x, 2 + step)
            taken.append(time.process_time() - start)
        seconds[backend] = min(taken)
    return "numba" if seconds["numba"] <= seconds["torch"] else "torch"


def _engine(backend: str, config: SAEConfig, n_threads: int) -> Engine:
    sae = TopKSAE.from_config(config)
    first, second = ({name: torch.zeros_like(getattr(sae, name)) for name in PARAMETERS} for _ in range(2))
    if backend == "numba":
        return NumbaEngine(sae, config, first, second, Scratch(), n_threads=n_threads)
    return TorchEngine(sae, config, first, second, Scratch(), screen_dtype=screen_dtype(torch.device("cpu")))


def _step(engine: Engine, x_BD: torch.Tensor, step: int) -> None:
    engine.gradients(x_BD, None)
    engine.update(engine.config.lr, step, float(engine.grad_norm()))
