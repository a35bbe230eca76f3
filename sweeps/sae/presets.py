"""The presets of the SAE proxy gap."""

from __future__ import annotations

from collections.abc import Mapping

from sweeps.sae.cells import Grid

PYTHIA = ("pythia-70m", "pythia-160m", "pythia-410m")
PRESETS: Mapping[str, Grid] = {
    "local": Grid(
        models=("standin-small", "standin-large"),
        k=(4, 8, 16, 32),
        tokens=(81_920, 327_680),
        seeds=(0, 1),
        stream="embedded",
        batch_tokens=2048,
        shuffle_sequences=128,
        lr=1e-3,
        warmup_steps=10,
        dead_after_steps=50,
        eval_sequences=48,
    ),
    "smollm2": Grid(
        models=("smollm2-135m",),
        k=(8, 16, 32, 64, 128),
        tokens=(102_400, 409_600),
        stream="embedded",
        expansion=8,
        batch_tokens=2048,
        shuffle_sequences=128,
        lr=1e-3,
        warmup_steps=20,
        dead_after_steps=100,
        eval_sequences=48,
        lm_dtype="bfloat16",
    ),
    "scale": Grid(
        models=("smollm2-135m", "gemma-3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"),
        depths=("mid",),
        k=(16, 64),
        tokens=(15_360, 30_720, 61_440, 122_880),
        seeds=(0, 1, 2),
        stream="embedded",
        context=96,
        expansion=8,
        batch_tokens=512,
        shuffle_sequences=256,
        lr=1e-3,
        warmup_steps=12,
        dead_after_steps=120,
        eval_sequences=16,
    ),
    # SAEs that others trained (--set saes=…); models, hooks and contexts are those that their metadata names
    "released": Grid(models=(), k=(), tokens=(), stream="embedded", context=0, eval_sequences=48),
    "fast2": Grid(models=("pythia-70m", "pythia-410m"), k=(8, 16, 32, 64, 128, 256), tokens=(10_000_000,)),
    "fast3": Grid(models=PYTHIA, depths=("mid",), k=(8, 16, 32, 64), tokens=(10_000_000,)),
    "phase2": Grid(
        models=("pythia-70m", "pythia-410m"),
        depths=("mid",),
        k=(8, 16),
        tokens=(10_000_000, 50_000_000, 100_000_000),
        seeds=(0, 1, 2, 3),
    ),
    "budget_k32": Grid(
        models=("pythia-70m", "pythia-410m"), depths=("mid",), k=(32,), tokens=(10_000_000, 100_000_000)
    ),
    "bridge": Grid(
        models=PYTHIA,
        k=(8, 16, 32, 64, 128, 256),
        tokens=(10_000_000, 50_000_000, 100_000_000),
        seeds=(0, 1, 2),
    ),
}
