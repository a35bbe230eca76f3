"""The TopK SAE: configuration, inference against SAELens' equations, folding, initial weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.sae.screen import ScreenedEncoder
from models.sae.trainer import SAEConfig, TopKSAE, encoder

CONFIG = SAEConfig(d_in=24, d_sae=96, k=6, seed=3)


def random_sae(config: SAEConfig = CONFIG, seed: int = 0) -> TopKSAE:
    """Weights with unequal decoder norms and nonzero biases, so that norms and biases matter."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE.from_config(config)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        weight = getattr(sae, name)
        weight.copy_(torch.randn(weight.shape, generator=generator))
    sae.W_dec.mul_(torch.rand(config.d_sae, 1, generator=generator) + 0.2)
    return sae


def dense_forward(sae: TopKSAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense activations [B, d_sae] and reconstruction in float64, from the model's equations."""
    W_enc, W_dec, b_enc, b_dec = (getattr(sae, n).double() for n in ("W_enc", "W_dec", "b_enc", "b_dec"))
    norm = W_dec.norm(dim=-1) if sae.rescale_acts_by_decoder_norm else torch.ones_like(b_enc)
    xc = x.double() - b_dec if sae.apply_b_dec_to_input else x.double()
    scores = (xc @ W_enc.T + b_enc) * norm
    top = scores.topk(sae.k, dim=-1)
    h = torch.zeros_like(scores).scatter(-1, top.indices, top.values.relu())
    return h, (h / norm) @ W_dec + b_dec


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_encode_and_decode_are_the_equations(rescale: bool, subtract: bool) -> None:
    config = SAEConfig(
        d_in=24, d_sae=96, k=6, seed=3, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=subtract
    )
    sae = random_sae(config)
    x = torch.randn(50, 24)
    h_dense, x_hat = dense_forward(sae, x)
    idx, h = sae.encode(x)
    assert idx.shape == h.shape == (50, 6)
    got = torch.zeros(50, 96).scatter(-1, idx, h)
    torch.testing.assert_close(got, h_dense.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(idx, h), x_hat.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), x_hat.float(), rtol=1e-5, atol=1e-5)


def test_chunks_and_leading_shape_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae()
    x = torch.randn(4, 7, 24)
    whole = sae(x)
    monkeypatch.setattr("models.sae.model.SCORE_BYTES", 3 * 4 * 96)
    torch.testing.assert_close(sae(x), whole, rtol=1e-5, atol=1e-4)
    assert whole.shape == x.shape
    idx, _ = sae.encode(x)
    assert idx.shape == (4, 7, 6)


def test_folding_keeps_the_function() -> None:
    sae = random_sae()
    x = torch.randn(64, 24)
    folded = sae.folded()
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(96))
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-5, atol=1e-5)
    (idx, h), (idx_f, h_f) = sae.encode(x), folded.encode(x)
    dense = torch.zeros(64, 96)
    torch.testing.assert_close(dense.scatter(-1, idx, h), dense.scatter(-1, idx_f, h_f), rtol=1e-5, atol=1e-5)


def test_folding_is_refused_where_it_changes_the_selection() -> None:
    config = SAEConfig(d_in=24, d_sae=96, k=6, seed=3, rescale_acts_by_decoder_norm=False)
    with pytest.raises(ValueError, match="folding would change the selection"):
        TopKSAE.from_config(config).folded()


def test_initial_weights_are_those_of_saelens() -> None:
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(CONFIG.seed)
    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=24, d_sae=96, k=6))
    ours = TopKSAE.from_config(CONFIG)
    assert torch.equal(ours.W_dec, theirs.W_dec)
    assert torch.equal(ours.W_enc, theirs.W_enc.T)
    assert torch.equal(ours.b_enc, theirs.b_enc)
    assert torch.equal(ours.b_dec, theirs.b_dec)


def test_seeds_differ_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = TopKSAE.from_config(CONFIG)
    assert torch.equal(torch.rand(3), expected)
    other = TopKSAE.from_config(SAEConfig(d_in=24, d_sae=96, k=6, seed=4))
    assert not torch.equal(first.W_dec, other.W_dec)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width 25, the SAE d_in=24"):
        random_sae().encode(torch.randn(2, 25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_sae": 16384, "k": 40000}, r"k=40000 exceeds d_sae=16384; choose k <= d_sae"),
        ({"k": 0}, "k=0 must be positive"),
        ({"schedule": "cosine"}, "schedule='cosine' cannot be nested: .* schedule='constant' or 'wsd'"),
        ({"schedule": "wsd"}, "decay_steps=0 does not fit schedule='wsd'"),
        ({"decay_steps": 3}, "decay_steps=3 does not fit schedule='constant'"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": float("nan")}, "lr=nan must be positive"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"aux_k": 97}, "aux_k=97 is outside"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is negative"),
    ],
)
def test_bad_configurations_say_what_to_change(change: dict, message: str) -> None:
    fields = {"d_in": 24, "d_sae": 96, "k": 6, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        SAEConfig(**fields)


def test_branch_step_of_a_budget() -> None:
    constant = SAEConfig(d_in=4, d_sae=8, k=2, seed=0, warmup_steps=5)
    assert constant.branch_step(20) == 20
    assert constant.branch_step(3) == 3
    wsd = SAEConfig(d_in=4, d_sae=8, k=2, seed=0, warmup_steps=5, schedule="wsd", decay_steps=4)
    assert wsd.branch_step(20) == 16
    with pytest.raises(ValueError, match="shorter than warmup_steps=5"):
        wsd.branch_step(8)


def hostile(x: torch.Tensor) -> torch.Tensor:
    """One enormous coordinate a token, which leaves nothing of the others in eight bits."""
    x = x.clone()
    x[..., 5] = 3000.0
    return x


@pytest.mark.parametrize("change", [{}, {"k": 96}, {"k": 1}, {"rescale_acts_by_decoder_norm": False}, {"d_in": 23}])
@pytest.mark.parametrize("prepare", [torch.clone, hostile], ids=["plain", "hostile to int8"])
def test_screened_encoder_has_the_support_of_the_full_product(change: dict, prepare: Callable) -> None:
    config = SAEConfig(**{"d_in": 24, "d_sae": 96, "k": 6, "seed": 3, **change})
    sae = random_sae(config)
    x = prepare(torch.randn(2, 150, config.d_in, generator=torch.Generator().manual_seed(4)))
    encode = ScreenedEncoder(sae, n_threads=1, rows=128)
    for _ in range(2):  # the second time in the precision that the first one chose
        idx, h = encode(x)
        wanted_idx, wanted_h = sae.encode(x)
        assert idx.shape == h.shape == (2, 150, config.k)
        assert idx.dtype == wanted_idx.dtype
        dense, wanted = (torch.zeros(2, 150, 96).scatter(-1, i, v) for i, v in ((idx, h), (wanted_idx, wanted_h)))
        assert torch.equal(idx.sort().values, wanted_idx.sort().values)
        torch.testing.assert_close(dense, wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()))


def test_the_encoder_chosen_here_is_exact() -> None:
    sae = random_sae()
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    idx, h = encoder(sae)(x)
    wanted_idx, wanted_h = sae.encode(x)
    assert torch.equal(idx.sort().values, wanted_idx.sort().values)
    torch.testing.assert_close(h.sort().values, wanted_h.sort().values)


def test_screened_encoder_refuses_what_it_cannot_rank() -> None:
    encode = ScreenedEncoder(random_sae(), n_threads=1)
    with pytest.raises(ValueError, match="width 25, the SAE d_in=24"):
        encode(torch.randn(2, 25))
    x = torch.randn(3, 24)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 72 activations are NaN or inf"):
        encode(x)
