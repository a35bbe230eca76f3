"""Next-token cross-entropy straight from final hidden states, without the [B, T, V] logits.

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary, N = B·(T−1) predictions, C predictions a chunk.

    CE_n = log Σ_v exp(h_n · W_v) − h_n · W_{y_n}          dCE_n/dh_n = softmax(h_n Wᵀ) W − W_{y_n}

Logits exist for one chunk at a time in one reused buffer: large temporaries cost more page faults than arithmetic.
They are kept in bits (h scaled by log₂e), because exp2 costs half of exp.

With bfloat16 logits only the normaliser is rounded, and as little as can be: the mean row of W is taken out first
(softmax does not see a constant added to every logit of a token; small logits round to small errors), and the
target's term is the exact float32 dot product in the sum as in the numerator, so that it cannot be off in one
and not in the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_BYTES = 48 * 2**20
_LOG2_E = 1.0 / math.log(2.0)


class NextTokenLoss:
    """The unembedding of one model with its chunk buffers. Not thread-safe: one call at a time."""

    def __init__(self, head: nn.Linear) -> None:
        if head.bias is not None:
            raise ValueError("the unembedding has a bias; NextTokenLoss covers bias-free heads only")
        self._weight_VD: Tensor = head.weight.detach().float()
        self._centred_bf16_VD: Tensor | None = None
        self._logits_CV: Tensor | None = None
        self._logits_bf16_CV: Tensor | None = None

    @property
    def chunk(self) -> int:
        """Predictions a chunk: float32 logits of one chunk stay near 48 MiB."""
        return max(16, _CHUNK_BYTES // (4 * self._weight_VD.shape[0]))

    def __call__(self, hidden_BTD: Tensor, tokens_BT: Tensor, *, logits_dtype: torch.dtype) -> Tensor:
        """Summed CE of each sequence's T−1 predictions, [B] nats; differentiable in ``hidden_BTD``."""
        return _SummedLoss.apply(hidden_BTD, tokens_BT, self, logits_dtype)

    def of_constant(self, hidden_D: Tensor, tokens_BT: Tensor) -> Tensor:
        """Summed CE of each sequence, [B] nats, when every position has the same final hidden state."""
        log_p_V = (self._weight_VD @ hidden_D.float()).log_softmax(0)
        return -log_p_V[tokens_BT[:, 1:]].sum(1)

    def _buffers(self, rows: int, logits_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        weight = self._weight_VD
        if self._logits_CV is None or self._logits_CV.shape[0] < rows:
            self._logits_CV = weight.new_empty(rows, weight.shape[0])
            self._logits_bf16_CV = None
        if logits_dtype == torch.float32:
            return self._logits_CV[:rows], None
        if self._centred_bf16_VD is None:
            self._mean_D = weight.mean(0)
            self._centred_bf16_VD = (weight - self._mean_D).bfloat16()
        if self._logits_bf16_CV is None:
            self._logits_bf16_CV = torch.empty_like(self._logits_CV, dtype=torch.bfloat16)
        return self._logits_CV[:rows], self._logits_bf16_CV[:rows]

    def rows(
        self, hidden_ND: Tensor, targets_N: Tensor, logits_dtype: torch.dtype, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """CE of each prediction [N], and its gradient in ``hidden_ND`` when asked for."""
        if logits_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"logits_dtype={logits_dtype} is not supported; choose float32 or bfloat16")
        weight = self._weight_VD
        loss_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND, dtype=torch.float32) if with_gradient else None
        for start in range(0, len(hidden_ND), self.chunk):
            stop = min(start + self.chunk, len(hidden_ND))
            h, target = hidden_ND[start:stop].float() * _LOG2_E, targets_N[start:stop]
            bits, low = self._buffers(stop - start, logits_dtype)
            if low is None:
                torch.mm(h, weight.T, out=bits)
                target_bits = bits.gather(1, target[:, None])
            else:
                assert self._centred_bf16_VD is not None
                torch.mm(h.bfloat16(), self._centred_bf16_VD.T, out=low)
                bits.copy_(low)
                target_bits = (h * (weight[target] - self._mean_D)).sum(1, keepdim=True)
                bits.scatter_(1, target[:, None], target_bits)
            peak = bits.amax(1, keepdim=True)
            sums = bits.sub_(peak).exp2_().sum(1, keepdim=True)
            loss_N[start:stop] = (sums.log2() + (peak - target_bits)).mul_(math.log(2.0)).squeeze(1)
            if grad_ND is not None:
                torch.mm(bits.div_(sums), weight, out=grad_ND[start:stop])
                grad_ND[start:stop] -= weight[target]
        return loss_N, grad_ND


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_BTD: Tensor, tokens_BT: Tensor, head: NextTokenLoss, logits_dtype: torch.dtype
    ) -> Tensor:
        B, T, D = hidden_BTD.shape
        hidden_ND = hidden_BTD[:, :-1].reshape(-1, D)
        with_gradient = ctx.needs_input_grad[0]
        loss_N, grad_ND = head.rows(hidden_ND, tokens_BT[:, 1:].reshape(-1), logits_dtype, with_gradient=with_gradient)
        if with_gradient:
            ctx.save_for_backward(grad_ND)
            ctx.dtype = hidden_BTD.dtype
        return loss_N.view(B, T - 1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        (scale_B,) = grad_outputs
        B, D = len(scale_B), grad_ND.shape[1]
        grad_BTD = grad_ND.view(B, -1, D) * scale_B[:, None, None]
        return nn.functional.pad(grad_BTD, (0, 0, 0, 1)).to(ctx.dtype), None, None, None
