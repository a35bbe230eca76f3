"""Memory caching against the paper's sums written out token by token, its limits, and its health."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from models.codec.cache_health import GateSums, gate_sums
from models.mixers.linear_attention import LinearAttention
from models.mixers.mamba import Mamba
from models.mixers.memory_cache import CachedLinearAttention, CachedOutput, MemoryCacheConfig

D, H, S, T = 12, 3, 4, 15


def _randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return module.double()


def _input(steps=T):
    return torch.randn(2, steps, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _gates(layer, x, t):
    """softmax of <W_u x_t, m_i> over complete segments and the running mean, written out."""
    done = t // S
    means = [x[:, i * S : (i + 1) * S].mean(1) for i in range(done)] + [x[:, done * S : t + 1].mean(1)]
    u = layer.gate.u(x[:, t])
    return torch.stack([(u * m).sum(-1) for m in means], -1).softmax(-1)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize(("bias", "rank"), [(None, None), (-2.0, 5)])
def test_output_is_the_sum_of_the_paper(normalized, cumulative, bias, rank):
    config = MemoryCacheConfig(
        segment=S, rank=rank, gate_bias_init=bias, normalized_retrieval=normalized, cumulative=cumulative
    )
    layer = _randomise(CachedLinearAttention(LinearAttention(D, H), D, config))
    x = _input()
    q, k, v = (part.unflatten(-1, (H, D // H)) for part in layer.inner.in_proj(x))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    rows = []
    for t in range(T):

        def read(start, stop, normalise, t=t):
            weight = torch.einsum("bhe,bshe->bhs", q[:, t], k[:, start:stop])
            values = torch.einsum("bhs,bshe->bhe", weight, v[:, start:stop])
            return values / (weight.sum(-1, keepdim=True) + 1e-6) if normalise else values

        gates = _gates(layer, x, t)
        current = read(0, t + 1, True)
        mixed = gates[:, -1, None, None] * current
        for i in range(t // S):
            mixed = mixed + gates[:, i, None, None] * read(0 if cumulative else i * S, (i + 1) * S, normalized)
        openness = 1.0 if bias is None else layer.gate.bias.sigmoid()
        rows.append(layer.inner.out((current + openness * (mixed - current)).flatten(1)))
    torch.testing.assert_close(layer(x), torch.stack(rows, 1), rtol=1e-9, atol=1e-11)


def test_delta_rule_caches_are_its_memories_at_the_boundaries():
    config = MemoryCacheConfig(segment=S, gate_bias_init=None)
    layer = _randomise(CachedLinearAttention(LinearAttention(D, H, delta_rule=True), D, config))
    x = _input()
    inputs = layer.inner.inputs(x)
    memory = torch.zeros(2, H, D // H, D // H, dtype=torch.float64)
    kept, rows = [], []
    for t in range(T):
        q, k, v, beta = (y[:, t] for y in (inputs.q, inputs.k, inputs.v, inputs.beta))
        error = v - torch.einsum("bhk,bhkv->bhv", k, memory)
        memory = memory + torch.einsum("bhk,bhv->bhkv", k, beta[..., None] * error)
        gates = _gates(layer, x, t)
        weights = [*gates.unbind(-1)]
        reads = [torch.einsum("bhk,bhkv->bhv", q, state) for state in (*kept, memory)]
        rows.append(sum(w[:, None, None] * r for w, r in zip(weights, reads, strict=True)).flatten(1))
        if (t + 1) % S == 0:
            kept.append(memory)
    torch.testing.assert_close(layer(x), layer.inner.out(torch.stack(rows, 1)), rtol=1e-9, atol=1e-11)


def test_cached_outputs_are_the_mixer_outputs_at_the_boundaries():
    inner = Mamba(D, d_state=4, expand=2, conv_width=4)
    layer = _randomise(CachedOutput(inner, D, MemoryCacheConfig(segment=S, gate_bias_init=None)))
    x = _input()
    current = inner(x)
    rows = []
    for t in range(T):
        gates = _gates(layer, x, t)
        cached = [current[:, (i + 1) * S - 1] for i in range(t // S)]
        rows.append(sum(gates[:, i, None] * y for i, y in enumerate([*cached, current[:, t]])))
    torch.testing.assert_close(layer(x), torch.stack(rows, 1), rtol=1e-9, atol=1e-11)


def test_a_shut_gate_is_the_control_and_an_open_gate_the_paper():
    inner = LinearAttention(D, H)
    paper = _randomise(CachedLinearAttention(inner, D, MemoryCacheConfig(segment=S, gate_bias_init=None)))
    biased = CachedLinearAttention(inner, D, MemoryCacheConfig(segment=S, gate_bias_init=0.0)).double()
    biased.gate.u.load_state_dict(paper.gate.u.state_dict())
    x = _input()
    for bias, expected in ((-50.0, inner(x)), (50.0, paper(x))):
        torch.nn.init.constant_(biased.gate.bias, bias)
        torch.testing.assert_close(biased(x), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(paper(x[:, :S]), inner(x[:, :S]), rtol=1e-12, atol=1e-12)
    assert (paper(x) - inner(x))[:, S:].abs().amax() > 1e-3


def test_unnormalised_reads_grow_with_the_number_of_tokens_and_normalised_reads_do_not():
    """The explanation the study needs a measurement for: phi(q) S_i is a sum over all tokens before the boundary."""

    def size(normalized, steps):
        config = MemoryCacheConfig(segment=S, gate_bias_init=None, normalized_retrieval=normalized)
        layer = _randomise(CachedLinearAttention(LinearAttention(D, H), D, config))
        torch.nn.init.zeros_(layer.gate.u.weight)  # equal weights for all choices
        x = _input(steps).abs()
        return float(layer(x)[:, -1].detach().norm())

    assert size(False, 32 * S) > 8 * size(False, 2 * S)
    assert size(True, 32 * S) < 2 * size(True, 2 * S)


def _gated() -> CachedLinearAttention:
    config = MemoryCacheConfig(segment=S, gate_bias_init=-2.0)
    layer = _randomise(CachedLinearAttention(LinearAttention(D, H), D, config))
    torch.nn.init.constant_(layer.gate.bias, -2.0)
    return layer


def test_health_of_uniform_and_of_shut_gates():
    layer = _gated()
    torch.nn.init.zeros_(layer.gate.u.weight)
    health = gate_sums(3, layer, _input()).health()
    choices = [t // S + 1 for t in range(S, T)]
    openness = 1 / (1 + math.exp(2.0))
    assert health.layer == 3
    assert health.entropy == pytest.approx(sum(math.log(n) for n in choices) / len(choices))
    assert health.entropy_share == pytest.approx(1.0)
    assert health.cache_mass == pytest.approx(sum(1 - 1 / n for n in choices) / len(choices))
    assert (health.gate_bias, health.openness) == (pytest.approx(-2.0), pytest.approx(openness))
    assert health.effective_mass == pytest.approx(openness * health.cache_mass)

    torch.nn.init.eye_(layer.gate.u.weight)
    own_segment = _input() * 0.01
    own_segment[:, S:] = 30 * torch.ones(D)  # the query is far closer to its own segment than to the first
    sharp = gate_sums(1, layer, own_segment[:, : 2 * S]).health()
    assert sharp.cache_mass < 1e-6
    assert sharp.entropy < 1e-4
    assert sharp.read_ratio < 1e-5
    assert math.isnan(gate_sums(1, layer, _input(S)).health().entropy)


def test_read_ratio_is_what_an_open_gate_would_add():
    layer, x = _gated(), _input()
    current = layer.inner.read_write(layer.inner.inputs(x))[0].detach()
    torch.nn.init.eye_(layer.inner.out.weight)
    torch.nn.init.constant_(layer.gate.bias, 60.0)
    change = (layer(x).detach().unflatten(-1, (H, -1)) - current)[:, S:]
    ratios = [float(change[b].norm() / current[b, S:].norm()) for b in range(2)]
    sums = gate_sums(1, layer, x)
    assert [h.read_ratio for h in sums.clips()] == pytest.approx(ratios)
    assert sums.health().read_ratio == pytest.approx(float(change.norm() / current[:, S:].norm()))


def test_health_by_clip_leaves_padding_out_and_looks_at_no_later_token():
    """Clips of a padded batch have the numbers they have alone, and none depends on what follows the clip's end."""
    layer, x = _gated(), _input()
    lengths = torch.tensor([T, 2 * S + 1])
    padded = x.clone()
    padded[1, 2 * S + 1 :] = 1e3
    together = gate_sums(1, layer, padded, lengths).clips()
    for b, length in enumerate(lengths.tolist()):
        alone = gate_sums(1, layer, x[b : b + 1, :length]).health()
        assert [*vars(together[b]).values()] == pytest.approx([*vars(alone).values()], rel=1e-9)
    assert gate_sums(1, layer, padded, lengths).steps.tolist() == [T - S, S + 1]
    both = gate_sums(1, layer, padded, lengths).health()
    steps = [T - S, S + 1]
    assert both.cache_mass == pytest.approx(
        sum(n * h.cache_mass for n, h in zip(steps, together, strict=True)) / sum(steps)
    )


def test_batches_pool_to_the_numbers_of_all_clips():
    layer, x = _gated(), _input()
    parts = [gate_sums(2, layer, x[b : b + 1]) for b in range(2)]
    assert vars(GateSums.pool(parts).health()) == pytest.approx(vars(gate_sums(2, layer, x).health()))
    with pytest.raises(ValueError, match=r"layers \[2, 3\] do not pool"):
        GateSums.pool([parts[0], gate_sums(3, layer, x)])


def test_health_of_a_model_lists_its_cached_layers(tiny_codec_lm, codec_tokens):
    health = [sums.health() for sums in tiny_codec_lm("mc_la").gate_sums(codec_tokens())]
    assert [h.layer for h in health] == [2, 3]
    assert all(0 < h.cache_mass < 1 and 0 < h.entropy_share <= 1 for h in health)
    assert all(h.gate_bias == pytest.approx(0.5, abs=0.5) for h in health)
    paper = tiny_codec_lm("mc_la_paper_gate").gate_sums(codec_tokens())[0].health()
    assert paper.openness == 1.0
    assert math.isnan(paper.gate_bias)
    assert tiny_codec_lm("gdn_hybrid").gate_sums(codec_tokens()) == []


def test_impossible_options_are_named():
    with pytest.raises(ValueError, match="segment=0 tokens"):
        MemoryCacheConfig(segment=0)
    with pytest.raises(ValueError, match="layers count from 1"):
        MemoryCacheConfig(start_layer=0)
    with pytest.raises(ValueError, match="rank=0 of W_u"):
        MemoryCacheConfig(rank=0)
    config = MemoryCacheConfig(normalized_retrieval=True)
    with pytest.raises(ValueError, match="the delta rule does not have"):
        CachedLinearAttention(LinearAttention(D, H, delta_rule=True), D, config)
    for bad in (config, replace(MemoryCacheConfig(), cumulative=False)):
        with pytest.raises(ValueError, match="use linear attention for these options"):
            CachedOutput(Mamba(D, d_state=4, expand=2, conv_width=4), D, bad)
