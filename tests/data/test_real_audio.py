"""Real speech and music from their layouts through a codec to token shards and back; skipped where they are absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.audio_io import AudioSet, read_clips
from data.codec import CodecSpec
from data.codec_shards import tokenise
from data.fma import open_fma
from data.ljspeech import open_ljspeech
from data.melvq import MelVQSpec, train
from data.token_batches import TokenClips
from sweeps.core.machine import user_cache

SPEECH = MelVQSpec(sample_rate=8_000, hop=128, n_mels=40, n_codebooks=4, codebook_size=64)
MUSIC = replace(SPEECH, sample_rate=16_000, hop=256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("corpus", "listed", "spec", "shown"),
    [
        ("ljspeech", partial(open_ljspeech, nominal_rate=8_000), SPEECH, slice(None, 40)),
        ("fma", open_fma, MUSIC, slice(None, 3)),
    ],
)
def test_real_audio_becomes_tokens_and_audio_again(
    corpus: str, listed: Callable[[Path], AudioSet], spec: MelVQSpec, shown: slice, tmp_path: Path
) -> None:
    home = user_cache() / "audio"
    if not (home / corpus).is_dir():
        pytest.skip(f"no audio at {home / corpus}; fetch it with `python benchmarks/fetch_test_audio.py {home}`")
    whole = listed(home / corpus)
    assert whole.oddities == ()
    assert sum(not r.text for r in whole.recordings) <= 7  # the prompts that are tones
    audio = replace(whole, recordings=whole.recordings[shown])
    how = {"chunk_s": 8.0, "min_s": 1.0}
    read = [read_clips(audio, r, sample_rate=spec.sample_rate, **how) for r in audio.recordings]
    assert {odd.kind for _, some in read for odd in some if odd.skipped} <= {"too short"}
    clips = {clip.clip_id: clip for some, _ in read for clip in some}
    codec, _ = train([clip.wave_N for clip in clips.values()][1::2], spec)

    weights = codec.save(tmp_path / "melvq.npz")
    tokens = tokenise(audio, CodecSpec(name="melvq", weights=str(weights)), str(tmp_path / "t"), actors=None, **how)
    coded = TokenClips(tokens, None)
    assert sorted(coded.clip_ids) == sorted(clips)
    for name, other in zip(list(clips)[:8:2], list(clips)[2:10:2], strict=True):  # the codec was trained on neither
        codes_KT = torch.from_numpy(coded.codes(coded.clip_ids.index(name)).astype(np.int64))
        decoded = codec.log_mel(codec.synthesise(codec.dequantise(codes_KT.T))[None])[0]
        own, foreign = (codec.log_mel(torch.from_numpy(clips[c].wave_N)[None])[0] for c in (name, other))
        n = min(len(decoded), len(foreign))
        assert (decoded[:n] - own[:n]).square().mean() < 0.5 * (decoded[:n] - foreign[:n]).square().mean()
