"""The presets of the memory-caching study."""

from __future__ import annotations

from dataclasses import replace

from sweeps.caching.cells import CacheStudy

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
# after so few steps the seeds differ much; verdicts need three times as many (15 minutes on two cores)
PRESETS |= {"thorough": replace(PRESETS["local"], steps=250, warmup_steps=15, eval_every=50)}
