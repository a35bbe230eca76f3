"""Mixers against other people's: transformers' OLMo-hybrid, Mamba and Mamba-2, and formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.attention import Attention
from models.mixers.base import FusedLinear, GatedHeadNorm, inverse_softplus
from models.mixers.gated_delta import GatedDeltaNet, SimpleDeltaNet
from models.mixers.linear_attention import LinearAttention
from models.mixers.mamba import Mamba, Mamba2

D, T = 24, 19


def _random(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return module


def _input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def _assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@torch.no_grad()
def test_gated_deltanet_is_olmo_hybrids(monkeypatch):
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as hf

    # the decorated function would call Triton kernels wherever flash-linear-attention can be imported
    monkeypatch.setattr(hf, "torch_chunk_gated_delta_rule", hf.torch_chunk_gated_delta_rule.__wrapped__)
    config = OlmoHybridConfig(
        hidden_size=D,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=6,
        linear_value_head_dim=10,
        linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=True,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = _random(hf.OlmoHybridGatedDeltaNet(config, 0))
    ours = GatedDeltaNet(D, 3, 6, 10, conv_width=4, norm_eps=1e-5)
    projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj, theirs.a_proj, theirs.b_proj)
    ours.in_proj.weight.copy_(torch.cat([p.weight for p in projections]))
    ours.conv_weight.copy_(theirs.conv1d.weight.squeeze(1))
    ours.A_log.copy_(theirs.A_log)
    ours.dt_bias.copy_(theirs.dt_bias)
    ours.norm.norm.weight.copy_(theirs.o_norm.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)
    _assert_same_parameters(ours, theirs)
    expected = theirs(_input())
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(ours(_input()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mamba_is_transformers_mamba():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=D, state_size=7, expand=2, conv_kernel=4, time_step_rank=2, num_hidden_layers=1)
    theirs = _random(MambaMixer(config, 0)).eval()
    ours = Mamba(D, d_state=7, expand=2, conv_width=4)
    ours.in_proj.weight.copy_(theirs.in_proj.weight)
    ours.conv_weight.copy_(theirs.conv1d.weight.squeeze(1))
    ours.conv_bias.copy_(theirs.conv1d.bias)
    ours.x_proj.weight.copy_(theirs.x_proj.weight)
    ours.dt_proj.load_state_dict(theirs.dt_proj.state_dict())
    ours.A_log.copy_(theirs.A_log)
    ours.D.copy_(theirs.D)
    ours.out.weight.copy_(theirs.out_proj.weight)
    _assert_same_parameters(ours, theirs)
    expected = theirs(_input())
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(ours(_input()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mamba2_is_transformers_mamba2():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=D,
        state_size=7,
        expand=2,
        conv_kernel=4,
        n_groups=1,
        head_dim=16,
        num_heads=3,
        num_hidden_layers=1,
        chunk_size=8,
        use_bias=False,
        layer_norm_epsilon=1e-6,
    )
    theirs = _random(Mamba2Mixer(config, 0)).eval()
    ours = Mamba2(D, d_state=7, expand=2, head_width=16, conv_width=4, norm_eps=1e-6)
    ours.in_proj.weight.copy_(theirs.in_proj.weight)
    ours.conv_weight.copy_(theirs.conv1d.weight.squeeze(1))
    ours.conv_bias.copy_(theirs.conv1d.bias)
    ours.dt_bias.copy_(theirs.dt_bias)
    ours.A_log.copy_(theirs.A_log)
    ours.D.copy_(theirs.D)
    ours.norm.weight.copy_(theirs.norm.weight)
    ours.out.weight.copy_(theirs.out_proj.weight)
    _assert_same_parameters(ours, theirs)
    expected = theirs(_input())
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(ours(_input()), expected, rtol=1e-4, atol=1e-5)


def test_attention_is_its_formula_with_rotations_as_complex_numbers():
    layer = _random(Attention(D, 4, 2, rope_base=500_000.0, norm_eps=1e-6)).double()
    x, width = _input(torch.float64), D // 4
    weights = layer.qkv.weight.split(layer.qkv.sizes)
    q, k, v = ((x @ w.T).unflatten(-1, (-1, width)) for w in weights)

    def normed_and_turned(y, weight):
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        turn = torch.outer(torch.arange(T).double(), 500_000.0 ** (-2 * torch.arange(width // 2).double() / width))
        unit = torch.polar(torch.ones_like(turn), turn)
        return torch.complex(*y.split(width // 2, dim=-1)) * unit[:, None]

    q, k = normed_and_turned(q, layer.q_norm.weight), normed_and_turned(k, layer.k_norm.weight)
    heads = []
    for h in range(4):
        scores = torch.einsum("bie,bje->bij", q[:, :, h], k[:, :, h // 2].conj()).real / width**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, :, h // 2])
    expected = layer.out(torch.cat(heads, -1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_attention_scores_depend_on_distance_only():
    """Rotary positions: shifting a whole sequence behind an ignored prefix changes nothing between its own tokens."""
    layer = _random(Attention(D, 4, 4, rope_base=500_000.0, norm_eps=1e-6)).double()
    x = _input(torch.float64)
    _, cache = layer.prefill(x[:, :1], 40)
    _, shifted = layer.prefill(x[:, :1], 40)
    for state, start in ((cache, 1), (shifted, 9)):
        state.length = start
        state.k[:, :, :start], state.v[:, :, :start] = 0, 0
        for t in range(5):
            layer.step(x[:, t], state)
    q = layer._qkv(x[:, 5:6], cache.cos[6], cache.sin[6])[0]
    moved = layer._qkv(x[:, 5:6], cache.cos[14], cache.sin[14])[0]
    torch.testing.assert_close(
        q @ cache.k[:, :, 1:6].transpose(2, 3), moved @ shifted.k[:, :, 9:14].transpose(2, 3), rtol=1e-10, atol=1e-12
    )


def test_simple_deltanet_is_its_recurrence():
    layer = _random(SimpleDeltaNet(D, 3, norm_eps=1e-6)).double()
    x, width = _input(torch.float64), D // 3
    q, k, v = (y.unflatten(-1, (3, width)) for y in layer.qkv(x))
    q, k = F.normalize(layer.q_norm(q), dim=-1), F.normalize(layer.k_norm(k), dim=-1)
    decay, beta = layer.decay_gate(x).sigmoid(), 2 * layer.write_gate(x).sigmoid()
    memory = torch.zeros(2, 3, width, width, dtype=torch.float64)
    rows = []
    for t in range(T):
        outer = torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
        memory = decay[:, t, :, None, None] * (memory - beta[:, t, :, None, None] * (outer @ memory))
        memory = memory + beta[:, t, :, None, None] * torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        rows.append(torch.einsum("bhi,bhij->bhj", q[:, t], memory).flatten(1) / width**0.5)
    torch.testing.assert_close(layer(x), layer.out(torch.stack(rows, 1)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("delta_rule", [False, True])
def test_linear_attention_is_its_sum(delta_rule):
    layer = _random(LinearAttention(D, 3, delta_rule=delta_rule)).double()
    x = _input(torch.float64)
    q, k, v, *b = layer.in_proj(x)
    q, k, v = (y.unflatten(-1, (3, D // 3)) for y in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    if delta_rule:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        memory = torch.zeros(2, 3, D // 3, D // 3, dtype=torch.float64)
        rows = []
        for t in range(T):
            error = v[:, t] - torch.einsum("bhi,bhij->bhj", k[:, t], memory)
            memory = memory + b[0][:, t].sigmoid()[..., None, None] * torch.einsum("bhi,bhj->bhij", k[:, t], error)
            rows.append(torch.einsum("bhi,bhij->bhj", q[:, t], memory))
        o = torch.stack(rows, 1)
    else:
        weight = torch.einsum("bthe,bshe->bhts", q, k).tril()
        o = torch.einsum("bhts,bshe->bthe", weight / (weight.sum(-1, keepdim=True) + 1e-6), v)
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)), rtol=1e-9, atol=1e-11)


def test_attention_cache_that_is_full_says_so():
    layer = _random(Attention(D, 4, 2, rope_base=500_000.0, norm_eps=1e-6))
    _, cache = layer.prefill(_input()[:, :3], 3)
    with pytest.raises(ValueError, match="step 4 exceeds the cache of 3 steps"):
        layer.step(_input()[:, 3], cache)


def test_parts_of_a_fused_projection_are_initialised_on_their_own():
    layer = FusedLinear(300, (300, 3))
    layer.init_weights(torch.Generator().manual_seed(0))
    square, narrow = layer.weight.split((300, 3))
    for part, bound in ((square, (6 / 600) ** 0.5), (narrow, (6 / 303) ** 0.5)):
        assert 0.98 * bound < float(part.detach().abs().max()) <= bound


def test_gated_head_norm_has_unit_scale_before_the_gate():
    norm = GatedHeadNorm(8, 1e-12)
    x, gate = torch.randn(3, 5, 8), torch.full((3, 5, 8), 20.0)
    out = norm(x, gate) / F.silu(gate)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(3, 5))


def test_inverse_softplus():
    x = torch.logspace(-6, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(F.softplus(inverse_softplus(x)), x, rtol=1e-9, atol=0)
