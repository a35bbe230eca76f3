"""The ladder's forms on a two-layer model with a vocabulary of 7, float64: Hessian, expansions, draws, plans."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from models.host.attention_plans import AttentionPlans, NoPlans, Scores, compared
from models.host.host_lm import HostLM
from models.host.layout import Readout
from models.host.next_token_loss import NextTokenLoss
from models.host.predictions import NoForwardMode, Predictions, drawn_score, jvp
from models.host.specs import HostLMSpec

B, T, V, D, LAYER = 2, 5, 7, 8, 0


def _build(architecture: str, dtype: torch.dtype = torch.float64) -> HostLM:
    torch.manual_seed(3)
    sizes = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    special = dict(bos_token_id=0, eos_token_id=0)
    config = GPTNeoXConfig(**sizes, **special) if architecture == "gpt_neox" else LlamaConfig(**sizes, **special)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.5)
    spec = HostLMSpec(
        origin="directory",
        architecture=architecture,  # type: ignore[arg-type]
        d_model=D,
        n_layers=2,
        n_heads=2,
        d_mlp=16,
        d_vocab=V,
        depths={},
    )
    return HostLM(f"tiny-{architecture}", model, spec, None)


READOUTS = {"gpt_neox": Readout(scale=0.7), "llama": Readout(), "llama, soft-capped": Readout(cap=1.5)}


@pytest.fixture(scope="module", params=list(READOUTS))
def lm(request: pytest.FixtureRequest) -> HostLM:
    lm = _build(request.param.split(",")[0])
    lm.readout = READOUTS[request.param]  # type: ignore[attr-defined]
    lm._head = NextTokenLoss(lm.model.get_output_embeddings(), lm.readout)  # type: ignore[operator, attr-defined]
    return lm


@pytest.fixture
def tokens_BT() -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))


def _delta(a_BTD: Tensor, size: float = 0.3) -> Tensor:
    return size * torch.randn(a_BTD.shape, generator=torch.Generator().manual_seed(1), dtype=a_BTD.dtype)


def _logits(lm: HostLM, a_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Of the T−1 predictions, all at once: the slow way."""
    hidden_BTD = lm.tail(LAYER, tokens_BT)(a_BTD)
    logits = lm.model.get_output_embeddings()(hidden_BTD)[:, :-1] * lm.readout.scale
    return lm.readout.cap * torch.tanh(logits / lm.readout.cap) if lm.readout.cap else logits


def _kl(lm: HostLM, a_BTD: Tensor, a_hat_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Mean over each sequence's predictions."""
    log_p, log_q = (_logits(lm, x, tokens_BT).log_softmax(-1) for x in (a_BTD, a_hat_BTD))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)


def _known(lm: HostLM, tokens_BT: Tensor) -> tuple[Predictions, Tensor, Tensor]:
    found = lm.unpatched(tokens_BT, [LAYER])
    known = Predictions(lm.head, tokens_BT, found.hidden_BTD, found.pull_BTD, found.loss_B)
    return known, found.activations[LAYER], found.gradients[LAYER]


def _fisher(lm: HostLM, tokens_BT: Tensor, delta_BTD: Tensor) -> tuple[Tensor, Tensor]:
    known, a_BTD, _ = _known(lm, tokens_BT)
    _, tangent_BTD = jvp(lm.tail(LAYER, tokens_BT), a_BTD, delta_BTD)
    return known.fisher(tangent_BTD, torch.float32)


def test_the_fisher_form_is_the_hessian_of_kl(lm, tokens_BT):
    _, a_BTD, _ = _known(lm, tokens_BT)
    delta_BTD = _delta(a_BTD)
    variance_B, second_B = _fisher(lm, tokens_BT, delta_BTD)
    for b in range(B):
        a_1TD, one = a_BTD[b : b + 1], tokens_BT[b : b + 1]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            hessian = torch.func.hessian(lambda x, a=a_1TD, one=one: _kl(lm, a, a + x, one)[0])(torch.zeros_like(a_1TD))
        d = delta_BTD[b].flatten()
        expected = float(d @ hessian.reshape(T * D, T * D) @ d)
        assert float(variance_B[b]) == pytest.approx(expected, abs=1e-8, rel=1e-8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        moved = torch.func.jvp(lambda x: _logits(lm, x, tokens_BT), (a_BTD,), (delta_BTD,))[1]
    p = _logits(lm, a_BTD, tokens_BT).softmax(-1)
    torch.testing.assert_close(second_B, (p * moved**2).sum(-1).mean(1), rtol=1e-9, atol=0)


def test_kl_without_logits_is_the_sum_over_the_vocabulary(lm, tokens_BT):
    known, a_BTD, _ = _known(lm, tokens_BT)
    a_hat_BTD = a_BTD + _delta(a_BTD)
    with torch.no_grad():
        hidden_BTD = lm.tail(LAYER, tokens_BT)(a_hat_BTD)
        found_B = known.kl(hidden_BTD, lm.mean_loss(hidden_BTD, tokens_BT))
        torch.testing.assert_close(found_B, _kl(lm, a_BTD, a_hat_BTD, tokens_BT), rtol=1e-9, atol=1e-12)
        same_BTD = lm.tail(LAYER, tokens_BT)(a_BTD)
        assert float(known.kl(same_BTD, lm.mean_loss(same_BTD, tokens_BT)).abs().max()) < 1e-12


def test_small_errors_meet_their_expansions_linearly(lm, tokens_BT):
    known, a_BTD, g_BTD = _known(lm, tokens_BT)
    delta_BTD, tail = _delta(a_BTD), lm.tail(LAYER, tokens_BT)
    variance_B, _ = _fisher(lm, tokens_BT, delta_BTD)
    first_B = (g_BTD * delta_BTD).sum((1, 2)) / (T - 1)
    gaps = []
    for epsilon in (1e-1, 1e-2):  # beyond that the norms' float32 shows
        with torch.no_grad():
            hidden_BTD = tail(a_BTD + epsilon * delta_BTD)
            loss_B = lm.mean_loss(hidden_BTD, tokens_BT)
        ratio_B = known.kl(hidden_BTD, loss_B) / (0.5 * epsilon**2 * variance_B)
        gaps.append(
            (float((ratio_B - 1).abs().max()), float((epsilon * first_B / (loss_B - known.loss_B) - 1).abs().max()))
        )
    for large, small in zip(*gaps, strict=True):
        assert small < 0.2 * large
        assert small < 0.05


def test_forms_do_not_depend_on_the_batch(lm, tokens_BT):
    _, a_BTD, _ = _known(lm, tokens_BT)
    delta_BTD = _delta(a_BTD)
    together = _fisher(lm, tokens_BT, delta_BTD)
    alone = [_fisher(lm, tokens_BT[b : b + 1], delta_BTD[b : b + 1]) for b in range(B)]
    for i in range(2):
        torch.testing.assert_close(together[i], torch.cat([form[i] for form in alone]), rtol=1e-12, atol=0)


def test_drawn_labels_give_the_fisher_form_and_its_trace_on_average(lm, tokens_BT):
    known, a_BTD, _ = _known(lm, tokens_BT)
    delta_BTD = _delta(a_BTD)
    variance_B, _ = _fisher(lm, tokens_BT, delta_BTD)
    leaf = a_BTD.clone().requires_grad_(True)
    hidden_BTD = lm.tail(LAYER, tokens_BT)(leaf)
    draws, found, traces = torch.Generator().manual_seed(7), [], []
    for _ in range(600):
        up_BTD = drawn_score(lm.head, hidden_BTD.detach(), known.pull_BTD, tokens_BT, draws, torch.float32)
        (s_BTD,) = torch.autograd.grad(hidden_BTD, leaf, up_BTD, retain_graph=True)
        found.append((s_BTD * delta_BTD).sum((1, 2)).square() / (T - 1))
        traces.append(s_BTD.square().sum((1, 2)) / (T - 1))
    for values, expected in ((found, variance_B), (traces, _trace(lm, a_BTD, tokens_BT))):
        table = torch.stack(values)
        error_B = table.std(0) / math.sqrt(len(table))
        assert ((table.mean(0) - expected).abs() < 3 * error_B).all()


def _trace(lm: HostLM, a_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """tr F over all activations of a sequence, per prediction, from the whole Jacobian."""
    found = []
    for b in range(B):
        one = tokens_BT[b : b + 1]
        jacobian = torch.autograd.functional.jacobian(lambda x, one=one: _logits(lm, x, one)[0], a_BTD[b : b + 1])
        p_NV = _logits(lm, a_BTD[b : b + 1], one)[0].softmax(-1)
        flat_NVA = jacobian.reshape(T - 1, V, T * D)
        mean_NA = (p_NV[..., None] * flat_NVA).sum(1)
        found.append((p_NV[..., None] * flat_NVA**2).sum((1, 2)) - (mean_NA**2).sum(1))
    return torch.stack([f.mean() for f in found])


def test_scores_of_the_shared_pass_are_those_of_its_draws(lm, tokens_BT):
    found = lm.unpatched(tokens_BT, [0, 1], draws=torch.Generator().manual_seed(4))
    plain = lm.unpatched(tokens_BT, [0, 1])
    for layer in (0, 1):
        assert torch.equal(found.gradients[layer], plain.gradients[layer])
        leaf = found.activations[layer].clone().requires_grad_(True)
        hidden_BTD = lm.tail(layer, tokens_BT)(leaf)
        draws = torch.Generator().manual_seed(4)
        up_BTD = drawn_score(lm.head, found.hidden_BTD, found.pull_BTD, tokens_BT, draws, torch.float32)
        torch.testing.assert_close(found.scores[layer], torch.autograd.grad(hidden_BTD, leaf, up_BTD)[0])


def test_rounded_logits_give_nearly_the_same_forms(tokens_BT):
    lm = _build("llama", torch.float32)
    known, a_BTD, _ = _known(lm, tokens_BT)
    _, tangent_BTD = jvp(lm.tail(LAYER, tokens_BT), a_BTD, _delta(a_BTD))
    for exact_B, rounded_B in zip(
        known.fisher(tangent_BTD, torch.float32), known.fisher(tangent_BTD, torch.bfloat16), strict=True
    ):
        torch.testing.assert_close(rounded_B, exact_B, rtol=0.05, atol=0)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_do_not_move_take_two_products(bias, transposed):
    g = torch.Generator().manual_seed(0)
    W, x, dx = (torch.randn(3, 3, dtype=torch.float64, generator=g) for _ in range(3))
    b = torch.ones(3, dtype=torch.float64) * bias

    def layer(a: Tensor) -> Tensor:
        return torch.addmm(b, a, W) if transposed else torch.nn.functional.linear(a, W, b if bias else None)

    with Products() as products:
        y, dy = jvp(layer, x, dx)
    assert products.count == 2
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    torch.testing.assert_close(dy, layer(dx) - b * (transposed or bias))


def test_weights_that_move_keep_their_part():
    g = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(3, 3, dtype=torch.float64, generator=g) for _ in range(2))
    _, dy = jvp(lambda a: torch.nn.functional.linear(x, a), x, dx)
    torch.testing.assert_close(dy, x @ dx.T)
    _, dy = jvp(lambda a: torch.addmm(a, a, a), x, dx)
    torch.testing.assert_close(dy, dx + dx @ x + x @ dx)


def test_an_operation_without_forward_derivative_is_named(tokens_BT):
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    x = torch.zeros(1, 2, 3)
    with pytest.raises(NoForwardMode, match="no forward-mode derivative: "):
        jvp(Opaque.apply, x, x + 1)
    with pytest.raises(NoForwardMode, match="drops it"):
        jvp(lambda a: a.detach() * 2, x, x + 1)


def test_the_excess_of_free_energy_is_the_divergence(lm, tokens_BT):
    """F_C(P̂) − F_C(P) = ε KL(P̂ ‖ P) for the plans as Hugging Face's eager attention gives them."""
    _, a_BTD, _ = _known(lm, tokens_BT)
    a_hat_BTD, tail = a_BTD + _delta(a_BTD, 1.0), lm.tail(LAYER, tokens_BT)
    plans = AttentionPlans(lm.model.config._attn_implementation)
    with torch.no_grad():
        with plans.reference():
            tail(a_BTD)
        with plans.distances() as found:
            moved_BTD = tail(a_hat_BTD)
        assert torch.equal(moved_BTD, tail(a_hat_BTD))
    assert list(found) == [1]
    before, after = _scores(plans, 1), _scores_of(lm, plans, a_hat_BTD, tokens_BT)
    excess = torch.zeros(B, dtype=torch.float64)
    cost = torch.zeros(B, dtype=torch.float64)
    for b in range(B):
        (s, admissible), (s_hat, _) = before.of(b), after.of(b)
        p, p_hat = s.softmax(-1), s_hat.softmax(-1)
        entropy, entropy_hat = (torch.special.entr(x).sum(-1) for x in (p, p_hat))
        score = torch.where(admissible, s, 0.0)
        change = -((p_hat - p) * score).sum(-1)
        free = change - (entropy_hat - entropy)
        divergence = torch.where(admissible, p_hat * (p_hat.log() - p.log()), 0.0).sum(-1)
        torch.testing.assert_close(free, divergence, rtol=1e-9, atol=1e-12)
        excess[b], cost[b] = free[:, 1:].mean(), change[:, 1:].mean()  # the first row has one admissible key
    torch.testing.assert_close(found[1][0], excess, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1][1], cost, rtol=1e-9, atol=1e-12)


def _scores(plans: AttentionPlans, layer: int) -> Scores:
    return plans._before[layer]


def _scores_of(lm: HostLM, plans: AttentionPlans, a_BTD: Tensor, tokens_BT: Tensor) -> Scores:
    other = AttentionPlans(lm.model.config._attn_implementation)
    with torch.no_grad(), other.reference():
        lm.tail(LAYER, tokens_BT)(a_BTD)
    return _scores(other, 1)


def test_plans_are_those_of_eager_attention_and_seen_in_a_forward_mode_pass(lm, tokens_BT):
    _, a_BTD, _ = _known(lm, tokens_BT)
    plans = AttentionPlans(lm.model.config._attn_implementation)
    with plans.reference():
        jvp(lm.tail(LAYER, tokens_BT), a_BTD, _delta(a_BTD))
    lm.model.set_attn_implementation("eager")
    try:
        eager = lm.model(tokens_BT, output_attentions=True).attentions[1]
    finally:
        lm.model.set_attn_implementation("sdpa")
    for b in range(B):
        torch.testing.assert_close(_scores(plans, 1).of(b)[0].softmax(-1), eager[b], rtol=1e-6, atol=1e-7)


def test_masks_caps_and_key_heads():
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, h, 4, 3, generator=g, dtype=torch.float64) for h in (2, 1))
    window = torch.ones(4, 4, dtype=torch.bool).tril().triu(-1)[None, None]
    bias = torch.zeros(1, 1, 4, 4).masked_fill(~window, torch.finfo(torch.float32).min)
    by_bool, by_bias = (Scores(query, key, mask, 0.5, 0.0).of(0) for mask in (window, bias))
    assert torch.equal(by_bool[0].softmax(-1), by_bias[0].softmax(-1))
    assert torch.equal(by_bool[1].expand(1, 4, 4), window[0])
    capped = Scores(query, key, None, 0.5, 0.2).of(0)[0]
    raw = 0.5 * query[0] @ key[0].mT
    expected = (0.2 * torch.tanh(raw / 0.2)).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(capped.softmax(-1), expected.softmax(-1))
    same = Scores(query, key, window, 0.5, 0.0)
    assert compared(same, same)[0].item() == compared(same, same)[1].item() == 0.0


def test_a_model_without_softmax_attention_has_no_plans():
    plans = AttentionPlans("sdpa")
    with pytest.raises(NoPlans, match="no later layer has softmax attention"), plans.distances():
        pass
