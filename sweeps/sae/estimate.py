"""What finishing cells of the proxy gap takes, from a short measurement on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from models.host.specs import RESID_POST, RESID_PRE
from models.information.settings import CriticSettings
from sweeps.core.cells import Estimate, Pack
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.core.units import duration
from sweeps.sae.cells import SAECell, sae_config
from sweeps.sae.lms import spec_of
from sweeps.sae.packs import make_packs, shared_passes, steps_of

_LM_EFFICIENCY = 0.6  # share of the matmul rate that a whole transformer block reaches
_STEP_TOUCHES = 14  # a dense step reads and writes both matrices, their moments, and reads their gradients
_NOMINAL_FLOPS = 5e10  # FLOP/s of a CPU core, when nothing is measured
_EVALUATION_PASSES = 4  # in forward passes over the held-out text that all SAEs of a pack share: one, and its backward

_RUNG_PASSES = 2.5  # in patched passes: the Fisher forms and the attention plans of one SAE


def estimate(cells: Sequence[SAECell], machine: Machine, run: RunSettings) -> Estimate:
    """Passes, tokens, FLOPs, memory and time to finish `cells` on this machine."""
    if not cells:
        return Estimate(seconds=0.0, basis="nothing to do")
    packs = make_packs(cells, machine, run)
    work = [_work(pack, run) for pack in packs]
    per_node = max(1, machine.cpus // machine.nodes // int(packs[0].cpus))
    at_once = min(len(packs), machine.gpus or machine.nodes * per_node)
    first_use = _pretraining({c.model for c in cells}, run) if run.probe else {}
    pretraining = sum(first_use.values()) / min(at_once, max(1, len(first_use)))
    probed = "calibrated by a short probe; arithmetic alone, small models took twice as long with starts and waits"
    return Estimate(
        lm_passes=len(packs),
        tokens=sum(w.tokens for w in work),
        flops=sum(w.lm_flops + w.sae_flops for w in work),
        bytes=sum(w.traffic for w in work),
        memory_bytes=max(p.memory_bytes for p in packs),
        shared=tuple(f"{name} is pretrained first, about {duration(s)} h:m:s" for name, s in first_use.items()),
        seconds=_busy_seconds(packs, work, run) / at_once + pretraining,
        basis=probed if run.probe else f"assuming {_NOMINAL_FLOPS:.0e} FLOP/s a core, not measured",
    )


@dataclass(frozen=True)
class _Work:
    """What one pack computes; `traffic` in bytes to and from memory."""

    tokens: int
    lm_flops: float
    sae_flops: float
    traffic: float


def _work(pack: Pack[SAECell], run: RunSettings) -> _Work:
    from models.sae.trainer import step_flops

    cells = pack.cells
    first, width, longest = cells[0], spec_of(cells[0].model, run).d_model, max(c.tokens for c in cells)
    sae_flops, traffic = 0.0, _weight_bytes(first, longest, run)
    for trajectories in shared_passes(cells).values():
        for own in trajectories.values():
            config = sae_config(own[0], width)
            steps = steps_of(own, config)
            sae_flops += step_flops(config, first.batch_tokens) * steps
            traffic += _STEP_TOUCHES * 4 * width * config.d_sae * steps
    if first.information == "on":
        sae_flops += len({c.layer for c in cells}) * _information_flops(width)
    return _Work(longest, _lm_flops(cells, longest, run), sae_flops, traffic)


def _lm_flops(cells: Sequence[SAECell], tokens: int, run: RunSettings) -> float:
    """FLOPs of a pack's language model: training up to the deepest layer, evaluation through all of them."""
    first = cells[0]
    spec = spec_of(first.model, run)

    def forward(layer: int | None) -> float:
        return spec.flops_per_token(layer, first.context)

    evaluated = first.eval_sequences * first.context
    unpatched = _EVALUATION_PASSES * evaluated * forward(None)
    skipped = [forward(cell.layer) if cell.hook in (RESID_POST, RESID_PRE) else 0.0 for cell in cells]
    of_cell = 1 if first.rungs == "free" else 1 + _RUNG_PASSES
    patched = sum(of_cell * evaluated * (forward(None) - below) for below in skipped)
    return tokens * forward(max(c.layer for c in cells)) + unpatched + patched


def _information_flops(width: int) -> float:
    """FLOPs of the critics of one layer, if none of them ends early."""
    from models.host.logit_directions import MOST  # here, as it imports torch

    settings = CriticSettings()
    return settings.folds * settings.steps * settings.step_flops((width, min(width, MOST)))


def _weight_bytes(cell: SAECell, tokens: int, run: RunSettings) -> float:
    """Traffic of the language model's weights: once per shuffle block, and in the evaluation's passes."""
    weights = spec_of(cell.model, run).n_parameters * (2 if cell.lm_dtype == "bfloat16" else 4)
    return weights * (tokens / (cell.shuffle_sequences * cell.context) + _EVALUATION_PASSES)


def _busy_seconds(packs: Sequence[Pack[SAECell]], work: Sequence[_Work], run: RunSettings) -> float:
    """Seconds of all packs one after another; each kind of pack is measured once."""
    rates: dict[tuple[object, ...], tuple[float, float]] = {}
    seconds = 0.0
    for pack, own in zip(packs, work, strict=True):
        cell = pack.cells[0]
        kind = (cell.model, cell.d_sae, cell.batch_tokens, pack.cpus)
        if kind not in rates:
            rates[kind] = _probe(cell, spec_of(cell.model, run).d_model, int(pack.cpus), run)
        lm_rate, sae_rate = rates[kind]
        seconds += own.lm_flops / lm_rate + own.sae_flops / sae_rate
    return seconds


def _probe(cell: SAECell, d_in: int, threads: int, run: RunSettings) -> tuple[float, float]:
    """Measured FLOP/s of the LM's matmuls and of the SAE step at the cell's true shape: a few seconds."""
    if not run.probe:
        return _NOMINAL_FLOPS * threads, _NOMINAL_FLOPS * threads
    import torch

    from models.cpu.threads import torch_threads
    from models.sae.trainer import SparseTrainer, step_flops

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

    names = [m for m in sorted(models) if not run.lm_path and m in HOST_LMS and HOST_LMS[m].origin == "standin"]
    seconds = {name: pretraining_seconds(name, embedded_text.fingerprint()) for name in names}
    return {name: s for name, s in seconds.items() if s}


def _seconds(work: Callable[[], object], threads: int, repeats: int = 5) -> float:
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
