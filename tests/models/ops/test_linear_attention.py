"""Linear attention: chunked = recurrent (float64), cached states, gradients, causality, foreign references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ops import (
    elu_feature_map,
    linear_attention,
    linear_attention_segments,
    linear_attention_step,
)

B, H, K, V = 2, 3, 8, 5


def make_inputs(T: int = 150, *, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k = (elu_feature_map(torch.randn(B, T, H, K, generator=gen, dtype=torch.float64)) for _ in range(2))
    v = torch.randn(B, T, H, V, generator=gen, dtype=torch.float64)
    S = torch.rand(B, H, K, V, generator=gen, dtype=torch.float64)
    z = torch.rand(B, H, K, generator=gen, dtype=torch.float64)
    return [x.float().double() for x in (q, k, v, S, z)]


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).abs().max() / reference.abs().max()).item()


def run(
    inputs: list[Tensor], dtype: torch.dtype, impl: str, *, segment: int, cumulative: bool, normalize: bool
) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    q, k, v, S, z = leaves
    o, final, cached = linear_attention_segments(
        q, k, v, segment=segment, cumulative=cumulative, initial_state=(S, z), scale=0.5, normalize=normalize,
        impl=impl,
    )  # fmt: skip
    results = [o, *final, *cached]
    gen = torch.Generator().manual_seed(5)
    loss_weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(dtype) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, loss_weights)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("segment", [32, 37, 320])
def test_chunked_float32_equals_recurrent_float64(segment: int, cumulative: bool, normalize: bool) -> None:
    inputs = make_inputs(T=330 if segment == 320 else 150)
    options = {"segment": segment, "cumulative": cumulative, "normalize": normalize}
    expected = run(inputs, torch.float64, "recurrent", **options)
    actual = run(inputs, torch.float32, "chunked", **options)
    errors = [relative(a, e) for a, e in zip(actual, expected, strict=True)]
    assert len(errors) == 10
    assert max(errors) <= 2e-6, errors


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_any_length(T: int) -> None:
    q, k, v, S, z = make_inputs(T)
    slow, slow_state = linear_attention(q, k, v, initial_state=(S, z), impl="recurrent")
    fast, fast_state = linear_attention(q, k, v, initial_state=(S, z), impl="chunked")
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast_state, slow_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cumulative", [True, False])
def test_gradcheck(cumulative: bool) -> None:
    leaves = [x[:1, :, :1].requires_grad_() for x in make_inputs(T=7)[:3]]

    def chunked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        o, final, cached = linear_attention_segments(q, k, v, segment=3, cumulative=cumulative)
        return (o, *final, *cached)

    assert torch.autograd.gradcheck(chunked, leaves)


@pytest.mark.parametrize("used", range(5))
def test_gradient_when_only_one_result_is_used(used: int) -> None:
    grads = {}
    for impl in ("recurrent", "chunked"):
        leaves = [x.requires_grad_() for x in make_inputs(T=20)[:3]]
        o, final, cached = linear_attention_segments(*leaves, segment=8, impl=impl)
        result = (o, *final, *cached)[used]
        grads[impl] = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)
    for slow, fast in zip(grads["recurrent"], grads["chunked"], strict=True):
        torch.testing.assert_close(fast, torch.zeros_like(fast) if slow is None else slow)


def test_cached_states_are_the_states_at_the_boundaries() -> None:
    q, k, v, *_ = make_inputs(T=100)
    _, final, (S, z) = linear_attention_segments(q, k, v, segment=24)
    assert S.shape == (B, 4, H, K, V)
    for i in range(4):
        _, (S_i, z_i) = linear_attention(q[:, : 24 * (i + 1)], k[:, : 24 * (i + 1)], v[:, : 24 * (i + 1)])
        torch.testing.assert_close(S[:, i], S_i)
        torch.testing.assert_close(z[:, i], z_i)
    _, _, (S_own, z_own) = linear_attention_segments(q[:, :96], k[:, :96], v[:, :96], segment=24, cumulative=False)
    torch.testing.assert_close(S_own.cumsum(1), S)
    torch.testing.assert_close(z_own.cumsum(1), z)
    torch.testing.assert_close(final[1], k.sum(1))


def test_shorter_than_a_segment_caches_nothing() -> None:
    q, k, v, *_ = make_inputs(T=10)
    leaf = k.requires_grad_()
    o, _, (S, z) = linear_attention_segments(q, leaf, v, segment=16)
    assert S.shape == (B, 0, H, K, V)
    assert z.shape == (B, 0, H, K)
    torch.testing.assert_close(o, linear_attention(q, k, v)[0])
    assert torch.autograd.grad(o.sum(), leaf)[0].abs().sum() > 0


def test_normalised_output_is_an_average_of_values() -> None:
    q, k, v, *_ = make_inputs(T=70)
    o, _ = linear_attention(q, k, torch.ones_like(v), eps=0.0)
    torch.testing.assert_close(o, torch.ones_like(o))
    o, _ = linear_attention(q, k, v, eps=0.0)
    torch.testing.assert_close(o[:, 0], v[:, 0])


def test_equals_quadratic_attention() -> None:
    q, k, v, *_ = make_inputs(T=70)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    expected = torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), v)
    torch.testing.assert_close(linear_attention(q, k, v, eps=0.0)[0], expected)


def test_steps_equal_the_sequence() -> None:
    q, k, v, S, z = (x.float() for x in make_inputs(T=40))
    o, final = linear_attention(q, k, v, initial_state=(S, z))
    state = (S, z)
    for t in range(40):
        o_t, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state)
        torch.testing.assert_close(o_t, o[:, t], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_no_gradient_from_the_future() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(T=150)[:3]]
    o, _, _ = linear_attention_segments(*leaves, segment=32)
    for x in torch.autograd.grad(o[:, :70].square().sum(), leaves):
        assert x[:, 70:].abs().max() == 0
        assert x[:, :70].abs().max() > 0


def test_bfloat16_and_autocast_are_computed_in_float32() -> None:
    inputs = [x.bfloat16() for x in make_inputs(T=150)[:3]]
    expected, (S, _) = linear_attention(*(x.double() for x in inputs), impl="recurrent")
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [x.requires_grad_() for x in inputs]
        o, (S32, _) = linear_attention(*leaves)
        grads = torch.autograd.grad(o.float().square().sum(), leaves)
    assert o.dtype == torch.bfloat16
    assert relative(S32, S) <= 2e-6
    torch.testing.assert_close(o.double(), expected, rtol=2**-8, atol=1e-6)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in grads)


@pytest.mark.parametrize("normalize", [True, False])
def test_flash_linear_attention_naive_functions_agree(normalize: bool) -> None:
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn, naive_recurrent_linear_attn

    q, k, v = (x.float() for x in make_inputs(T=128)[:3])
    o, (S, _) = linear_attention(q, k, v, normalize=normalize, eps=1e-10)
    theirs, their_state = naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=normalize, output_final_state=True)
    torch.testing.assert_close(o, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(S, their_state[0] if normalize else their_state, rtol=1e-4, atol=1e-4)
    chunked = naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=normalize)
    torch.testing.assert_close(o, chunked, rtol=1e-4, atol=1e-4)


def test_bad_arguments_say_what_to_do() -> None:
    q, k, v, S, z = make_inputs(T=8)
    with pytest.raises(ValueError, match=r"segment=131 has no divisor in 16\.\.128"):
        linear_attention_segments(q, k, v, segment=131)
    with pytest.raises(ValueError, match="segment=0 tokens; choose segment >= 1"):
        linear_attention_segments(q, k, v, segment=0)
    with pytest.raises(ValueError, match=r"q has shape \(2, 7, 3, 8\), expected"):
        linear_attention(q[:, :7], k, v)
    with pytest.raises(ValueError, match=r"initial_state\[1\] has shape"):
        linear_attention(q, k, v, initial_state=(S, z[..., :2]))
    with pytest.raises(ValueError, match="impl='fused' is not one of auto, recurrent, chunked"):
        linear_attention(q, k, v, impl="fused")
