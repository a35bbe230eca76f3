from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import sqrtm

from analysis.codec.audio_distance import (
    Embeddings,
    LogMelStatistics,
    _ClipMoments,
    embed_set,
    frechet_distance,
    frechet_of_gaussians,
    kernel_distance,
)


def one_a_clip(x_ND: np.ndarray, name: str = "x") -> Embeddings:
    return Embeddings(name, "test", np.asarray(x_ND, dtype=float), np.arange(len(x_ND)))


def test_frechet_closed_forms() -> None:
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.standard_normal(5), rng.standard_normal(5), rng.uniform(1, 2, 5), rng.uniform(1, 2, 5)
    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum()
    assert frechet_of_gaussians(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)
    a = rng.standard_normal((5, 5))
    cov = a @ a.T
    assert frechet_of_gaussians(m1, cov, m1, 9 * cov) == pytest.approx(4 * np.trace(cov), rel=1e-10)
    u, v = rng.standard_normal(5), rng.standard_normal(5)  # rank one: (|u|^2 + |v|^2 - 2 |u.v|)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_of_gaussians(m1, np.outer(u, u), m1, np.outer(v, v)) == pytest.approx(expected, rel=1e-6)
    b = rng.standard_normal((5, 5))
    other = b @ b.T
    by_root = np.trace(cov + other - 2 * sqrtm(cov @ other).real) + ((m1 - m2) ** 2).sum()
    assert frechet_of_gaussians(m1, cov, m2, other) == pytest.approx(by_root, rel=1e-8)


def test_weighted_moments_are_those_of_the_repeated_vectors() -> None:
    rng = np.random.default_rng(1)
    clip_N = np.array([0, 0, 0, 1, 2, 2, 3])
    x_ND = 50 + rng.standard_normal((7, 3))
    weight_C = np.array([2.0, 0.0, 1.0, 3.0])
    mean, cov = _ClipMoments(Embeddings("x", "test", x_ND, clip_N)).gaussian(weight_C)
    repeated = np.concatenate([np.repeat(x_ND[clip_N == c], int(w), axis=0) for c, w in enumerate(weight_C)])
    assert np.allclose(mean, repeated.mean(0), rtol=1e-12)
    assert np.allclose(cov, np.cov(repeated.T), rtol=1e-9)


def test_frechet_is_symmetric_and_rotation_invariant() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((60, 4)), 1 + 2 * rng.standard_normal((50, 4))
    q = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    value = frechet_distance(one_a_clip(x), one_a_clip(y)).value
    assert frechet_distance(one_a_clip(y), one_a_clip(x)).value == pytest.approx(value)
    turned = frechet_distance(one_a_clip(x @ q), one_a_clip(y @ q)).value
    assert turned == pytest.approx(value, rel=1e-9)
    assert frechet_distance(one_a_clip(x), one_a_clip(x)).value < 1e-9


def test_extrapolation_removes_the_bias_and_the_interval_covers() -> None:
    d, n, shift = 8, 80, 0.3
    truth = d * shift**2
    plain, extrapolated, covered = [], [], 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((n, d)), shift + rng.standard_normal((n, d))
        result = frechet_distance(one_a_clip(x), one_a_clip(y))
        plain.append(result.value)
        extrapolated.append(result.extrapolated)
        covered += result.interval.lo <= truth <= result.interval.hi
    error = np.std(extrapolated) / math.sqrt(24)
    assert np.mean(plain) - truth > 0.3
    assert abs(np.mean(extrapolated) - truth) < 0.15 + 2 * error
    assert covered >= 21


def test_a_distance_says_what_it_is() -> None:
    rng = np.random.default_rng(3)
    reference = Embeddings("held-out speech", "test", rng.standard_normal((12, 4)), np.arange(12) // 2)
    generated = Embeddings("samples", "test", rng.standard_normal((9, 4)), np.arange(9) // 3)
    text = str(frechet_distance(reference, generated))
    for part in ("samples (N=9, 3 clips)", "held-out speech (N=12, 6 clips)", "test", "at infinite N"):
        assert part in text
    singular = Embeddings("few", "test", rng.standard_normal((4, 4)), np.arange(4))
    assert "N=4 <= D=4" in frechet_distance(reference, singular).caveat


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_kernel_distance_is_the_double_sum_over_pairs_of_clips(kernel: str) -> None:
    rng = np.random.default_rng(4)
    a = Embeddings("a", "test", rng.standard_normal((9, 3)), np.array([0, 0, 1, 1, 1, 2, 3, 3, 3]))
    b = Embeddings("b", "test", 1 + rng.standard_normal((5, 3)), np.array([0, 1, 1, 2, 2]))
    x, y = ((e.x_ND - a.x_ND.mean(0)) / a.x_ND.std(0) for e in (a, b))
    pairs = [np.linalg.norm(x[i] - x[j]) for i in range(9) for j in range(i)]

    def k(u: np.ndarray, v: np.ndarray) -> float:
        if kernel == "polynomial":
            return (u @ v / 3 + 1) ** 3
        return math.exp(-((u - v) @ (u - v)) / (2 * np.median(pairs) ** 2))

    def within(z: np.ndarray, clip: np.ndarray) -> float:
        values = [k(u, v) for i, u in enumerate(z) for j, v in enumerate(z) if clip[i] != clip[j]]
        return float(np.mean(values))

    between = np.mean([k(u, v) for u in x for v in y])
    expected = within(x, a.clip_N) + within(y, b.clip_N) - 2 * between
    result = kernel_distance(a, b, kernel=kernel)  # type: ignore[arg-type]
    assert result.value == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_gaussians_is_closed_form() -> None:
    rng = np.random.default_rng(5)
    n, d, shift = 1_500, 2, 1.0
    x, y = rng.standard_normal((n, d)), rng.standard_normal((n, d)) + np.array([shift, 0.0])
    value = kernel_distance(one_a_clip(x), one_a_clip(y), kernel="rbf").value
    # x - x' ~ N(0, 2 I): its norm is Rayleigh with median sqrt(2) * sqrt(2 ln 2)
    square = 4 * math.log(2)
    same = square / (square + 2)
    expected = 2 * same - 2 * same * math.exp(-(shift**2) / (2 * (square + 2)))
    assert value == pytest.approx(expected, abs=0.02)


def test_kernel_distance_is_unbiased_and_finds_a_difference() -> None:
    values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((40, 4)), rng.standard_normal((30, 4))
        result = kernel_distance(one_a_clip(x), one_a_clip(y), kernel="rbf")
        values.append(result.value)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(40)
    moved = kernel_distance(one_a_clip(x), one_a_clip(y + 1))
    assert moved.value > max(values)
    assert moved.extrapolated is None
    assert "no interval" in str(moved)


def test_the_interval_is_of_the_jackknife_and_absent_for_few_clips() -> None:
    rng = np.random.default_rng(7)
    a, b = (Embeddings(n, "test", rng.standard_normal((60, 3)) + 1 * (n == "b"), np.arange(60) // 3) for n in "ab")
    whole, without = frechet_distance(a, b), []
    for left in (a, b):  # by hand: the distance without each clip of one of the two
        fewer = [
            Embeddings(left.name, "test", left.x_ND[left.clip_N != c], left.clip_N[left.clip_N != c]) for c in range(20)
        ]
        without.append([frechet_distance(*((f, b) if left is a else (a, f))).value for f in fewer])
    corrected = whole.value + sum(19 * (whole.value - np.mean(some)) for some in without)
    half = stats.t.ppf(0.975, 19) * math.sqrt(sum(19 * np.var(some) for some in without))
    assert whole.extrapolated == pytest.approx(corrected)
    assert tuple(whole.interval) == pytest.approx((corrected - half, corrected + half))
    few = [Embeddings(e.name, "test", e.x_ND[:33], e.clip_N[:33]) for e in (a, b)]
    found = frechet_distance(*few)
    assert math.isnan(found.interval.lo)
    assert "11 clips: no interval for fewer than 12" in str(found)
    assert "[–]" in str(found)


def test_clips_of_one_recording_are_one_clip_of_a_set() -> None:
    waves = [np.random.default_rng(i).standard_normal(16_000) for i in range(4)]
    found = embed_set([*waves, np.zeros(100)], LogMelStatistics(8_000, n_mels=4), "s", ["b", "a", "b", "c", "d"])
    per_clip = len(found.x_ND) // 4
    assert found.clip_N.tolist() == np.repeat([1, 0, 1, 2], per_clip).tolist()
    assert found.n_clips == 3


def test_pairs_must_share_an_embedder() -> None:
    x = one_a_clip(np.random.default_rng(0).standard_normal((5, 3)))
    other = Embeddings("y", "another", x.x_ND, x.clip_N)
    with pytest.raises(ValueError, match="use one embedder for both"):
        frechet_distance(x, other)
    with pytest.raises(ValueError, match="use one embedder for both"):
        kernel_distance(x, other)
    with pytest.raises(ValueError, match="'cubic'"):
        kernel_distance(x, x, kernel="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be resampled"):
        Embeddings("one", "test", np.zeros((3, 2)), np.zeros(3, int))
    with pytest.raises(ValueError, match="NaN"):
        one_a_clip(np.full((3, 2), np.nan))


def test_log_mel_statistics_hear_a_gain_as_a_shift() -> None:
    rng = np.random.default_rng(0)
    wave = 0.3 * rng.standard_normal(16_000 * 3)
    embedder = LogMelStatistics(16_000)
    x = embedder.embed(wave)
    assert x.shape[1] == 64
    assert len(x) == 5
    quieter = embedder.embed(0.5 * wave)
    assert np.allclose(quieter[:, :32] - x[:, :32], -20 * math.log10(2), atol=1e-3)
    assert np.allclose(quieter[:, 32:], x[:, 32:], atol=1e-3)
    assert embedder.embed(wave[:15_000]).shape == (0, 64)


def test_louder_and_filtered_noise_are_told_apart_from_the_same_noise() -> None:
    rng = np.random.default_rng(1)

    def noise(gain: float, n: int = 16) -> list[np.ndarray]:
        return [gain * rng.standard_normal(8_000 * 2) for _ in range(n)]

    embedder = LogMelStatistics(8_000, n_mels=8)
    reference = embed_set(noise(0.1), embedder, "reference")
    same = embed_set([*noise(0.1), np.zeros(100)], embedder, "same")
    louder = embed_set(noise(0.2), embedder, "louder")
    assert same.n_clips == 16
    near, far = (frechet_distance(reference, s) for s in (same, louder))
    assert far.interval.lo > 10 * near.value
    assert kernel_distance(reference, louder).value > 10 * abs(kernel_distance(reference, same).value)
    with pytest.raises(ValueError, match="none of 1 clips lasts"):
        embed_set([np.zeros(100)], embedder, "short")
