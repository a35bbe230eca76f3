"""Memory caching: why did the gate stay shut when the source study scaled it up, and what is it worth?

python sweeps/memory_cache.py                              one variable at a time on synthetic speech: minutes
python sweeps/memory_cache.py --set variables=segment,lr   only these
python sweeps/memory_cache.py --set segment=32,16,8        other values, the base setting's first
python sweeps/memory_cache.py --preset mc_a100 --set audio_path=FMA      the study's 48M and 95M models (GPU)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweeps._memory_plan import RATE_HZ, CacheCell, CacheStudy, arms
from sweeps._sweep import Cell, Estimate, Pack, PublishedCell, UserError, nearest
from sweeps._where import Machine, RunSettings

_CORPORA = {"synthetic_speech": "melvq", "asterisk": "melvq", "ljspeech": "encodec", "fma": "dac"}
_CPU_STEPS = 16e9  # a core's FLOP/s on small models, forward and backward; small matrices reach far less
_CPU_OVERHEAD = 0.03  # seconds a step of a small model costs beside its arithmetic
_GPU_FLOPS = 30e12  # assumed of an A100 in bfloat16; never measured

PRESETS: Mapping[str, CacheStudy] = {
    "local": CacheStudy(
        together=("scale", "train_clips", "lr", "segment", "start_layer", "rank"),
        scale=("small", "large"),
        train_clips=(48, 0),
        lr=(3e-3, 9e-3),
        segment=(32, 16),
        start_layer=(1, 3),
        gate_bias_init=(-2.0, 0.0),
        rank=(8, 0),
        seeds=(1, 2, 3),
        corpus="synthetic_speech",
        corpus_clips=220,
        codec="melvq",
        codebooks=4,
        codebook_size=256,
        chunk_s=2.5,
        min_s=2.0,
        holdout=0.2,
        steps=250,
        batch_size=4,
        warmup_steps=15,
        lr_end=1e-4,
        ema_decay=0.95,
        precision="float32",
        eval_every=50,
        eval_clips=32,
        needs_gpu=False,
    ),
    "mc_a100": CacheStudy(
        together=("scale", "train_clips", "lr", "segment", "start_layer", "rank"),
        scale=("48m", "95m"),
        train_clips=(25_000, 0),  # 0: all of FMA-Large's 106k tracks but the held-out ones
        lr=(1e-4, 3e-4),
        segment=(256, 128),
        start_layer=(1, 10),
        gate_bias_init=(-2.0, 0.0),
        rank=(88, 0),
        seeds=(42, 43, 44),
        corpus="fma",
        codec="dac",
        codebooks=9,
        chunk_s=24.0,
        min_s=12.0,
        holdout=0.01,
        steps=12_000,
        batch_size=24,
        micro_batch=8,
        warmup_steps=500,
        lr_end=1e-5,
        ema_decay=0.999,
        precision="bfloat16",
        eval_every=500,
        eval_clips=256,
        needs_gpu=True,
    ),
}


class MemoryCacheSweep:
    """The sweep behind the command line; models are trained by `_codec_run`, the report is `_memory_report`."""

    name = CacheCell.SWEEP
    version = CacheCell.VERSION
    question = "what opens or closes the memory-caching gate, and what is memory caching worth?"
    headline = "nats below unigram"
    default_preset = "local"
    presets = PRESETS

    def plan(self, preset: CacheStudy) -> Sequence[CacheCell]:
        if preset.corpus not in _CORPORA:
            raise UserError(
                f"corpus {preset.corpus!r} is not known{nearest(preset.corpus, _CORPORA)}; "
                f"corpora: {', '.join(_CORPORA)} (the recall task is planted=true)"
            )
        if preset.codec not in RATE_HZ or preset.codec == "symbols":
            raise UserError(f"codec {preset.codec!r} is not known; codecs: melvq, encodec, dac")
        if preset.corpus == "synthetic_speech" and (preset.codec != "melvq" or preset.codec_weights):
            raise UserError("synthetic_speech goes with its own melvq; choose codec=melvq without codec_weights")
        cells: dict[str, CacheCell] = {}
        for arm in arms(preset):
            for cell in (*arm.controls, *arm.cells):
                cells.setdefault(cell.key, cell)
        return list(cells.values())

    def pack(self, cells: Sequence[Cell], preset: CacheStudy, machine: Machine, run: RunSettings) -> list[Pack]:
        """Small models: as many packs as run at once, of equal work. Models sized for a GPU: a pack a cell."""
        chosen = sorted((c for c in cells if isinstance(c, CacheCell)), key=lambda c: -c.weight)
        on_gpu = bool(preset.needs_gpu and machine.gpus)
        slots = max(1, (machine.gpus if on_gpu else machine.cpus) // run.workers)
        at_once = min(len(chosen), slots)
        groups: list[list[CacheCell]] = [[] for _ in range(len(chosen) if preset.needs_gpu else at_once)]
        for cell in chosen:
            min(groups, key=lambda group: sum(c.weight for c in group)).append(cell)
        cpus = run.workers * run.threads or max(1, machine.cpus // at_once)
        return [
            Pack(
                name=f"pack{number + 1}",
                cells=tuple(group),
                cpus=cpus,
                gpus=float(run.workers) if on_gpu else 0.0,
                workers=run.workers,
            )
            for number, group in enumerate(groups)
        ]

    def run(self, pack: Pack, preset: CacheStudy, context: Any) -> None:
        from sweeps._train_ray import fit

        fit("sweeps._memory_run:run_pack", pack, preset, context)

    def fingerprint(self, cell: Cell, preset: CacheStudy, run: RunSettings) -> str:
        from sweeps._codec_data import fingerprint

        assert isinstance(cell, CacheCell)
        return fingerprint(cell, preset.token_study(planted=cell.corpus == "recall"))

    def preflight(self, cells: Sequence[Cell], preset: CacheStudy, run: RunSettings) -> None:
        from sweeps._codec_data import check

        check(preset.token_study(planted=False))

    def estimate(self, cells: Sequence[Cell], preset: CacheStudy, machine: Machine, run: RunSettings) -> Estimate:
        from models.lm_cost import lm_cost

        flops, tokens, memory, steps = 0.0, 0, 0, 0
        for cell in cells:
            assert isinstance(cell, CacheCell)
            config = cell.lm_config()
            columns = min(int(cell.chunk_s * RATE_HZ[cell.codec]) + config.n_codebooks - 1, config.context)
            cost = lm_cost(config, columns)
            seen = cell.steps * cell.batch_size * columns
            tokens += seen * config.n_codebooks
            flops += 3 * seen * cost.flops_per_token
            steps += cell.steps
            held = 40 * (preset.micro_batch or cell.batch_size) * columns * config.d_model * config.n_layers * 4
            memory = max(memory, 20 * cost.parameters + held)
        if preset.needs_gpu:
            seconds = flops / (_GPU_FLOPS * max(1, machine.gpus))
            basis = "an assumed 30 TFLOP/s a GPU; never measured"
        else:
            seconds = (flops / _CPU_STEPS + steps * _CPU_OVERHEAD) / machine.cpus
            basis = "16 GFLOP/s and 30 ms a step on a core, seen on one machine"
        return Estimate(tokens=tokens, flops=flops, memory_bytes=memory, seconds=seconds, basis=basis)

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: CacheStudy, out: Path) -> list[str]:
        from sweeps._memory_report import write

        return write(cells, preset_name, preset, out)

    def banner(self, preset_name: str, preset: CacheStudy) -> list[str]:
        from sweeps._codec_data import PLANTED, banner

        return [*banner(preset.token_study(planted=False)), *([PLANTED] if preset.planted else [])]


SWEEP = MemoryCacheSweep()

if __name__ == "__main__":
    from sweeps._launch import main

    sys.exit(main("sweeps.memory_cache"))
