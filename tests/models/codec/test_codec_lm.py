"""Codec language models: causality, decoding = full forward, initial weights, learning, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models.codec.delay import training_pair
from models.codec.model import build_codec_lm
from models.mixers.memory_cache import MemoryCacheConfig


def test_no_gradient_flows_from_an_output_to_a_later_step(codec_architecture, tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm(codec_architecture)
    x = model.embed(codec_tokens()).detach().requires_grad_()
    hidden = model.decode_embedded(x)
    for t in (0, 4, 9, 13):  # both sides of the segment boundaries at 5, 10, 15
        (gradient,) = torch.autograd.grad(hidden[:, t].square().sum(), x, retain_graph=True)
        assert torch.count_nonzero(gradient[:, t + 1 :]) == 0
        assert gradient[:, t].abs().amax() > 0
        if t:
            assert gradient[:, 0].abs().amax() > 0, "no path from the first step: the mixer does not mix"


def test_changing_later_columns_leaves_earlier_logits_unchanged(codec_architecture, tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm(codec_architecture, dtype=torch.float64).eval()
    x = codec_tokens()
    changed = x.clone()
    changed[..., 11:] = (changed[..., 11:] + 1) % 16
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-12)
    assert (before[:, 11] - after[:, 11]).abs().amax() > 1e-6


def test_delay_pattern_shows_a_frame_only_coarser_codebooks_of_itself(tiny_codec_lm):
    """The prediction of codebook k of frame t depends on codebook j of frame s if and only if t + k > s + j."""
    model = tiny_codec_lm("gdn_hybrid", dtype=torch.float64).eval()
    K, T = 3, 9
    codes = torch.randint(0, 13, (1, K, T), generator=torch.Generator().manual_seed(0))

    def column_logits(c):
        return model(training_pair(c, pad=13, bos=14)[0])

    with torch.no_grad():
        base = column_logits(codes)
        for j in range(K):
            for s in (0, 4):
                changed = codes.clone()
                changed[0, j, s] = (changed[0, j, s] + 1) % 13
                moved = (column_logits(changed) - base).abs().amax(-1)[0]  # [L, K], L = T + K - 1
                for k in range(K):
                    for t in range(T):
                        depends = bool(moved[t + k, k] > 1e-9)
                        assert depends == (t + k > s + j), (j, s, k, t)


@pytest.mark.parametrize("prefix", [1, 5, 12])
def test_decoding_step_by_step_equals_the_full_forward(codec_architecture, prefix, tiny_codec_lm, codec_tokens):
    x = codec_tokens()
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        model = tiny_codec_lm(codec_architecture, dtype=dtype).eval()
        with torch.no_grad():
            full = model(x)
        logits, state = model.prefill(x[..., :prefix], x.shape[-1])
        decoded = [logits]
        for t in range(prefix, x.shape[-1]):
            logits, state = model.step(x[..., t], state)
            decoded.append(logits)
        torch.testing.assert_close(torch.stack(decoded, 1), full[:, prefix - 1 :], rtol=0, atol=tolerance)


def test_kernels_agree_in_the_whole_model(codec_architecture, tiny_codec_lm, codec_tokens):
    x = codec_tokens()
    losses, gradients = [], []
    for impl in ("recurrent", "chunked"):
        model = tiny_codec_lm(codec_architecture, dtype=torch.float64, impl=impl)
        result = model.loss(x[..., :-1], x[..., 1:])
        result.loss.backward()
        losses.append(result.loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


def test_every_parameter_receives_a_gradient(codec_architecture, tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm(codec_architecture)
    x = codec_tokens()
    model.loss(x[..., :-1], x[..., 1:]).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_overfits_one_batch(codec_architecture, tiny_config):
    model = build_codec_lm(tiny_config(codec_architecture), seed=0)
    codes = torch.randint(0, 13, (2, 3, 8), generator=torch.Generator().manual_seed(5))
    inputs, targets = training_pair(codes, pad=model.config.pad, bos=model.config.bos)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (60 - step) / 30)
        optimizer.zero_grad()
        result = model.loss(inputs, targets, label_smoothing=0.0)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # both clips start with the same BOS column, so the first target of codebook 0 stays a coin toss
    coin_toss = 2 * math.log(2) / int(result.count_K.sum())
    assert float(result.nll_K.sum() / result.count_K.sum()) < coin_toss + 0.02


def test_initial_weights_follow_the_rules_on_every_parameter(codec_architecture, tiny_config):
    config = tiny_config(codec_architecture)
    model = build_codec_lm(config, seed=4)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    again, other = build_codec_lm(config, seed=4), build_codec_lm(config, seed=5)
    for (key, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), key
        if p.dim() >= 2 and "A_log" not in key:
            assert not torch.equal(p, r), key
    down = model.blocks[0].mlp.down.weight
    bound = math.sqrt(6 / sum(down.shape)) / math.sqrt(2 * config.n_layers)
    assert 0.95 * bound < down.abs().max() <= bound
    head_bound = math.sqrt(6 / (config.vocabulary + config.d_model))
    assert 0.95 * head_bound < model.heads.abs().max() <= head_bound


def test_building_a_model_leaves_the_global_random_state_alone(tiny_config):
    before = torch.get_rng_state()
    build_codec_lm(tiny_config("gdn_hybrid"))
    assert torch.equal(before, torch.get_rng_state())


def test_published_ranges_of_the_recurrence_parameters(tiny_config):
    model = build_codec_lm(tiny_config("gdn", n_heads=4, d_model=512, n_layers=8), seed=0)
    mixers = [block.mixer for block in model.blocks]
    dt = torch.cat([F.softplus(m.dt_bias) for m in mixers])
    A = torch.cat([m.A_log.exp() for m in mixers])
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert dt.log().std() > 0.8  # log-uniform over two decades: 4.6 / sqrt(12) = 1.33
    assert A.min() >= 0
    assert A.max() <= 16
    assert 5 < A.mean() < 11


def test_autocast_stays_close_to_float32_and_trains(tiny_codec_lm, codec_tokens):
    for name in ("gdn_hybrid", "mc_la_low_rank_normalized", "mamba2", "mc_mamba"):
        model = tiny_codec_lm(name, spread=0.02)
        x = codec_tokens()
        full = model.loss(x[..., :-1], x[..., 1:]).loss
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model.loss(x[..., :-1], x[..., 1:]).loss
        narrow.backward()
        assert abs(float(narrow.detach() - full.detach())) < 0.03 * float(full.detach())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_bad_inputs_are_named(tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm("gdn_hybrid")
    with pytest.raises(ValueError, match="token 16 is outside the vocabulary of 16"):
        model(torch.full((1, 3, 4), 16))
    with pytest.raises(ValueError, match=r"expected \[B, K, T\] with K=3"):
        model(torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="5 steps exceed max_steps=4"):
        model.prefill(codec_tokens(steps=5), 4)
    _, state = model.prefill(codec_tokens(steps=4), 4)
    with pytest.raises(ValueError, match="step 5 exceeds max_steps=4"):
        model.step(codec_tokens(steps=1)[..., 0], state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 30}, "does not split into 4 heads"),
        ({"n_kv_heads": 3}, "not a multiple of n_kv_heads=3"),
        ({"mixer": "gru"}, "mixer='gru' is not one of"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"memory_cache": MemoryCacheConfig(start_layer=4)}, "start_layer=4 exceeds n_layers=3"),
        ({"mixer": "mamba2", "mamba2_head": 24}, "does not split into heads of mamba2_head=24"),
    ],
)
def test_impossible_configurations_are_named(changes, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        tiny_config("la", **changes)


def test_attention_layers_of_the_hybrids(tiny_config):
    def pattern(**kwargs):
        return "".join("A" if m == "attention" else "." for m in tiny_config("gdn", **kwargs).mixers)

    assert pattern(n_layers=8, attention_every=4) == "...A...A"
    assert pattern(n_layers=10, attention_every=4, force_final_attention=True) == "...A...A.A"
    assert pattern(n_layers=5) == "....."
