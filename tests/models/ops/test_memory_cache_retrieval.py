"""Memory-cache reads and gates: chunked = recurrent (float64), masks, gradients, causality, closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ops import (
    elu_feature_map,
    linear_attention,
    linear_attention_segments,
    memory_cache_retrieval,
    memory_cache_retrieval_step,
    segment_gate_logits,
)

B, T, H, K, V, SEGMENT = 2, 53, 3, 6, 5, 8
L = T // SEGMENT


def make_inputs(*, per_head: bool = False, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    gates = torch.softmax(randn(B, T, L, H) if per_head else randn(B, T, L), 2)
    q, z = elu_feature_map(randn(B, T, H, K)), 1 + elu_feature_map(randn(B, L, H, K))
    return [x.float().double() for x in (q, randn(B, L, H, K, V), gates, z)]


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).abs().max() / reference.abs().max()).item()


def run(inputs: list[Tensor], dtype: torch.dtype, impl: str, *, normalised: bool) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (inputs if normalised else inputs[:3])]
    normalizers = leaves[3] if normalised else None
    h = memory_cache_retrieval(*leaves[:3], segment=SEGMENT, normalizers=normalizers, impl=impl)
    loss_weights = torch.randn(h.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [h, *torch.autograd.grad(h, leaves, loss_weights.to(dtype))]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_chunked_float32_equals_recurrent_float64(per_head: bool, normalised: bool) -> None:
    inputs = make_inputs(per_head=per_head)
    expected = run(inputs, torch.float64, "recurrent", normalised=normalised)
    actual = run(inputs, torch.float32, "chunked", normalised=normalised)
    errors = [relative(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= 2e-6, errors


def test_gradcheck() -> None:
    q, states, gates, z = make_inputs()
    leaves = [q[:1, :11, :1], states[:1, :2, :1, :, :2], gates[:1, :11, :2], z[:1, :2, :1]]
    leaves = [x.clone().requires_grad_() for x in leaves]

    def chunked(q: Tensor, states: Tensor, gates: Tensor, z: Tensor) -> Tensor:
        return memory_cache_retrieval(q, states, gates, segment=4, normalizers=z)

    assert torch.autograd.gradcheck(chunked, leaves)


def test_unfinished_segments_are_not_read() -> None:
    q, states, gates, _ = make_inputs()
    h = memory_cache_retrieval(q, states, gates, segment=SEGMENT)
    assert h[:, :SEGMENT].abs().max() == 0
    disturbed = states.clone()
    disturbed[:, 3] = 1e6
    seen_from = 4 * SEGMENT
    changed = memory_cache_retrieval(q, disturbed, gates, segment=SEGMENT)
    assert torch.equal(changed[:, :seen_from], h[:, :seen_from])
    assert (changed[:, seen_from:] - h[:, seen_from:]).abs().min() > 0


def test_gate_of_one_reads_one_cache() -> None:
    q, states, _, z = make_inputs()
    gates = torch.zeros(B, T, L, dtype=torch.float64)
    gates[..., 1] = 1
    h = memory_cache_retrieval(q, states, gates, segment=SEGMENT, normalizers=z, eps=0.0)
    expected = torch.einsum("bthk,bhkv->bthv", q, states[:, 1])
    expected = expected / torch.einsum("bthk,bhk->bth", q, z[:, 1]).unsqueeze(3)
    torch.testing.assert_close(h[:, 2 * SEGMENT :], expected[:, 2 * SEGMENT :])


def test_normalised_reads_equal_linear_attention_over_the_cached_prefix() -> None:
    """A cache read with gate 1 is what linear attention would answer at the end of that segment."""
    gen = torch.Generator().manual_seed(1)
    q, k = (elu_feature_map(torch.randn(1, 24, 2, 4, generator=gen, dtype=torch.float64)) for _ in range(2))
    v = torch.randn(1, 24, 2, 3, generator=gen, dtype=torch.float64)
    _, _, (S, z) = linear_attention_segments(q, k, v, segment=8)
    gates = torch.zeros(1, 24, 3, dtype=torch.float64)
    gates[..., 0] = 1
    h = memory_cache_retrieval(q, S, gates, segment=8, normalizers=z)
    k_then_query = torch.cat([k[:, :8], torch.zeros_like(k[:, :1])], 1)
    v_then_zero = torch.cat([v[:, :8], torch.zeros_like(v[:, :1])], 1)
    for t in (8, 15, 23):
        queries = torch.cat([q[:, :8], q[:, t : t + 1]], 1)
        expected, _ = linear_attention(queries, k_then_query, v_then_zero)
        torch.testing.assert_close(h[:, t], expected[:, -1])


@pytest.mark.parametrize("per_head", [False, True])
def test_step_equals_the_sequence(per_head: bool) -> None:
    q, states, gates, z = make_inputs(per_head=per_head)
    h = memory_cache_retrieval(q, states, gates, segment=SEGMENT, normalizers=z)
    for t in (0, SEGMENT - 1, SEGMENT, T - 1):
        s = t // SEGMENT
        h_t = memory_cache_retrieval_step(q[:, t], states[:, :s], gates[:, t, :s], normalizers=z[:, :s])
        torch.testing.assert_close(h_t, h[:, t])


def test_gate_logits_equal_their_definition() -> None:
    gen = torch.Generator().manual_seed(2)
    u, x = (torch.randn(B, T, 7, generator=gen, dtype=torch.float64) for _ in range(2))
    logits = segment_gate_logits(u, x, segment=SEGMENT)
    assert logits.shape == (B, T, L + 1)
    for t in range(T):
        s = t // SEGMENT
        means = [x[:, i * SEGMENT : (i + 1) * SEGMENT].mean(1) for i in range(s)]
        means.append(x[:, s * SEGMENT : t + 1].mean(1))
        expected = torch.stack([(u[:, t] * m).sum(-1) for m in means], 1)
        torch.testing.assert_close(torch.cat([logits[:, t, :s], logits[:, t, -1:]], 1), expected)
        assert (logits[:, t, s:-1] == -torch.inf).all()


def test_memory_cached_attention_has_no_gradient_from_the_future() -> None:
    """Gates from segment means, cumulative states and reads together, cut in the middle of a segment."""
    gen = torch.Generator().manual_seed(4)
    leaf = torch.randn(1, 40, 8, generator=gen, dtype=torch.float64, requires_grad=True)
    x = leaf.view(1, 40, 2, 4)
    q = elu_feature_map(x)
    o, _, (S, z) = linear_attention_segments(q, q, x, segment=8)
    gates = torch.softmax(segment_gate_logits(leaf, leaf, segment=8), -1)
    h = memory_cache_retrieval(q, S, gates[..., :-1], segment=8, normalizers=z)
    y = gates[..., -1:, None] * o + h
    (grad,) = torch.autograd.grad(y[:, :21].square().sum(), leaf)
    assert grad.isfinite().all()
    assert grad[:, 21:].abs().max() == 0
    assert grad[:, :21].abs().min() > 0


def test_shorter_than_a_segment_reads_nothing() -> None:
    q, states, gates, _ = make_inputs()
    q = q[:, :5].clone().requires_grad_()
    h = memory_cache_retrieval(q, states[:, :0], gates[:, :5, :0], segment=SEGMENT)
    assert h.abs().max() == 0
    assert torch.autograd.grad(h.sum(), q)[0].abs().max() == 0
    assert segment_gate_logits(q[:, :, 0], q[:, :, 0], segment=SEGMENT).shape == (B, 5, 1)


def test_bfloat16_and_autocast_are_computed_in_float32() -> None:
    q, states, gates, z = make_inputs()
    q16 = q.bfloat16()
    expected = memory_cache_retrieval(q16.double(), states, gates, segment=SEGMENT, normalizers=z)
    with torch.autocast("cpu", torch.bfloat16):
        h = memory_cache_retrieval(q16, states.float(), gates.float(), segment=SEGMENT, normalizers=z.float())
    assert h.dtype == torch.bfloat16
    torch.testing.assert_close(h.double(), expected, rtol=2**-8, atol=1e-5)


def test_bad_arguments_say_what_to_do() -> None:
    q, states, gates, z = make_inputs()
    with pytest.raises(ValueError, match="5 cached states for 53 tokens in segments of 8; pass at least 6"):
        memory_cache_retrieval(q, states[:, :5], gates[..., :5], segment=SEGMENT)
    with pytest.raises(ValueError, match=r"gates has shape \(2, 53, 5\), expected"):
        memory_cache_retrieval(q, states, gates[..., :5], segment=SEGMENT)
    with pytest.raises(ValueError, match="normalizers has shape"):
        memory_cache_retrieval(q, states, gates, segment=SEGMENT, normalizers=z[:, :5])
    with pytest.raises(ValueError, match="segment=0 tokens"):
        segment_gate_logits(q[:, :, 0], q[:, :, 0], segment=0)
