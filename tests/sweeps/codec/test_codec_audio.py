"""Sets of generated and real audio: windows that fit, embeddings that say what they are, files that read back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.codec.audio_distance import Embeddings, embed_set
from analysis.codec.scores import coherence
from data.codec import CodecSpec, EncodecCodec
from models.codec.model import build_codec_lm
from models.codec.presets import scale_config
from sweeps.codec.audio import EncodecLatents, _npz, coherence_window, draw, embedders
from sweeps.codec.audio_sets import AudioSets
from sweeps.codec.report import _distances, _joined


@pytest.mark.parametrize("rate", [62.5, 75.0, 44_100 / 512])
@pytest.mark.parametrize("frames", [9, 250, 400, 2_067])
def test_two_windows_that_share_no_frame_fit_every_sample(rate: float, frames: int) -> None:
    codes = np.random.default_rng(0).integers(0, 5, (2, frames))
    window = coherence_window(frames, rate)
    assert 0 <= coherence(codes, rate, 5, **window) <= 1
    assert window["window_s"] == 2 * window["hop_s"]
    if frames >= 8.1 * rate:
        assert window["window_s"] == pytest.approx(4, abs=1 / rate)


def test_encodec_latents_only_with_real_weights() -> None:
    codec = CodecSpec(name="encodec", weights="random").load()
    assert isinstance(codec, EncodecCodec)
    assert [e.name.split()[0] for e in embedders(codec)] == ["log-mel"]
    codec.weights = "file"  # the same tensors, as if somebody had given them
    assert [e.name.split()[0] for e in embedders(codec)] == ["log-mel", "EnCodec"]
    latents = EncodecLatents(codec)
    wave = np.random.default_rng(0).standard_normal(60_000).astype(np.float32) * 0.1
    x_ND = latents.embed(wave)
    assert x_ND.shape == (2, 128)  # of 2.5 s
    np.testing.assert_allclose(x_ND[0], codec.latents(wave)[:75].mean(0))
    assert codec.weights_hash in latents.name
    assert embed_set([wave, wave[:30_000], wave[:10]], latents, "s").n_clips == 2


def test_whole_blocks_of_samples_do_not_depend_on_their_number() -> None:
    config = replace(scale_config("local", "la"), d_model=8, n_layers=1, n_heads=2, d_ff=8, n_codebooks=2)
    model = build_codec_lm(config, seed=0)
    few, more = (draw(model, 3, n, 0, "float32") for n in (32, 40))
    assert more.shape == (40, 2, 3)
    assert more.dtype == np.uint16
    assert np.array_equal(few, more[:32])
    assert len(np.unique(more.reshape(40, -1), axis=0)) == 40


def made_up(seed: int) -> AudioSets:
    rng = np.random.default_rng(seed)
    arrays = {"embedders": np.array(["ears"]), "sample_s": np.array(4.0), "coherence_window_s": np.array(2.0)}
    for kind, shift in (("samples", 1.0), ("held_out", 0.0)):
        arrays[f"{kind}_0_x"] = rng.standard_normal((40, 3)) + shift
        arrays[f"{kind}_0_clip"] = np.repeat(np.arange(10), 4)
    arrays |= {"coherence_samples": np.array([0.5, 0.6]), "coherence_real": np.array([0.4])}
    return AudioSets.read(_npz(arrays))


def test_sets_read_back_and_pool_over_seeds() -> None:
    sets = [made_up(seed) for seed in (0, 1)]
    assert set(sets[0].embeddings["ears"]) == {"samples", "held_out"}  # too few training clips: left out
    assert (sets[0].sample_s, sets[0].coherence_window_s) == (4.0, 2.0)
    samples = _joined([s.embeddings["ears"]["samples"] for s in sets])
    assert samples is not None
    assert (len(samples.x_ND), samples.n_clips) == (80, 20)
    found = _distances(sets[0].embeddings["ears"]["held_out"], samples)
    assert np.isnan(found["frechet_lo"])  # ten held-out clips
    more = _distances(samples, Embeddings("x", "ears", samples.x_ND - 1, samples.clip_N))
    assert more["frechet_lo"] < 3 < more["frechet_hi"]  # |(1, 1, 1)|^2
    assert more["kernel"] > 0.1
    assert _joined([samples, None]) is None
    missing = _distances(None, samples)
    assert set(missing) <= set(found)
    assert np.isnan(missing["frechet"])
