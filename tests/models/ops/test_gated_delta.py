"""Gated delta rule: chunked = recurrent (float64), gradients, states, causality, foreign references, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.cpu.threads import torch_threads
from models.ops import _delta_rule_chunked, _delta_rule_torch, gated_delta, gated_delta_step
from models.ops._delta_rule_torch import unit_lower_inverse

NAMES = ("q", "k", "v", "g", "beta")
# float32 takes the compiled passes, float64 the operations for any device
both_precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["float64", "float32"]
)


def make_inputs(
    B: int = 2, T: int = 100, H: int = 2, K: int = 12, V: int = 20, *, h: int | None = None, decay: str = "preset",
    correlation: float = 0.0, seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    h = h or H
    q = F.normalize(randn(B, T, h, K), dim=-1)
    k = F.normalize((1 - correlation) * randn(B, T, h, K) + correlation * randn(B, 1, h, K), dim=-1)
    v = randn(B, T, H, V)
    beta = 2 * torch.sigmoid(1.5 * randn(B, T, H) + (4 if correlation else 0))
    per_step = {"none": 0.0, "weak": 1e-3, "preset": 0.3, "strong": 20.0}[decay]
    g = -per_step * torch.rand(B, T, H, generator=gen, dtype=torch.float64)
    return [q, k, v, g, beta]


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).abs().max() / reference.abs().max()).item()


def run_with_gradients(inputs: list[Tensor], start: Tensor, dtype: torch.dtype, impl: str) -> dict[str, Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (*inputs, start)]
    o, final = gated_delta(*leaves[:5], initial_state=leaves[5], impl=impl)
    gen = torch.Generator().manual_seed(99)
    loss_weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(dtype) for x in (o, final)]
    grads = torch.autograd.grad([o, final], leaves, loss_weights)
    named = dict(zip((*NAMES, "initial_state"), grads, strict=True))
    return {"o": o.detach(), "final_state": final.detach(), **{f"d{n}": x for n, x in named.items()}}


@pytest.mark.parametrize("decay", ["none", "weak", "preset", "strong"])
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_chunked_float32_equals_recurrent_float64(decay: str, correlation: float) -> None:
    inputs = make_inputs(decay=decay, correlation=correlation, T=200)
    inputs = [x.float().double() for x in inputs]
    start = torch.randn(2, 2, 12, 20, dtype=torch.float64).float().double()
    expected = run_with_gradients(inputs, start, torch.float64, "recurrent")
    actual = run_with_gradients(inputs, start, torch.float32, "chunked")
    limit = 5e-6 if correlation else 1e-6
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= limit, errors


@both_precisions
@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 32, 33, 64, 95])
def test_any_length_and_grouped_heads(T: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(T=T, H=4, h=2, V=7, seed=T)
    start = torch.randn(2, 4, 12, 7, dtype=torch.float64)
    expected = run_with_gradients(inputs, start, torch.float64, "recurrent")
    actual = run_with_gradients(inputs, start, dtype, "chunked")
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors


@both_precisions
def test_spans_of_time_carry_states_and_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(_delta_rule_chunked, "SPAN", 64)
    inputs = make_inputs(T=150, H=4, h=2)
    start = torch.randn(2, 4, 12, 20, dtype=torch.float64)
    expected = run_with_gradients(inputs, start, torch.float64, "recurrent")
    actual = run_with_gradients(inputs, start, dtype, "chunked")
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors


def test_threads_change_no_bit_of_the_compiled_passes() -> None:
    inputs = make_inputs(T=70, H=4, h=2)
    start = torch.zeros(2, 4, 12, 20)
    one = run_with_gradients(inputs, start, torch.float32, "chunked")
    with torch_threads(3):
        three = run_with_gradients(inputs, start, torch.float32, "chunked")
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_compiled_and_other_passes_agree_in_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients have the types of their inputs; NaN reaches the output."""
    inputs, start = make_inputs(T=40, H=4, h=2), torch.zeros(2, 4, 12, 20, dtype=torch.float64)
    compiled = run_with_gradients(inputs, start, torch.bfloat16, "chunked")
    monkeypatch.setattr(_delta_rule_chunked, "_elementwise", lambda *_: _delta_rule_torch)
    other = run_with_gradients(inputs, start, torch.bfloat16, "chunked")
    for name in compiled:
        assert compiled[name].dtype == other[name].dtype
        assert relative(compiled[name], other[name].double()) <= 2**-7, name


def test_nan_reaches_the_outputs_after_it() -> None:
    for position in range(5):
        inputs = [x.float() for x in make_inputs(T=50)]
        inputs[position][:, 20] = torch.nan
        o, final = gated_delta(*inputs, impl="chunked")
        assert o[:, 20].isnan().any()
        assert position == 0 or final.isnan().any()


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(B=1, T=19, H=2, h=1, K=3, V=2)]
    start = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def chunked(*args: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta(*args[:5], initial_state=args[5], impl="chunked")

    assert torch.autograd.gradcheck(chunked, (*inputs, start))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_when_one_result_is_unused(used: int) -> None:
    grads = {}
    for impl in ("recurrent", "chunked"):
        leaves = [x.requires_grad_() for x in make_inputs(T=40)]
        result = gated_delta(*leaves, impl=impl)[used]
        grads[impl] = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)
    for name, slow, fast in zip(NAMES, grads["recurrent"], grads["chunked"], strict=True):
        expected = torch.zeros_like(fast) if slow is None else slow
        torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10, msg=name)


def test_two_halves_equal_the_whole() -> None:
    inputs = make_inputs(T=90)
    whole, final = gated_delta(*inputs, impl="chunked")
    first, state = gated_delta(*(x[:, :37] for x in inputs), impl="chunked")
    second, state = gated_delta(*(x[:, 37:] for x in inputs), initial_state=state, impl="chunked")
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


def test_steps_equal_the_sequence() -> None:
    q, k, v, g, beta = inputs = [x.float() for x in make_inputs(T=50, H=4, h=2)]
    o, final = gated_delta(*inputs)
    state = torch.zeros_like(final)
    for t in range(50):
        before = state.clone()
        o_t, after = gated_delta_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        assert torch.equal(state, before), "the step changed its input state in place"
        state = after
        torch.testing.assert_close(o_t, o[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_gradient_from_the_future(dtype: torch.dtype) -> None:
    leaves = [x.to(dtype).requires_grad_() for x in make_inputs(T=80)]
    o, _ = gated_delta(*leaves, impl="chunked")
    for x in torch.autograd.grad(o[:, :45].square().sum(), leaves):
        assert x[:, 45:].abs().max() == 0
        assert x[:, :45].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_rows_are_independent(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in make_inputs(B=3, T=40)]
    together, final = gated_delta(*inputs, impl="chunked")
    alone, final_alone = gated_delta(*(x[1:2] for x in inputs), impl="chunked")
    assert torch.equal(together[1:2], alone)
    assert torch.equal(final[1:2], final_alone)


def test_orthogonal_keys_recall_their_values() -> None:
    """Without decay, with beta = 1 and orthonormal keys, the state is an exact dictionary."""
    K = 16
    k = torch.eye(K, dtype=torch.float64)[None, :, None]
    v = torch.randn(1, K, 1, 5, dtype=torch.float64)
    ones = torch.ones(1, K, 1, dtype=torch.float64)
    _, state = gated_delta(k, k, v, 0 * ones, ones, impl="chunked")
    torch.testing.assert_close(k[:, :, 0] @ state[:, 0], v[:, :, 0])


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_bfloat16_inputs_are_computed_in_float32(impl: str) -> None:
    rounded = [x.bfloat16() for x in make_inputs(T=70)]
    exact, exact_final = gated_delta(*(x.double() for x in rounded), impl="recurrent")
    o, final = gated_delta(*rounded, impl=impl)
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert relative(final, exact_final) <= 1e-6
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    leaves = [x.float().requires_grad_() for x in make_inputs(T=70)]
    plain, _ = gated_delta(*leaves, impl="chunked")
    plain_grads = torch.autograd.grad(plain.sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = gated_delta(*leaves, impl="chunked")
        grads = torch.autograd.grad(o.sum(), leaves)
        recurrent, _ = gated_delta(*leaves, impl="recurrent")
    assert torch.equal(o, plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))
    torch.testing.assert_close(recurrent, plain, rtol=1e-5, atol=1e-5)


def test_flash_linear_attention_naive_functions_agree() -> None:
    from fla.ops.gated_delta_rule import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

    q, k, v, g, beta = inputs = [x.float() for x in make_inputs(T=70)]
    start = torch.randn(2, 2, 12, 20)
    o, final = gated_delta(*inputs, initial_state=start, impl="chunked")
    for naive in (naive_recurrent_gated_delta_rule, naive_chunk_gated_delta_rule):
        theirs, their_final = naive(q=q, k=k, v=v, g=g, beta=beta, initial_state=start, output_final_state=True)
        torch.testing.assert_close(o, theirs, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(final, their_final, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("C", [5, 16, 32, 64])
def test_unit_lower_inverse(C: int) -> None:
    """All-equal keys at beta = 2: powers of A reach 2^C C!, the inverse itself stays within +-2."""
    A = torch.full((3, C, C), 2.0, dtype=torch.float64).tril(-1)
    eye = torch.eye(C, dtype=torch.float64)
    inverse = unit_lower_inverse(A)
    torch.testing.assert_close(inverse @ (A + eye), eye.expand(3, C, C))
    assert inverse.abs().max() <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 8, 3, 4)}, r"q has shape \(2, 8, 3, 4\), expected \[B, T, h, K\] of k = \(2, 8, 2, 4\)"),
        ({"g": (2, 7, 4)}, r"g has shape \(2, 7, 4\), expected \[B, T, H\] = \(2, 8, 4\)"),
        ({"k": (2, 8, 3, 4), "q": (2, 8, 3, 4)}, "4 value heads are not a multiple of 3 query/key heads"),
        ({"v": (2, 8, 20)}, r"v has 3 axes \(2, 8, 20\), expected 4"),
        ({"initial_state": (2, 4, 5, 4)}, r"initial_state has shape \(2, 4, 5, 4\)"),
    ],
)
def test_wrong_shapes_say_what_was_expected(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {
        "q": (2, 8, 2, 4), "k": (2, 8, 2, 4), "v": (2, 8, 4, 5), "g": (2, 8, 4), "beta": (2, 8, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        gated_delta(**{name: torch.zeros(shape) for name, shape in {**shapes, **change}.items()})


def test_wrong_implementations_are_refused() -> None:
    inputs = make_inputs(T=4)
    with pytest.raises(ValueError, match="impl='flash' is not one of auto, recurrent, chunked, fused"):
        gated_delta(*inputs, impl="flash")
    with pytest.raises(ValueError, match="impl='fused' needs CUDA tensors, got device=cpu"):
        gated_delta(*inputs, impl="fused")
    with pytest.raises(ValueError, match="sequence of 0 tokens"):
        gated_delta(*(x[:, :0] for x in inputs))
