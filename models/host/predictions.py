"""What a change at the hook does to the next-token distributions: divergence, Fisher forms and scores of drawn labels.

All sums run over the T−1 predictions that the loss counts. Logits exist one tile at a time (`NextTokenLoss.tiles`).

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary, N = B·(T−1) predictions; a tile is R of them by C
entries.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from models.host.next_token_loss import NextTokenLoss, wide

# torch's own rules of forward mode are compiled by what torch itself calls deprecated, at the first pass that needs one
warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=FutureWarning)


class NoForwardMode(Exception):
    """A model whose later blocks have no forward-mode derivative; the text says why."""


def jvp(tail: Callable[[Tensor], Tensor], a_BTD: Tensor, delta_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """(tail(a), J·delta) by one forward-mode pass, all positions moved at once.

    Fused attention has no forward derivative, so attention runs as plain products. Raises NoForwardMode where an
    operation of the tail has none.
    """
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _ConstantWeights():
            hidden_BTD, tangent_BTD = forward_ad.unpack_dual(tail(forward_ad.make_dual(a_BTD, delta_BTD)))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:  # torch's words for an operation without the derivative
        reason = str(error).strip().splitlines()
        raise NoForwardMode(f"no forward-mode derivative: {reason[0] if reason else type(error).__name__}") from error
    if tangent_BTD is None:
        raise NoForwardMode("no forward-mode derivative: an operation of the later blocks drops it")
    return hidden_BTD, tangent_BTD


class _ConstantWeights(TorchFunctionMode):
    """Products with weights that do not move: W·x and W·dx.

    torch's own rule adds dW·x with a dW of zeros, a third product: three quarters of a forward-mode pass are products.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func)
        return func(*args, **(kwargs or {})) if rule is None else rule(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, dx = forward_ad.unpack_dual(input)
    if dx is None or _moves(weight) or _moves(bias):
        return F.linear(input, weight, bias)
    return forward_ad.make_dual(F.linear(x, weight, bias), F.linear(dx, weight))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor:
    x, dx = forward_ad.unpack_dual(mat1)
    if dx is None or scales or _moves(input) or _moves(mat2):
        return torch.addmm(input, mat1, mat2, **scales)
    return forward_ad.make_dual(torch.addmm(input, x, mat2), dx @ mat2)


def _moves(weight: Tensor | None) -> bool:
    return weight is not None and forward_ad.unpack_dual(weight).tangent is not None


_RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {F.linear: _linear, torch.addmm: _addmm}


@dataclass(frozen=True)
class Predictions:
    """The unpatched predictions of some sequences: final hidden states, ∂L/∂hidden (L the summed cross-entropy), loss.

    loss_B: mean cross-entropy a prediction. pull_BTD is 0 at the last position, which predicts nothing.
    """

    head: NextTokenLoss
    tokens_BT: Tensor
    hidden_BTD: Tensor
    pull_BTD: Tensor
    loss_B: Tensor

    def kl(self, hidden_hat_BTD: Tensor, loss_hat_B: Tensor) -> Tensor:
        """KL(p ‖ p̂), mean over each sequence's predictions, [B] nats, from the patched pass' hidden states and losses.

        The logits are linear in the hidden states, and log Σ exp is convex: KL is the gap between its rise and the
        rise of its tangent. With CE in place of log Σ exp (they differ by a linear term) KL = ĈE − CE − ∂CE/∂h·(ĥ − h):
        one scalar product a prediction, no logits. (Soft-capped logits are not linear: there the tiles are summed.)
        """
        if not self.head.linear:
            return self._capped_kl(hidden_hat_BTD)
        change_BTD = wide(hidden_hat_BTD) - self.hidden_BTD
        linear_B = (change_BTD.double() * self.pull_BTD).sum(dim=(1, 2)) / (self.tokens_BT.shape[1] - 1)
        return loss_hat_B.double() - self.loss_B.double() - linear_B

    def _capped_kl(self, hidden_hat_BTD: Tensor) -> Tensor:
        B, T, D = self.hidden_BTD.shape
        hidden_ND, hat_ND = (wide(x[:, :-1]).reshape(-1, D) for x in (self.hidden_BTD, hidden_hat_BTD))
        bits = [_divergence(self.head, hidden_ND[rows], hat_ND[rows]) for rows in _row_blocks(len(hat_ND), self.head)]
        return torch.cat(bits).view(B, T - 1).double().mean(1) * math.log(2.0)

    def fisher(self, tangent_BTD: Tensor, logits_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(Σ_v p_v (u_v − E_p u)², Σ_v p_v u_v²), u = the logits' change: means over each sequence's predictions, [B].

        The first is δᵀJᵀ(diag p − ppᵀ)Jδ, the pullback Fisher form (twice the KL of a small step), the second its
        diagonal approximation. E_p u is known before any logit is: E_p W = ∂CE/∂h + W_y.
        """
        B, T, D = self.hidden_BTD.shape
        hidden_ND, pull_ND, tangent_ND = (
            wide(x[:, :-1]).reshape(-1, D) for x in (self.hidden_BTD, self.pull_BTD, tangent_BTD)
        )
        target_N = self.tokens_BT[:, 1:].reshape(-1)
        variance_N, mean_N = torch.empty_like(hidden_ND[:, 0]), torch.empty_like(hidden_ND[:, 0])
        for rows in _row_blocks(len(hidden_ND), self.head):
            expected_RD = pull_ND[rows] + self.head.logit_gradient(target_N[rows], hidden_ND[rows])
            mean_N[rows] = (expected_RD * tangent_ND[rows]).sum(1)
            variance_N[rows] = _variance(self.head, hidden_ND[rows], tangent_ND[rows], mean_N[rows], logits_dtype)
        variance_B = variance_N.view(B, T - 1).double().mean(1)
        return variance_B, variance_B + mean_N.view(B, T - 1).double().square().mean(1)


def _variance(
    head: NextTokenLoss, hidden_RD: Tensor, tangent_RD: Tensor, mean_R: Tensor, logits_dtype: torch.dtype
) -> Tensor:
    """Var_p of the logits' change at each prediction; p is normalised as the tiles come, with a running maximum."""
    peak_R1 = torch.full_like(hidden_RD[:, :1], -math.inf)
    total_R1, squares_R1 = torch.zeros_like(peak_R1), torch.zeros_like(peak_R1)
    for columns, bits_RC in head.tiles(hidden_RD, logits_dtype):
        moved_RC = head.moved(tangent_RD, mean_R, (columns, bits_RC), logits_dtype)
        higher_R1 = torch.maximum(peak_R1, bits_RC.amax(1, keepdim=True))
        shrink_R1 = torch.exp2(peak_R1 - higher_R1)
        mass_RC = bits_RC.sub_(higher_R1).exp2_()
        total_R1.mul_(shrink_R1).add_(mass_RC.sum(1, keepdim=True))
        squares_R1.mul_(shrink_R1).add_((moved_RC.square_().mul_(mass_RC)).sum(1, keepdim=True))
        peak_R1 = higher_R1
    return (squares_R1 / total_R1).squeeze(1)


def _divergence(head: NextTokenLoss, hidden_RD: Tensor, hat_RD: Tensor) -> Tensor:
    """KL(p ‖ p̂) of each prediction in bits, [R]: log Ẑ − log Z − E_p[ẑ − z], normalised as the tiles come."""
    peak_R2 = hidden_RD.new_full((len(hidden_RD), 2), -math.inf)
    total_R2, rise_R = torch.zeros_like(peak_R2), torch.zeros_like(hidden_RD[:, 0])
    for columns, bits_RC in head.tiles(hidden_RD, torch.float32):
        z_RC = bits_RC.clone()  # the next tile is computed in the same buffer
        z_RC2 = torch.stack([z_RC, head.tile(hat_RD, columns.start, torch.float32)], dim=2)
        higher_R2 = torch.maximum(peak_R2, z_RC2.amax(1))
        shrink_R2 = torch.exp2(peak_R2 - higher_R2)
        mass_RC2 = torch.exp2(z_RC2 - higher_R2[:, None])
        total_R2 = total_R2 * shrink_R2 + mass_RC2.sum(1)
        rise_R = rise_R * shrink_R2[:, 0] + (mass_RC2[..., 0] * (z_RC2[..., 1] - z_RC2[..., 0])).sum(1)
        peak_R2 = higher_R2
    log_R2 = peak_R2 + total_R2.log2()
    return log_R2[:, 1] - log_R2[:, 0] - rise_R / total_R2[:, 0]


def drawn_score(
    head: NextTokenLoss,
    hidden_BTD: Tensor,
    pull_BTD: Tensor,
    tokens_BT: Tensor,
    draws: torch.Generator,
    logits_dtype: torch.dtype,
) -> Tensor:
    """∂/∂hidden of Σ_t log p_t(y_t), each y_t drawn from p_t, [B, T, D] in the hidden states' type.

    ∂ log p(y)/∂h = W_y − E_p W, and E_p W = ∂CE/∂h + W_target is known: only the draw itself looks at the logits.
    """
    B, T, D = hidden_BTD.shape
    hidden_ND = wide(hidden_BTD[:, :-1]).reshape(-1, D)
    drawn_N = torch.cat([_draw(head, hidden_ND[r], draws, logits_dtype) for r in _row_blocks(len(hidden_ND), head)])
    target_N = tokens_BT[:, 1:].reshape(-1)
    change_ND = head.logit_gradient(drawn_N, hidden_ND) - head.logit_gradient(target_N, hidden_ND)
    score_BTD = -wide(pull_BTD)
    score_BTD[:, :-1] += change_ND.view(B, T - 1, D)
    return score_BTD.to(hidden_BTD.dtype)


def _draw(head: NextTokenLoss, hidden_RD: Tensor, draws: torch.Generator, logits_dtype: torch.dtype) -> Tensor:
    """One label of each prediction, [R]: a later tile takes the draw over with its share of the mass so far."""
    peak_R1 = torch.full_like(hidden_RD[:, :1], -math.inf)
    total_R1 = torch.zeros_like(peak_R1)
    label_R1 = torch.zeros_like(peak_R1, dtype=torch.int64)
    for columns, bits_RC in head.tiles(hidden_RD, logits_dtype):
        higher_R1 = torch.maximum(peak_R1, bits_RC.amax(1, keepdim=True))
        cumulative_RC = bits_RC.sub_(higher_R1).exp2_().cumsum(1)
        own_R1 = cumulative_RC[:, -1:]
        total_R1 = total_R1 * torch.exp2(peak_R1 - higher_R1) + own_R1
        uniform_R1 = torch.rand(own_R1.shape, generator=draws, dtype=torch.float64).to(own_R1)
        place_R1 = torch.searchsorted(cumulative_RC, uniform_R1 * total_R1, right=True)
        inside_R1 = place_R1 < bits_RC.shape[1]
        label_R1 = torch.where(inside_R1, columns.start + place_R1, label_R1)
        peak_R1 = higher_R1
    return label_R1.squeeze(1)


def _row_blocks(n: int, head: NextTokenLoss) -> Iterator[slice]:
    yield from (slice(start, min(start + head.rows_at_once, n)) for start in range(0, n, head.rows_at_once))
