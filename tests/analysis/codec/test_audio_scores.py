from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from analysis.bootstrap import bootstrap_ci
from analysis.codec.scores import CodebookScores, code_histograms, coherence
from models.codec.loss import codebook_loss

K, V, PAD = 3, 11, 10


def batch(b: int = 6, t: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(b, K, t, V, generator=generator)
    targets = torch.randint(0, PAD, (b, K, t), generator=generator)
    for i in range(b):
        targets[i, :, t - i :] = PAD
    return logits, targets


def add(scores: CodebookScores, logits_BKTV: torch.Tensor, targets_BKT: torch.Tensor, pad: int) -> None:
    """Clip by clip through the loss's heads, each of which picks its own codebook's logits."""
    _, books, _, size = logits_BKTV.shape
    heads_KVD = torch.eye(books * size, dtype=torch.float64).view(books, size, -1)
    for logits_KTV, targets_KT in zip(logits_BKTV.double(), targets_BKT, strict=True):
        hidden_1TD = logits_KTV.transpose(0, 1).flatten(1)[None]
        r = codebook_loss(hidden_1TD, heads_KVD, targets_KT[None], pad=pad, accuracy=True)
        assert r.top1_K is not None
        assert r.top5_K is not None
        scores.add({"nll": r.nll_K, "uniform": r.uniform_K, "count": r.count_K, "top1": r.top1_K, "top5": r.top5_K})


def test_scores_are_torchs_cross_entropy_and_topk() -> None:
    logits, targets = batch()
    scores = CodebookScores(K)
    add(scores, logits, targets, PAD)
    table = scores.table()
    for k in range(K):
        flat, target = logits[:, k].reshape(-1, V), targets[:, k].reshape(-1)
        expected = F.cross_entropy(flat.double(), target, ignore_index=PAD)
        real = target != PAD
        best = flat[real].topk(5, dim=1).indices == target[real][:, None]
        assert abs(table["nll"][k] - float(expected)) < 1e-12
        assert table["tokens"][k] == int(real.sum())
        assert table["top1"][k] == pytest.approx(float(best[:, 0].double().mean()))
        assert table["top5"][k] == pytest.approx(float(best.any(1).double().mean()))
    flat, target = logits.double().reshape(-1, V), targets.reshape(-1)
    assert abs(scores.val_nll() - float(F.cross_entropy(flat, target, ignore_index=PAD))) < 1e-12
    smoothed = F.cross_entropy(flat, target, ignore_index=PAD, label_smoothing=0.1)
    assert abs(scores.val_loss_smoothed(0.1) - float(smoothed)) < 1e-12


def test_any_batching_gives_the_same_numbers() -> None:
    logits, targets = batch()
    whole, pieces = CodebookScores(K), CodebookScores(K)
    add(whole, logits, targets, PAD)
    for a, b in ((4, 6), (0, 1), (1, 4)):
        add(pieces, logits[a:b], targets[a:b], PAD)
    assert np.allclose(whole.table(), pieces.table(), rtol=1e-12)
    assert whole.bits_per_second(75.0) == pytest.approx(pieces.bits_per_second(75.0), rel=1e-12)
    padded = CodebookScores(K)
    add(padded, F.pad(logits, (0, 0, 0, 4)), F.pad(targets, (0, 4), value=PAD), PAD)
    assert np.allclose(whole.table(), padded.table(), rtol=1e-12)


def test_a_uniform_model_pays_the_codecs_own_rate() -> None:
    scores = CodebookScores(8)
    nll = np.full((2, 8), 20 * math.log(1024))
    scores.add({"nll": nll, "uniform": nll, "count": np.full((2, 8), 20), "top1": nll * 0, "top5": nll * 0})
    assert scores.bits_per_second(75.0) == pytest.approx(6_000.0)
    assert scores.perplexity() == pytest.approx(1024.0)
    assert scores.val_loss_smoothed() == pytest.approx(math.log(1024))


def test_codebooks_with_unequal_counts_weigh_equally_in_bits_a_second() -> None:
    targets = torch.zeros(1, 2, 10, dtype=torch.long)
    targets[0, 1, 2:] = 4
    logits = torch.zeros(1, 2, 10, 5)
    logits[..., 4] = -1e9
    logits[0, 1, :, 1:] = -1e9
    scores = CodebookScores(2)
    add(scores, logits, targets, pad=4)
    assert scores.bits_per_second(10.0) == pytest.approx((2.0 + 0.0) * 10.0)


def test_interval_is_over_recordings() -> None:
    rng = np.random.default_rng(3)
    nll_C = 50 * (3.0 + np.repeat(rng.standard_normal(6), 5))  # five equal clips of each recording
    sums = {name: nll_C[:, None] * (name in ("nll", "uniform")) for name in ("nll", "uniform", "top1", "top5")}
    sums["count"] = np.full((30, 1), 50.0)
    by_clip, by_recording = CodebookScores(1), CodebookScores(1)
    by_clip.add(sums)
    by_recording.add(sums, [f"r{i // 5}" for i in range(30)])
    expected = stats.ttest_1samp(nll_C[::5] / 50, 0).confidence_interval()
    assert tuple(by_recording.val_nll_ci()) == pytest.approx(tuple(expected))
    assert by_clip.val_nll_ci().lo > by_recording.val_nll_ci().lo
    one = CodebookScores(1)
    one.add(sums, ["r"] * 30)
    assert math.isnan(one.val_nll_ci().lo)
    with pytest.raises(ValueError, match="2 recordings for 30 clips"):
        one.add(sums, ["a", "b"])


def test_interval_without_recordings_is_over_clips() -> None:
    scores = CodebookScores(1)
    rng = np.random.default_rng(0)
    nll = 100 * (3.0 + rng.standard_normal((400, 1)))
    scores.add({"nll": nll, "uniform": nll, "count": np.full((400, 1), 100.0), "top1": nll * 0, "top5": nll * 0})
    lo, hi = scores.val_nll_ci()
    assert lo < scores.val_nll() < hi
    assert hi - lo == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_score_errors() -> None:
    with pytest.raises(ValueError, match="no clip was added"):
        CodebookScores(K).table()
    with pytest.raises(ValueError, match=r"expected \[B, 2\]"):
        add(CodebookScores(2), *batch(), PAD)


def test_histograms_count_every_code_of_a_window() -> None:
    codes = np.array([[0, 0, 1, 2, 2, 2, 0], [3, 3, 3, 3, 0, 0, 0]])
    histogram = code_histograms(codes, 1.0, 4, window_s=4, hop_s=2)
    assert histogram.tolist() == [[[2, 1, 1, 0], [0, 0, 0, 4]], [[0, 1, 3, 0], [2, 0, 0, 2]]]


def test_coherence_closed_forms() -> None:
    how = {"window_s": 4.0, "hop_s": 2.0}
    first, second = [0, 0, 0, 1], [0, 1, 1, 1]
    assert coherence([first + second], 1.0, 2, **how) == pytest.approx(6 / 10)
    assert coherence([[5] * 12], 1.0, 8, **how) == pytest.approx(1.0)
    assert coherence([[1, 2, 1, 2, 3, 4, 3, 4]], 1.0, 8, **how) == 0.0
    assert coherence([first + second, [7] * 8], 1.0, 8, **how) == pytest.approx((0.6 + 1.0) / 2)
    # T = 10: windows at 0, 2, 4, 6; without overlap are (0, 4), (0, 6), (2, 6)
    codes = [0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    # with counts (4, 0), (2, 2) at all others
    cosines = [1 / math.sqrt(2), 1 / math.sqrt(2), 1.0]
    assert coherence([codes], 1.0, 2, **how) == pytest.approx(np.mean(cosines))
    assert math.isnan(coherence([[0] * 7], 1.0, 2, **how))


def test_coherence_ignores_the_names_of_codes_and_the_order_inside_a_window() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, 400))
    names = rng.permutation(16)
    value = coherence(codes, 25.0, 16)
    assert coherence(names[codes], 25.0, 16) == pytest.approx(value, rel=1e-12)
    assert coherence(codes[:, ::-1], 25.0, 16) == pytest.approx(value, rel=1e-12)


def test_a_steady_voice_is_more_coherent_than_a_changing_one() -> None:
    rng = np.random.default_rng(0)
    steady = [rng.integers(0, 20, (2, 800)) + 20 * (i % 3) for i in range(12)]
    changing = [
        np.concatenate([rng.integers(0, 20, (2, 200)) + 20 * rng.integers(3) for _ in range(4)], 1) for _ in steady
    ]
    a, b = (bootstrap_ci(np.array([coherence(c, 50.0, 60) for c in some])) for some in (steady, changing))
    assert a.lo > b.hi


def test_coherence_errors() -> None:
    with pytest.raises(ValueError, match="code 1024 is outside"):
        coherence(np.full((2, 700), 1024), 75.0, 1024)
    with pytest.raises(ValueError, match="must hold a frame"):
        coherence(np.zeros((2, 700), int), 0.1, 1024)
