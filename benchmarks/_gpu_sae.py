"""Part of `gpu.py`: the SAE's training step in the torch backend compared with the dense reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks._gpu_parts import Plan, Record, host_waits, milliseconds, peak_gib, relative_rms
from models.sae import model as sae_model
from models.sae.engines import PARAMETERS
from models.sae.trainer import SAEBank, SAEConfig, SparseTrainer

SIZES = ((512, 16384), (1024, 32768))
KS = (8, 32, 64, 128, 256)
BATCH = 4096
# a token whose k-th and next score agree to float32's rounding may keep either: one entry of B·k, of the smallest
LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 5e-3
BLOCKS_MIB = (32, 256)  # of scores at once


def sae(plan: Plan, record: Record) -> None:
    """Equality with the dense step, TF32 off and on; time, memory, waits of the host; 12 cells packed."""
    sizes, ks, batch = (((32, 256),), (4, 16), 64) if plan.tiny else (SIZES, KS, BATCH)
    for d_in, d_sae in sizes:
        x = activations(batch, d_in, plan)
        for k in ks:
            case = f"d {d_in}, d_sae {d_sae}, k {k}"
            _equality(record, case, _config(d_in, d_sae, k), x, plan)
            _speed(record, case, _config(d_in, d_sae, k), x, plan)
    d_in, d_sae = sizes[0]
    x = activations(batch, d_in, plan)
    _dead(record, f"d {d_in}, d_sae {d_sae}, k {ks[1]}, dead features", _config(d_in, d_sae, ks[1], dead=0), x, plan)
    _blocks(record, _config(d_in, d_sae, ks[1]), x, plan)
    _packed(record, d_in, d_sae, ks, x, plan)


def activations(batch: int, d_in: int, plan: Plan) -> Tensor:
    """Correlated normal activations [B, d_in] with a mean."""
    gen = torch.Generator().manual_seed(0)
    mix = torch.randn(d_in, d_in, generator=gen) / d_in**0.5
    return (torch.randn(batch, d_in, generator=gen) @ mix + 0.3).to(plan.device)


def _config(d_in: int, d_sae: int, k: int, dead: int = 1000) -> SAEConfig:
    return SAEConfig(d_in=d_in, d_sae=d_sae, k=k, seed=0, dead_after_steps=dead)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 products of CUDA with TF32, or without."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _pair(config: SAEConfig, plan: Plan) -> tuple[SparseTrainer, SparseTrainer]:
    ours, dense = (SparseTrainer(config, backend=b, device=plan.device) for b in ("torch", "dense"))
    return ours, dense


def _differences(ours: SparseTrainer, dense: SparseTrainer) -> float:
    """The largest relative RMS difference of a parameter's last gradient."""
    pairs = ((ours._engine.gradient(name), dense._engine.gradient(name)) for name in PARAMETERS)
    return max(relative_rms(mine, theirs) for mine, theirs in pairs)


def _equality(record: Record, case: str, config: SAEConfig, x: Tensor, plan: Plan) -> None:
    """Gates on loss and gradients of the first step, TF32 off; with TF32 on the numbers alone."""
    found = {}
    for allowed in (False, True):
        ours, dense = _pair(config, plan)
        with tf32(False):
            reference = dense.step(x)
        with tf32(allowed):
            stats = ours.step(x)
        found[allowed] = abs(stats.loss / reference.loss - 1), _differences(ours, dense), stats.rescreened
    record.gate(f"{case}: loss compared with the dense step", found[False][0], LOSS_LIMIT)
    record.gate(f"{case}: gradients compared with the dense step", found[False][1], GRADIENT_LIMIT)
    record.row(
        f"{case}: equality",
        gradient_difference=found[False][1],
        the_same_with_TF32=found[True][1],
        rescreened_rows=found[False][2],
    )


def _speed(record: Record, case: str, config: SAEConfig, x: Tensor, plan: Plan) -> None:
    for allowed in (False, True):
        with tf32(allowed):
            _speed_of(record, f"{case}: step, TF32 {'on' if allowed else 'off'}", config, x, plan)


def _speed_of(record: Record, case: str, config: SAEConfig, x: Tensor, plan: Plan) -> None:
    ours, dense = _pair(config, plan)
    step_ms = milliseconds(lambda: ours.step(x), plan)
    dense_ms = milliseconds(lambda: dense.step(x), plan, calls=3)
    waits = host_waits(lambda: ours.step(x), plan)
    record.row(
        case,
        ms=step_ms,
        dense_ms=dense_ms,
        ratio=dense_ms / step_ms,
        peak_GiB=peak_gib(lambda: ours.step(x), plan),
        dense_GiB=peak_gib(lambda: dense.step(x), plan),
        host_waits=waits,
    )
    if waits is not None:
        record.gate(f"{case}: waits of the host", waits, 1)


def _dead(record: Record, case: str, config: SAEConfig, x: Tensor, plan: Plan) -> None:
    """The auxiliary loss: every feature that misses the first batch is dead in the second."""
    ours, dense = _pair(config, plan)
    ours.step(x)
    dense.load_state_dict({**ours.state_dict(), "backend": "dense"})
    stats, reference = ours.step(x), dense.step(x)
    record.gate(f"{case}: loss compared with the dense step", abs(stats.loss / reference.loss - 1), 10 * LOSS_LIMIT)
    record.gate(f"{case}: gradients compared with the dense step", _differences(ours, dense), GRADIENT_LIMIT)
    step_ms = milliseconds(lambda: ours.step(x), plan)
    record.row(f"{case}: step", dead=stats.dead, ms=step_ms, host_waits=host_waits(lambda: ours.step(x), plan))


def _blocks(record: Record, config: SAEConfig, x: Tensor, plan: Plan) -> None:
    """Whether larger blocks of scores at once are faster here."""
    before = sae_model.SCORE_BYTES
    try:
        ours = SparseTrainer(config, backend="torch", device=plan.device)
        for mib in BLOCKS_MIB:
            sae_model.SCORE_BYTES = mib * 2**20
            ms = milliseconds(lambda: ours.step(x), plan)
            record.row(
                f"k {config.k}: blocks of scores of {mib} MiB", ms=ms, peak_GiB=peak_gib(lambda: ours.step(x), plan)
            )
    finally:
        sae_model.SCORE_BYTES = before


def _packed(record: Record, d_in: int, d_sae: int, ks: tuple[int, ...], x: Tensor, plan: Plan) -> None:
    """12 cells of one layer on one stream: their step, and the bits of a cell alone."""
    configs = [SAEConfig(d_in=d_in, d_sae=d_sae, k=ks[i % len(ks)], seed=i) for i in range(2 if plan.tiny else 12)]
    bank = SAEBank({i: (0, config) for i, config in enumerate(configs)}, backend="torch", device=plan.device)
    alone = SparseTrainer(configs[1], backend="torch", device=plan.device)
    for _ in range(2):
        bank.step({0: x})
        alone.step(x)
    packed = bank.trainers[1].sae.W_enc
    record.gate("12 cells packed: weights that differ from a cell alone", int((packed != alone.sae.W_enc).sum()), 0)
    ms = milliseconds(lambda: bank.step({0: x}), plan, calls=3)
    single_ms = milliseconds(lambda: alone.step(x), plan)
    record.row(
        f"{len(configs)} cells packed",
        ms=ms,
        ms_per_cell=ms / len(configs),
        a_cell_alone_ms=single_ms,
        peak_GiB=peak_gib(lambda: bank.step({0: x}), plan),
    )
