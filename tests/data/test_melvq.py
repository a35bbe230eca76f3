from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data.melvq import MelVQ, MelVQSpec, train
from data.synthetic_speech import SpeechSpec, utterance

SPEC = MelVQSpec(n_mels=40, n_codebooks=4, codebook_size=64)


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    spec = SpeechSpec(min_s=3.0, max_s=5.0)
    return [utterance(spec, i)[0] for i in range(14)]


@pytest.fixture(scope="module")
def codec(waves: list[np.ndarray]) -> MelVQ:
    return train(waves[:12], SPEC)[0]


def test_log_mel_of_a_full_scale_sine_is_closed_form() -> None:
    spec = MelVQSpec(n_mels=40)
    codec = MelVQ(spec, torch.zeros(40), torch.zeros(8, 1024, 40))
    n_bin = 64
    hz = n_bin * spec.sample_rate / spec.n_fft
    wave = torch.sin(2 * torch.pi * hz * torch.arange(16_000) / spec.sample_rate)[None]
    logmel = codec.log_mel(wave)
    assert logmel.shape == (1, 63, 40)
    # a Hann window spreads a sine on a bin over that bin (|W| = n_fft / 4) and its two neighbours (half of that)
    power = codec._filters_MF[:, n_bin - 1 : n_bin + 2] @ torch.tensor([0.25, 1.0, 0.25]) * (spec.n_fft / 4) ** 2
    expected = 0.5 * torch.log(power.clamp_min((spec.n_fft / 4) ** 2 * 1e-7))
    assert (logmel[0, 5:-5] - expected).abs().max() < 1e-2
    silent = codec.log_mel(torch.zeros(1, 1_000))
    assert torch.allclose(silent, silent.new_full((), 0.5 * np.log((spec.n_fft / 4) ** 2 * 1e-7)))


def test_frames_do_not_depend_on_what_follows() -> None:
    codec = MelVQ(SPEC, torch.zeros(40), torch.zeros(4, 64, 40))
    wave = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    whole, part = codec.log_mel(wave), codec.log_mel(wave[:, :5_120])
    assert part.shape[1] == 20
    assert torch.allclose(whole[:, :18], part[:, :18], atol=1e-5)


def test_every_codebook_reduces_the_error_on_held_out_speech(codec: MelVQ, waves: list[np.ndarray]) -> None:
    held_out = codec.log_mel(torch.from_numpy(np.concatenate(waves[12:]))[None])[0]
    codes = codec.quantise(held_out)
    errors = [float((codec.dequantise(codes, k) - held_out).square().mean().sqrt()) for k in range(1, 5)]
    assert all(b < a for a, b in itertools.pairwise(errors))
    spread = float((held_out - codec.mean_M).square().mean().sqrt())
    assert errors[0] < 0.6 * spread
    assert errors[-1] < 0.4 * spread


def test_quantise_is_the_greedy_nearest_centroid(codec: MelVQ) -> None:
    frames = codec.mean_M + torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    codes = codec.quantise(frames)
    residual = (frames - codec.mean_M).double()
    for k in range(4):
        distances = torch.cdist(residual, codec.centroids_KVM[k].double())
        chosen = distances.gather(1, codes[:, k : k + 1])
        assert (chosen[:, 0] - distances.min(1).values).abs().max() < 1e-5
        residual = residual - codec.centroids_KVM[k][codes[:, k]].double()


def test_training_is_repeatable_and_saved_whole(codec: MelVQ, waves: list[np.ndarray], tmp_path: Path) -> None:
    again, report = train(waves[:12], SPEC)
    assert torch.equal(again.centroids_KVM, codec.centroids_KVM)
    assert all(b < a for a, b in itertools.pairwise(report.error_db_K))
    loaded = MelVQ.load(codec.save(tmp_path / "codec.npz"))
    assert loaded.spec == SPEC
    assert torch.equal(loaded.centroids_KVM, codec.centroids_KVM)
    assert [p.name for p in tmp_path.iterdir()] == ["codec.npz"]
    other, _ = train(waves[:12], SPEC, seed=1)
    assert not torch.equal(other.centroids_KVM, codec.centroids_KVM)


def test_linear_power_has_the_mel_bands_asked_for(codec: MelVQ, waves: list[np.ndarray]) -> None:
    logmel = codec.log_mel(torch.from_numpy(waves[0])[None])[0]
    power = codec.linear_power(logmel)
    assert bool((power >= 0).all())
    bands = codec._filters_MF @ power
    assert float((10 * torch.log10(bands.T / torch.exp(2 * logmel))).abs().median()) < 0.5


def test_decoded_speech_resembles_the_original_and_nothing_else(codec: MelVQ, waves: list[np.ndarray]) -> None:
    wave, other = waves[12], waves[13]
    logmel = codec.log_mel(torch.from_numpy(wave)[None])[0]
    decoded = codec.synthesise(codec.dequantise(codec.quantise(logmel))).numpy()
    assert len(decoded) == 256 * codec.frames(len(wave))
    n = min(map(len, (wave, decoded, other)))
    cut = torch.from_numpy(np.stack([wave[:n], decoded[:n], other[:n]]))
    loud_3FT = torch.stft(cut, 512, 128, window=torch.hann_window(512), return_complex=True).abs()
    log_3FT = torch.log10(loud_3FT.clamp_min(1e-3 * float(loud_3FT[0].max())))  # 60 dB below the loudest
    own, others = ((log_3FT[0] - x).square().mean(0).sqrt().mean() for x in log_3FT[1:])
    assert own < 0.6 * others  # log-spectral distances
    error, foreign = ((loud_3FT[0] - x).norm() / loud_3FT[0].norm() for x in loud_3FT[1:])
    assert error < 0.7 < foreign  # 3 dB of the magnitudes, their phases left out
    assert np.array_equal(decoded, codec.synthesise(codec.dequantise(codec.quantise(logmel))).numpy())


@pytest.mark.parametrize("n_frames", [1, 2, 3, 4, 5])
def test_a_few_frames_can_be_decoded(codec: MelVQ, n_frames: int) -> None:
    wave = codec.synthesise(codec.mean_M.expand(n_frames, -1))
    assert wave.shape == (256 * n_frames,)
    assert bool(torch.isfinite(wave).all())


def test_impossible_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot train codebook_size=64"):
        train([np.zeros(1_000, dtype=np.float32)], SPEC)
    bad = np.zeros(40_000, dtype=np.float32)
    bad[5] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        train([bad], SPEC)
    with pytest.raises(ValueError, match="uint16"):
        MelVQSpec(codebook_size=70_000)
    with pytest.raises(ValueError, match="use fewer bands"), pytest.warns(UserWarning, match="Empty filters"):
        MelVQ(MelVQSpec(hop=64, n_mels=100), torch.zeros(100), torch.zeros(8, 1024, 100))
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="not a melvq"):
        MelVQ.load(tmp_path / "x.npz")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    spec = MelVQSpec(n_mels=8, n_codebooks=1, codebook_size=4)
    whole = MelVQ(spec, torch.zeros(8), torch.zeros(1, 4, 8)).save(tmp_path / "m.npz").read_bytes()
    np.save(tmp_path / "matrix.npy", np.zeros(3))
    spoilt = bytearray(whole)
    spoilt[60:100] = b"\xff" * 40
    for data in (whole[:200], bytes(spoilt), b"", b"no codec", (tmp_path / "matrix.npy").read_bytes()):
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.npz is not a melvq") as caught:
            MelVQ.load(tmp_path / "x.npz")
        assert "\n" not in str(caught.value)
