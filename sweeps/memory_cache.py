"""Memory caching: why did the gate stay shut when the source study scaled it up, and what is it worth?

python sweeps/memory_cache.py                              one variable at a time on synthetic speech: minutes
python sweeps/memory_cache.py --preset thorough            the same with enough steps for verdicts
python sweeps/memory_cache.py --set variables=segment,lr   only these
python sweeps/memory_cache.py --set segment=32,16,8        other values, the base setting's first
python sweeps/memory_cache.py --preset mc_a100 --set audio_path=FMA      the study's 48M and 95M models (GPU)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweeps._lm_plan import CPU_FLOPS, GPU_BASIS, TRACKED, packs, threads, work
from sweeps._memory_plan import VARIABLES, CacheCell, CacheStudy, arms
from sweeps.codec_lm import CORPORA
from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings

_CPU_OVERHEAD = 0.03  # seconds a step of a small model costs beside its arithmetic

PRESETS: dict[str, CacheStudy] = {
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
        steps=80,
        batch_size=4,
        warmup_steps=10,
        lr_end=1e-4,
        ema_decay=0.95,
        precision="float32",
        eval_every=40,
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
# so few steps leave the seeds far apart: three times as many for verdicts, a quarter of an hour on two cores
PRESETS |= {"thorough": replace(PRESETS["local"], steps=250, warmup_steps=15, eval_every=50)}


class MemoryCacheSweep:
    """The sweep behind the command line; models are trained by `_codec_run`, the report is `_memory_report`."""

    name = CacheCell.SWEEP
    version = CacheCell.VERSION
    question = "what opens or closes the memory-caching gate, and what is memory caching worth?"
    headline = "nats below unigram"
    named = ("architecture", *VARIABLES, "seed")
    tracked = TRACKED
    default_preset = "local"
    presets = PRESETS

    def plan(self, preset: CacheStudy) -> Sequence[CacheCell]:
        preset.check_source(CORPORA, " (the recall task is planted=true)")
        cells: dict[str, CacheCell] = {}
        for arm in arms(preset):
            for cell in (*arm.controls, *arm.cells):
                cells.setdefault(cell.key, cell)
        return list(cells.values())

    def pack(self, cells: Sequence[Cell], preset: CacheStudy, machine: Machine, run: RunSettings) -> list[Pack]:
        return packs([[c] for c in cells if isinstance(c, CacheCell)], preset, machine, run)

    def threads(self, planned: Sequence[Cell], preset: CacheStudy, machine: Machine, run: RunSettings) -> int:
        return threads(len(planned), preset, machine, run)

    def run(self, pack: Pack, preset: CacheStudy, context: Any) -> None:
        from sweeps.launch.workers import fit

        fit("sweeps._memory_run:run_pack", pack, preset, context)

    def fingerprint(self, cell: Cell, preset: CacheStudy, run: RunSettings) -> str:
        from sweeps._codec_data import fingerprint

        assert isinstance(cell, CacheCell)
        return fingerprint(cell, preset.token_study(planted=cell.corpus == "recall"))

    def preflight(self, cells: Sequence[Cell], preset: CacheStudy, run: RunSettings) -> None:
        from sweeps._codec_data import check

        check(preset.token_study(planted=False))

    def estimate(self, cells: Sequence[Cell], preset: CacheStudy, machine: Machine, run: RunSettings) -> Estimate:
        total = work(cells, preset)
        if preset.needs_gpu:
            seconds, basis = total.gpu_seconds(machine), GPU_BASIS
        else:
            seconds = (total.flops / CPU_FLOPS + total.steps * _CPU_OVERHEAD) / machine.cpus
            basis = "16 GFLOP/s and 30 ms a step on a core, seen on one machine"
        return Estimate(
            tokens=total.tokens, flops=total.flops, memory_bytes=total.memory_bytes, seconds=seconds, basis=basis
        )

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: CacheStudy, out: Path) -> list[str]:
        from sweeps._memory_report import write

        return write(cells, preset_name, preset, out)

    def banner(self, preset_name: str, preset: CacheStudy) -> list[str]:
        from sweeps._codec_data import PLANTED, banner

        return [*banner(preset.token_study(planted=False)), *([PLANTED] if preset.planted else [])]


SWEEP = MemoryCacheSweep()

if __name__ == "__main__":
    from sweeps.launch.command import main

    sys.exit(main("sweeps.memory_cache"))
