"""The presets of the codec language models."""

from __future__ import annotations

from dataclasses import replace

from sweeps.codec.cells import ARCHITECTURES, Study

OPTIONS = {"--codec-weights": "codec_weights"}  # the codecs' own spelling of the field
PRESETS: dict[str, Study] = {
    "local": Study(
        scale="local",
        lr=(8e-3, 1.6e-2),
        corpus="synthetic_speech",
        corpus_clips=200,
        codec="melvq",
        chunk_s=4.0,
        min_s=3.0,
        holdout=0.15,
        steps=50,
        batch_size=4,
        warmup_steps=10,
        lr_end=1e-4,
        ema_decay=0.95,
        precision="float32",
        eval_every=25,
        eval_clips=24,
        sample_s=4.0,
        sample_n=12,
        needs_gpu=False,
    ),
    "asterisk": Study(
        scale="local",
        seeds=(0, 1),
        lr=(4e-3, 1.6e-2),
        corpus="asterisk",
        codec="melvq",
        min_s=1.0,
        holdout=0.15,
        steps=160,
        batch_size=4,
        warmup_steps=16,
        lr_end=1e-4,
        ema_decay=0.95,
        precision="float32",
        eval_every=80,
        eval_clips=64,
        sample_s=4.0,
        needs_gpu=False,
    ),
    "speech_a100": Study(
        scale="speech",
        architectures=(*ARCHITECTURES, "hybrid_1_7"),
        lr=(1.5e-4, 3e-4, 6e-4),  # the published rate and its neighbours
        corpus="ljspeech",
        codec="encodec",
        steps=12_000,
        batch_size=24,
        warmup_steps=500,
        eval_every=200,
        eval_clips=666,
    ),
    "music_a100": Study(
        scale="music",
        architectures=(*ARCHITECTURES, "gdn_hybrid", "hybrid_1_7"),
        lr=(1e-4, 2e-4, 4e-4),
        corpus="fma",
        codec="dac",
        chunk_s=24.0,  # 2,067 frames of DAC; each use is cropped to the context at a seeded place
        min_s=12.0,
        steps=200_000,
        batch_size=32,
        micro_batch=8,
        warmup_steps=2000,
        eval_every=2000,
        eval_clips=256,
        sample_s=20.0,
        dropout=0.1,  # the published model's
    ),
}
_TEXT = ("none", "bytes")
PRESETS |= {
    # utterances of a word or three: what letters sound like must be learned in minutes, before the clips are memorised
    "text_local": replace(
        PRESETS["local"],
        architectures=("transformer", "mamba"),
        lr=(8e-3,),
        text=_TEXT,
        corpus_clips=800,
        chunk_s=0.9,
        min_s=0.5,
        steps=200,
        batch_size=24,
        warmup_steps=20,
        eval_every=100,
        eval_clips=128,
        sample_s=0.8,
        sample_n=16,
    ),
    "text_asterisk": replace(
        PRESETS["asterisk"],
        architectures=("olmo_hybrid", "transformer"),
        text=_TEXT,
    ),
    "speech_text_a100": replace(
        PRESETS["speech_a100"],
        architectures=("olmo_hybrid", "transformer"),
        seeds=(42, 43),
        text=_TEXT,
        chunk_s=10.2,  # above the longest sentence: every recording is one clip
    ),
}
