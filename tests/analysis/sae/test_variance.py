"""What owns the variance: closed forms on planted sinks, scikit-learn's PCA, stream = batch."""

from __future__ import annotations

import math

import pytest
import torch

from analysis.sae.columns import CONTROLS, LAYER_COLUMNS, SINK_SHARE
from analysis.sae.fidelity import SequenceSums
from analysis.sae.geometry import CovarianceSums
from analysis.sae.variance import ControlledErrors, Controls, VarianceSums, huge_tokens

S, T, HUGE, SMALL = 4, 256, 1000.0, 2.0


def planted(position: int = 0) -> torch.Tensor:
    """One token in 256 of length HUGE along the first axis; the others ±SMALL along the second and the third."""
    a = torch.zeros(S, T, 6, dtype=torch.float64)
    rest = torch.arange(S * T).reshape(S, T) != position + T * torch.arange(S)[:, None]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(S * (T - 1) // 4)
    flat = torch.zeros(S * (T - 1), 6, dtype=torch.float64)
    flat[: len(signs), 1], flat[len(signs) :, 2] = SMALL * signs, SMALL * signs
    a[rest] = flat
    a[~rest] = torch.tensor([HUGE, 0, 0, 0, 0, 0], dtype=torch.float64)
    return a


def layer(a: torch.Tensor, sizes: list[int] | None = None) -> VarianceSums:
    sums = VarianceSums(a.shape[0] * a.shape[1])
    for batch in a.split(sizes or [len(a)]):
        sums.update(batch)
    return sums


def controlled(a: torch.Tensor, a_hat: torch.Tensor, evaluated: torch.Tensor | None = None) -> dict[str, float]:
    sums = layer(a)
    kept = torch.ones(a.shape[:2], dtype=torch.bool) if evaluated is None else evaluated
    covariance = CovarianceSums()
    covariance.update(a[kept])
    errors = ControlledErrors(Controls.of(a, sums.norm_ST, covariance, kept))
    for start in range(0, len(a), 3):
        rows = slice(start, min(start + 3, len(a)))
        errors.update(a[rows], a_hat[rows], rows)
    found = errors.metrics()
    sse, sst = (sum(x) for x in errors.by_sequence().values())
    assert found["r2_no_sinks"] == pytest.approx(1 - sse / sst, rel=1e-12, abs=1e-12)
    return found


@pytest.mark.parametrize("position", [0, 2, 10])
def test_one_huge_token_in_256_has_its_closed_forms(position):
    a = planted(position)
    summary = layer(a).summary()
    huge, rest = HUGE**2 * (1 - 1 / T) ** 2, SMALL**2 + (HUGE / T) ** 2  # squared distances from the mean
    sst = S * huge + S * (T - 1) * rest
    sinks = S if position == 0 else 2 * S  # the first token is one, too
    shares = {
        "sst_share_first": S * (huge if position == 0 else rest) / sst,
        "sst_share_first4": S * (huge + 3 * rest if position < 4 else 4 * rest) / sst,
        "sst_share_top1pct": (S * huge + (math.ceil(0.01 * S * T) - S) * rest) / sst,
        "sst_share_sinks": (S * huge + (sinks - S) * rest) / sst,
        "sink_share": sinks / (S * T),
        "sst_share_eig2": 1 - (S * (T - 1) * SMALL**2 / 2) / sst,
        "sst_share_eig8": 1.0,
        "sst_token": sst / (S * T),
        "energy_token": (HUGE**2 + (T - 1) * SMALL**2) / T,
    }
    if position == 0:
        shares |= {"pr_no_sinks": 2.0, "r2_constant": 1 - S * (T - 1) * SMALL**2 / sst}
    assert {name: summary[name] for name in shares} == pytest.approx(shares, rel=1e-9)
    assert set(LAYER_COLUMNS) < set(summary)


def test_a_code_of_the_sinks_alone_has_the_constant_codes_r2_and_nothing_without_them():
    a = planted()
    a_hat = torch.zeros_like(a)
    a_hat[:, 0] = a[:, 0]
    found = controlled(a, a_hat)
    assert tuple(found) == CONTROLS
    expected = dict.fromkeys(CONTROLS, 0.0) | {"r2_whitened": 1 / 3}
    expected |= dict.fromkeys(("r2_deflated4", "r2_deflated8"), math.nan)  # three directions vary
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
    covariance = CovarianceSums()
    covariance.update(a)
    sums = SequenceSums(covariance.mean_D)
    sums.update(a, a_hat, range(S))
    assert sums.metrics()["r2"] == pytest.approx(layer(a).summary()["r2_constant"], rel=1e-12)
    assert sums.metrics()["r2"] > 0.998


def cloud(sequences: int = 12, tokens: int = 40, d: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 4, d)
    a = torch.randn(sequences, tokens, d, generator=generator, dtype=torch.float64) @ mixing + 5.0
    a[:, 0] *= 9.0
    a[3, 7] *= 30.0
    return a, a + torch.randn(a.shape, generator=generator, dtype=torch.float64)


def test_deflated_and_whitened_r2_are_scikit_learns():
    from sklearn.decomposition import PCA

    a, a_hat = cloud()
    found = controlled(a, a_hat)
    flat, flat_hat = (x.reshape(-1, 12).numpy() for x in (a, a_hat))
    for m in (1, 2, 4, 8):
        pca = PCA(n_components=12, svd_solver="full").fit(flat)
        y, y_hat = (pca.transform(x)[:, m:] for x in (flat, flat_hat))
        assert found[f"r2_deflated{m}"] == pytest.approx(1 - ((y - y_hat) ** 2).sum() / (y**2).sum(), rel=1e-9)
    white = PCA(n_components=12, whiten=True, svd_solver="full").fit(flat)
    y, y_hat = white.transform(flat), white.transform(flat_hat)
    assert found["r2_whitened"] == pytest.approx(1 - ((y - y_hat) ** 2).sum() / (y**2).sum(), rel=1e-9)


def test_r2_without_tokens_is_r2_of_the_others():
    a, a_hat = cloud()
    found = controlled(a, a_hat)
    huge = torch.zeros(a.shape[:2], dtype=torch.bool)
    huge[3, 7] = True
    assert huge_tokens(a.norm(dim=-1))[:, 1:].equal(huge[:, 1:])
    first = torch.arange(a.shape[1]).expand(a.shape[:2])
    chosen = {"first": first >= 1, "first4": first >= 4, "sinks": (first >= 1) & ~huge}
    summary = layer(a).summary()
    for name, kept in chosen.items():
        x, y = a[kept], a_hat[kept]
        expected = 1 - float((x - y).square().sum() / (x - x.mean(dim=0)).square().sum())
        assert found[f"r2_no_{name}"] == pytest.approx(expected, rel=1e-9)
    x = a[chosen["sinks"]]
    covariance = CovarianceSums()
    covariance.update(x)
    assert summary["pr_no_sinks"] == pytest.approx(covariance.summary()["pr"], rel=1e-8)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [2, 9, 1]])
def test_summary_is_the_same_for_any_batching(sizes):
    a, _ = cloud()
    a[5, 3:30] *= 50.0  # more of them than the sinks' share allows
    whole, parts = layer(a).summary(), layer(a, sizes).summary()
    assert parts == pytest.approx(whole, rel=1e-9)
    assert whole["sink_share"] == pytest.approx((12 + math.ceil(SINK_SHARE * 480)) / 480)


def test_tokens_that_were_not_announced_are_refused():
    sums = VarianceSums(100)
    sums.update(torch.randn(4, 10, 3))
    with pytest.raises(ValueError, match="40 tokens came of n_tokens=100"):
        sums.summary()


def test_tokens_that_are_not_evaluated_count_in_no_metric():
    a, a_hat = cloud()
    kept = torch.arange(40).expand(12, 40) >= 2
    exact = torch.where(kept[..., None], a_hat, a)
    whole, part = SequenceSums(a[:, 2:].flatten(0, 1).mean(dim=0)), SequenceSums(a[:, 2:].flatten(0, 1).mean(dim=0))
    whole.update(a, exact, range(12), a, kept)
    part.update(a[:, 2:], a_hat[:, 2:], range(12), a[:, 2:])
    assert whole.metrics() == pytest.approx(part.metrics(), rel=1e-12)
    assert whole.table()["n_tokens"].tolist() == [38] * 12
    found, expected = controlled(a, exact, kept), controlled(a[:, 2:], a_hat[:, 2:])
    for name in ("r2_deflated1", "r2_deflated8", "r2_whitened"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)
    assert found["r2_no_first"] == pytest.approx(whole.metrics()["r2"], rel=1e-9)


def test_default_sums_are_those_of_a_mask_of_everything_bit_for_bit():
    a, a_hat = cloud()
    tables = []
    for evaluated in (None, torch.ones(12, 40, dtype=torch.bool)):
        sums = SequenceSums(a.flatten(0, 1).mean(dim=0))
        sums.update(a.float(), a_hat.float(), range(12), a.float(), evaluated)
        tables.append(sums.table())
    assert tables[0].equals(tables[1])
