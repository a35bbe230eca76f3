"""Cross-entropy over K codebooks without the [B, T, K, V] logits.

Projection, softmax, loss and gradient are computed for a slice of rows at a time, so that memory does not grow
with the sequence and the logits of a slice stay in cache.

Shapes: N rows (batch times time), D width, K codebooks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.cpu.bfloat16 import product
from models.cpu.codebook_loss import losses_and_gradient
from models.cpu.threads import run_kernel, thread_shares


@dataclass(frozen=True)
class CodebookLoss:
    """What one pass over targets gives, padding left out; sums are over rows, for every codebook, in nats.

    loss: scalar with gradient, the mean over all targets of (1 - s) nll + s uniform with the training smoothing s.
    nll_K: sum of -log p(target). uniform_K: sum of the mean over the vocabulary of -log p.
    count_K: targets. top1_K, top5_K: targets within the 1 and 5 likeliest tokens; None unless asked for.
    """

    loss: Tensor
    nll_K: Tensor
    uniform_K: Tensor
    count_K: Tensor
    top1_K: Tensor | None = None
    top5_K: Tensor | None = None


def _slice(
    logits_NKV: Tensor, target_NK: Tensor, share_NK: Tensor, smoothing: float, accuracy: bool, needs_grad: bool
) -> tuple[list[Tensor], Tensor]:
    """nll, uniform, ones and, if asked for, top-1 and top-5 hits, each [N, K], and the gradient in the logits' place.

    d loss / d logits = (softmax - (1 - s) onehot - s / V) / number of targets, with 1 / number in `share_NK`.
    """
    target = target_NK[..., None]
    log_z = logits_NKV.logsumexp(-1)
    picked = logits_NKV.gather(-1, target)
    nll = log_z - picked[..., 0]
    parts = [nll, log_z - logits_NKV.mean(-1), torch.ones_like(nll)]
    if accuracy:
        rank = (logits_NKV > picked).sum(-1)
        parts += [(rank < 1).to(nll), (rank < 5).to(nll)]
    if needs_grad:
        logits_NKV.sub_(log_z[..., None]).exp_().sub_(smoothing / logits_NKV.shape[-1])
        logits_NKV.scatter_add_(-1, target, logits_NKV.new_full((), smoothing - 1).expand_as(target))
        logits_NKV.mul_(share_NK[..., None])
    return parts, logits_NKV


def _compiled_slice(
    logits_NKV: Tensor, target_NK: Tensor, share_NK: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """nll and uniform [N, K], and the gradient in the place of the float32 or bfloat16 logits; threads as torch has."""
    nll, uniform = torch.empty_like(share_NK), torch.empty_like(share_NK)
    bounds = thread_shares(len(logits_NKV))
    run_kernel(losses_and_gradient, bounds, logits_NKV, target_NK, share_NK, smoothing, nll, uniform)
    return nll, uniform, logits_NKV


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_ND: Tensor,
        weight_KVD: Tensor,
        targets_NK: Tensor,
        pad: int,
        smoothing: float,
        rows: int,
        accuracy: bool,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        K, V, D = weight_KVD.shape
        weight = weight_KVD.reshape(K * V, D).to(dtype)
        valid_NK = targets_NK != pad
        total = valid_NK.sum().clamp(min=1)
        d_hidden = torch.empty_like(hidden_ND) if needs_grad else None
        d_weight = torch.zeros_like(weight_KVD).view(K * V, D) if needs_grad else None
        wide = torch.promote_types(dtype, torch.float32)
        sums = weight_KVD.new_zeros(5 if accuracy else 3, K, dtype=torch.float64)
        for start in range(0, hidden_ND.shape[0], rows):
            h = hidden_ND[start : start + rows].to(dtype)
            valid = valid_NK[start : start + rows]
            target = targets_NK[start : start + rows].masked_fill(~valid, 0)
            logits = product(h, weight.T).view(-1, K, V)
            share = valid.to(wide) / total
            if logits.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and not accuracy:
                nll, uniform, d_logits = _compiled_slice(logits, target, share, smoothing)
                parts = [nll, uniform, torch.ones_like(nll)]
            else:
                parts, d_logits = _slice(logits.to(wide), target, share, smoothing, accuracy, needs_grad)
            sums += torch.stack([part.masked_fill(~valid, 0).double().sum(0) for part in parts])
            if d_hidden is not None and d_weight is not None:
                d = d_logits.view(-1, K * V).to(dtype)
                d_hidden[start : start + rows] = product(d, weight)
                d_weight += product(d.T, h)
        loss = (((1 - smoothing) * sums[0] + smoothing * sums[1]).sum() / total).to(wide)
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.view(K, V, D))
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], d_weight * grads[0], *(None,) * 7


def codebook_loss(
    hidden_BTD: Tensor,
    weight_KVD: Tensor,
    targets_BKT: Tensor,
    *,
    pad: int,
    label_smoothing: float = 0.1,
    accuracy: bool = False,
    rows: int | None = None,
) -> CodebookLoss:
    """Loss of the K heads `logits = hidden @ weight[k].T` against targets [B, K, T], those equal to `pad` left out.

    Products run in the autocast type when autocast is on, sums in float32 and float64. The gradient is computed
    in the forward pass, so second derivatives are not available. A batch of padding only has loss 0. `rows` steps are
    taken at a time; None for 512 on a CPU, whose caches hold their logits, and 4096 elsewhere.

    Raises ValueError: shapes that disagree, a target outside the vocabulary, a smoothing outside [0, 1).
    """
    B, T, D = hidden_BTD.shape
    K, V, _ = weight_KVD.shape
    if targets_BKT.shape != (B, K, T):
        raise ValueError(f"targets have shape {tuple(targets_BKT.shape)}, expected [B, K, T] = {(B, K, T)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 1); 0 is the true likelihood")
    check_tokens(targets_BKT, V)
    device = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BTD.dtype
    if rows is None:
        rows = 512 if device == "cpu" else 4096
    targets_NK = targets_BKT.long().transpose(1, 2).reshape(B * T, K)
    with torch.autocast(device, enabled=False):
        loss, sums = _SlicedLoss.apply(
            hidden_BTD.reshape(B * T, D),
            weight_KVD,
            targets_NK,
            pad,
            label_smoothing,
            rows,
            accuracy,
            dtype,
            torch.is_grad_enabled() and (hidden_BTD.requires_grad or weight_KVD.requires_grad),
        )
    return CodebookLoss(loss, *sums.unbind(0))


def check_tokens(tokens: Tensor, vocabulary: int, *, force: bool = False) -> None:
    """Raise ValueError for a token outside [0, vocabulary).

    On an accelerator the check would wait for the device, so it runs there only with `force`.
    """
    if (force or tokens.device.type == "cpu") and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"token {high if high >= vocabulary else low} is outside the vocabulary of {vocabulary}; "
                "check the codec's codebook size"
            )
