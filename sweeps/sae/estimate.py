"""What finishing cells of the proxy gap takes, from a short measurement on this machine."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sweeps.core.cells import Estimate
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.screen import duration
from sweeps.sae.packs import make_packs, shared_passes, spec_of, steps_of

if TYPE_CHECKING:
    from sweeps.sae.cells import SAECell
_LM_EFFICIENCY = 0.6  # of the matmul rate that a whole transformer block reaches
_STEP_TOUCHES = 14  # a dense step reads and writes both matrices, their moments, and reads their gradients
_NOMINAL_FLOPS = 5e10  # a CPU core, when nothing is measured


def estimate(cells: Sequence[SAECell], machine: Machine, run: RunSettings) -> Estimate:
    """Passes, tokens, FLOPs, memory and time to finish `cells` on this machine."""
    from models.host.host_lm import lm_flops_per_token
    from models.sae.trainer import step_flops
    from sweeps.sae.cells import SAECell, sae_config

    if not cells:
        return Estimate(seconds=0.0, basis="nothing to do")
    packs = make_packs(cells, machine, run)
    tokens, flops, traffic, busy = 0, 0.0, 0.0, 0.0
    measured: dict[tuple[Any, ...], tuple[float, float]] = {}
    for pack in packs:
        part = [c for c in pack.cells if isinstance(c, SAECell)]
        first = part[0]
        spec = spec_of(first, run)
        deepest = max(c.layer for c in part)
        longest = max(c.tokens for c in part)
        forward = partial(lm_flops_per_token, first.model, context=first.context, lm_path=run.lm_path or None)
        evaluated = first.eval_sequences * first.context
        lm = longest * forward(deepest) + 4 * evaluated * forward(None)
        for cell in part:
            lm += evaluated * (forward(None) - forward(cell.layer))
        train = step_bytes = 0.0
        for own in (own for shared in shared_passes(part).values() for own in shared.values()):
            config = sae_config(own[0], spec.d_model)
            train += step_flops(config, first.batch_tokens) * steps_of(own, config)
            step_bytes += _STEP_TOUCHES * 4 * spec.d_model * config.d_sae * steps_of(own, config)
        tokens += longest
        flops += lm + train
        weights = spec.n_parameters * (2 if first.lm_dtype == "bfloat16" else 4)
        traffic += weights * (longest / (first.shuffle_sequences * first.context) + 4)
        traffic += step_bytes
        kind = (first.model, first.d_sae, first.batch_tokens, pack.cpus)
        if kind not in measured:
            measured[kind] = _probe(first, spec.d_model, int(pack.cpus), run)
        lm_rate, sae_rate = measured[kind]
        busy += lm / lm_rate + train / sae_rate
    abreast = min(
        len(packs), machine.gpus or machine.nodes * max(1, machine.cpus // machine.nodes // int(packs[0].cpus))
    )
    first_use = _pretraining({c.model for c in cells}, run) if run.probe else {}
    seconds = busy / abreast + sum(first_use.values()) / min(abreast, max(1, len(first_use)))
    probed = "calibrated by a short probe; arithmetic alone, small models took twice as long with starts and waits"
    basis = probed if run.probe else f"assuming {_NOMINAL_FLOPS:.0e} FLOP/s a core, not measured"
    return Estimate(
        lm_passes=len(packs),
        tokens=tokens,
        flops=flops,
        bytes=traffic,
        memory_bytes=max(p.memory_bytes for p in packs),
        shared=tuple(f"{name} is pretrained first, about {duration(s)} h:m:s" for name, s in first_use.items()),
        seconds=seconds,
        basis=basis,
    )


def _probe(cell: SAECell, d_in: int, threads: int, run: RunSettings) -> tuple[float, float]:
    """Measured FLOP/s of the LM's matmuls and of the SAE step at the cell's true shape: a few seconds."""
    if not run.probe:
        return _NOMINAL_FLOPS * threads, _NOMINAL_FLOPS * threads
    import torch

    from models.cpu.threads import torch_threads
    from models.sae.trainer import SparseTrainer, step_flops
    from sweeps.sae.cells import sae_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch_threads(threads):
        dtype = getattr(torch, cell.lm_dtype)
        x = torch.randn(cell.batch_tokens, d_in, device=device, dtype=dtype)
        w = torch.randn(d_in, 4 * d_in, device=device, dtype=dtype)
        lm_rate = 2 * x.numel() * w.shape[1] / _seconds(lambda: x @ w, threads) * _LM_EFFICIENCY
        config = sae_config(cell, d_in)
        trainer = SparseTrainer(config, n_threads=threads, device=device)
        batch = x.float()
        sae_rate = step_flops(config, cell.batch_tokens) / _seconds(lambda: trainer.step(batch), threads, repeats=2)
    return lm_rate, sae_rate


def _pretraining(models: Collection[str], run: RunSettings) -> dict[str, float]:
    """CPU-seconds to make the stand-ins among `models` that are not in the cache."""
    from data import embedded_text
    from models.host.specs import HOST_LMS
    from models.host.standin import pretraining_seconds

    names = [m for m in sorted(models) if not run.lm_path and HOST_LMS[m].origin == "standin"]
    seconds = {name: pretraining_seconds(name, embedded_text.fingerprint()) for name in names}
    return {name: s for name, s in seconds.items() if s}


def _seconds(work: Any, threads: int, repeats: int = 5) -> float:
    """Least seconds of `work`: on a CPU those that `threads` cores computed, so other load does not count."""
    import torch

    gpu = torch.cuda.is_available()

    def once() -> float:
        began = time.perf_counter() if gpu else time.process_time()
        work()
        if gpu:
            torch.cuda.synchronize()
            return time.perf_counter() - began
        return (time.process_time() - began) / threads

    once()
    return min(once() for _ in range(repeats))
