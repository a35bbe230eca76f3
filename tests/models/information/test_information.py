"""Mutual information by critics: closed forms, planted dimensions, packed = alone, same seed = same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.host.logit_directions import principal_logits
from models.host.next_token_loss import NextTokenLoss
from models.information.critics import CriticBank, info_nce
from models.information.estimate import measure
from models.information.pairs import pair_scores, slow_pair_scores
from models.information.settings import CriticSettings
from models.information.training import Pairs, _Adam, train
from models.information.views import REACH, scaled

SMALL = CriticSettings(
    dimensions=(1, 2, 3), hidden=64, lr=2e-3, folds=2, starts=2, steps=500, every=50, patience=8, test_batches=16
)
LENGTH = 20
KAPPA = 0.3


def gaussian(rank: int, rho: float, tokens: int, width: int = 6) -> tuple[Tensor, Tensor]:
    """Views of `rank` pairs of correlation rho among noise, each rotated: sequences of LENGTH."""
    g = torch.Generator().manual_seed(rank)
    shared, own = torch.randn(2, tokens, rank, generator=g)
    views = (shared, rho * shared + math.sqrt(1 - rho**2) * own)
    rotated = []
    for z_TR in views:
        whole_TD = torch.cat([z_TR, torch.randn(tokens, width - rank, generator=g)], dim=1)
        turn_DD = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
        rotated.append((whole_TD @ turn_DD).unflatten(0, (-1, LENGTH)))
    return rotated[0], rotated[1]


def _bound(rank: int, rho: float) -> float:
    """InfoNCE of the true density ratio, by many batches; it falls short of −½ Σ log(1 − ρ²) by little here."""
    g = torch.Generator().manual_seed(0)
    x_MNR, own_MNR = torch.randn(2, 200, SMALL.batch, rank, generator=g)
    y_MNR = rho * x_MNR + math.sqrt(1 - rho**2) * own_MNR
    spread = 2 * (1 - rho**2)
    product_MNN = 2 * rho * x_MNR @ y_MNR.transpose(1, 2)
    squares_MNN = rho**2 * (x_MNR.square().sum(2)[:, :, None] + y_MNR.square().sum(2)[:, None])
    bound = float(info_nce((product_MNN - squares_MNN) / spread).mean())
    truth = -0.5 * rank * math.log(1 - rho**2)
    assert truth - 0.03 < bound < truth + 0.01
    return bound


def angles(tokens: int) -> tuple[Tensor, Tensor]:
    """Points on three quarters of a circle, and the same turned by 0.7 with Gaussian noise of KAPPA in the angle."""
    g = torch.Generator().manual_seed(0)
    x_T = 1.5 * math.pi * torch.rand(tokens, generator=g)
    y_T = x_T + 0.7 + KAPPA * torch.randn(tokens, generator=g)
    views = (torch.stack([a_T.cos(), a_T.sin()], dim=1).unflatten(0, (-1, LENGTH)) for a_T in (x_T, y_T))
    first, second = views
    return first, second


def test_gaussian_pairs_give_the_closed_form_and_their_rank_with_the_hybrid_critic() -> None:
    rank, rho = 2, 0.8
    found = measure(*gaussian(rank, rho, 12000), SMALL)
    best, mean_K = _bound(rank, rho), found.estimate_FK.mean(axis=0)
    assert found.estimate_FK.max() < best + 0.05  # 2,048 test pairs
    assert mean_K[1:].min() > best - 0.08
    assert mean_K[0] < 0.65 * best
    assert found.ratio_F == pytest.approx(rank, abs=0.5)


def test_a_separable_critic_needs_two_dimensions_for_an_angle_and_the_hybrid_one() -> None:
    views = angles(6000)
    mean = {}
    for critic in ("hybrid", "separable"):
        settings = replace(SMALL, critic=critic, dimensions=(1, 2), starts=1, steps=800)
        mean[critic] = measure(*views, settings).estimate_FK.mean(axis=0)
    assert mean["hybrid"][0] > 0.95 * mean["hybrid"][1]
    assert mean["separable"][0] < 0.7 * mean["separable"][1]
    assert mean["separable"][1] == pytest.approx(mean["hybrid"][1], abs=0.07)


def test_independent_pairs_carry_nothing() -> None:
    x_STD, _ = gaussian(1, 0.5, 6000)
    _, y_STD = gaussian(2, 0.5, 6000)
    found = measure(x_STD, y_STD, replace(SMALL, steps=250, starts=1))
    assert found.estimate_FK.max() <= 0.02


def test_the_same_seed_gives_the_same_bits() -> None:
    x_STD, y_STD = gaussian(2, 0.7, 3000)
    pairs, settings = Pairs(x_STD.flatten(0, 1), y_STD.flatten(0, 1)), replace(SMALL, steps=300, every=20, patience=3)
    train_T, test_T = torch.arange(2200), torch.arange(2200, 3000)

    def found(*dimensions: int) -> dict[int, list[tuple[int, float]]]:
        bank = CriticBank(settings, [(k, 0) for k in dimensions], pairs.widths, seed=5)
        return {m.k: m.curve for m in train(bank, pairs, train_T, test_T, seed=5)}

    together = found(1, 2, 3)
    assert together == found(1, 2, 3)
    assert len({len(curve) for curve in together.values()}) > 1  # some ended before others


@pytest.mark.parametrize("critic", ["hybrid", "separable"])
def test_a_packed_critic_has_the_estimate_and_gradients_that_it_has_alone(critic: str) -> None:
    # of one step: a product of one matrix is rounded in another way than one of a stack, Adam's first steps are signs
    # of gradients near 0, and after a hundred steps curves differ by up to .1 nats
    x_STD, y_STD = gaussian(2, 0.7, 260)
    pairs, settings = Pairs(x_STD.flatten(0, 1), y_STD.flatten(0, 1)), replace(SMALL, critic=critic)

    def of(*dimensions: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bank = CriticBank(settings, [(k, 0) for k in dimensions], pairs.widths, seed=5)
        weights = {name: w.requires_grad_(True) for name, w in bank.weights.items()}
        bits_M = info_nce(bank.scores(*pairs[torch.arange(settings.batch)]))
        return bits_M.detach(), dict(zip(weights, torch.autograd.grad(bits_M.sum(), weights.values()), strict=True))

    estimates_M, gradients = of(1, 2, 3)
    for m, k in enumerate((1, 2, 3)):
        alone_M, own = of(k)
        torch.testing.assert_close(estimates_M[m : m + 1], alone_M, rtol=0, atol=1e-5)
        for name, gradient in own.items():
            torch.testing.assert_close(gradients[name][m : m + 1], gradient, rtol=1e-4, atol=1e-6)
    bank = CriticBank(settings, [(k, 0) for k in (1, 2, 3)], pairs.widths, seed=5)
    bank.keep([2])
    left_M = info_nce(bank.scores(*pairs[torch.arange(settings.batch)]))
    torch.testing.assert_close(left_M, estimates_M[2:], rtol=0, atol=1e-5)


def test_critics_that_go_on_keep_their_moments() -> None:
    whole, left = (CriticBank(SMALL, [(k, 0) for k in (1, 2, 3)], (20, 20), seed=5) for _ in range(2))
    for bank in (whole, left):
        adam = _Adam(bank)
        for step in range(3):
            adam.step(torch.stack([(step - w).square().sum() for w in bank.weights.values()]).sum())
            if bank is left and step == 0:
                adam.keep([2])
    for name, w in left.weights.items():
        torch.testing.assert_close(w, whole.weights[name][2:], rtol=0, atol=0)


def test_pair_scores_are_plain_torchs_with_their_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 10, 7), (3, 10, 7), (3, 7))
    leaves = [torch.randn(*s, generator=g, requires_grad=True) for s in shapes]
    up_MNN = torch.randn(3, 10, 10, generator=g)
    fast, slow = (
        (s_MNN := score(*leaves), *torch.autograd.grad((s_MNN * up_MNN).sum(), leaves))
        for score in (pair_scores, slow_pair_scores)
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_info_nce_never_exceeds_log_n_and_is_0_for_a_constant() -> None:
    assert info_nce(1e3 * torch.eye(8)[None]).item() == pytest.approx(math.log(8))
    assert info_nce(torch.ones(2, 8, 8)).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_scaled_views_keep_far_tokens_near_and_directions_apart() -> None:
    g = torch.Generator().manual_seed(0)
    x_TD = torch.randn(500, 4, generator=g) * torch.tensor([1.0, 100.0, 0.01, 0.0]) + 7
    x_TD[::50] += 1e4
    z_TD = scaled(x_TD)
    assert z_TD.square().mean(dim=1).sqrt().max() <= REACH
    ordinary = torch.arange(500) % 50 > 0
    torch.testing.assert_close(z_TD[ordinary, :3].std(dim=0), torch.ones(3), rtol=0.15, atol=0)
    assert torch.isfinite(z_TD).all()


def test_principal_logits_are_the_logits_principal_components() -> None:
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 50)
    head.weight.data = torch.randn(50, 6, generator=g)
    hidden_BTD = torch.randn(4, 30, 6, generator=g)
    logits_NV = head(hidden_BTD).flatten(0, 1).detach().double()
    logits_NV -= logits_NV.mean(dim=1, keepdim=True)
    u_NK, s_K, _ = torch.linalg.svd(logits_NV - logits_NV.mean(dim=0), full_matrices=False)
    found_NM = principal_logits(NextTokenLoss(head), hidden_BTD, most=3).flatten(0, 1).double()
    expected_NM = u_NK[:, :3] * s_K[:3]
    sign_M = (found_NM * expected_NM).sum(dim=0).sign()
    torch.testing.assert_close(found_NM * sign_M, expected_NM, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("views", "changes", "error"),
    [
        ((1, 400, 6), {}, "sequences=1 cannot be split into 2 parts by sequence; give 2 or more"),
        (
            (4, 30, 6),
            {},
            "4 sequences of 30 tokens leave 60 to a part, fewer than batch=128; give 10 .* or more",
        ),
        ((4, 200, 6), {"dimensions": (2, 8)}, "k_z=8 exceeds width=6; choose k_z <= width"),
        ((4, 200, 6), {"critic": "bilinear"}, "critic='bilinear' is not known; choose hybrid or separable"),
        ((4, 200, 6), {"dimensions": (2, 1)}, r"dimensions=\(2, 1\) must ascend from 1 or more; give each k_z once"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    views: tuple[int, int, int], changes: dict[str, object], error: str
) -> None:
    with pytest.raises(ValueError, match=f"^{error}$"):
        measure(torch.zeros(views), torch.zeros(views), replace(SMALL, **changes))  # type: ignore[arg-type]
