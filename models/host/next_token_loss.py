"""Next-token cross-entropy directly from final hidden states, without the [B, T, V] logits.

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary, N = B·(T−1) predictions; a tile of the logits is
R predictions by C vocabulary entries.

    CE_n = log Σ_v exp(h_n · W_v) − h_n · W_{y_n}          dCE_n/dh_n = softmax(h_n Wᵀ) W − W_{y_n}

Logits exist one tile at a time in one reused buffer that stays in cache; the normaliser and the gradient are
summed over tiles with a running maximum (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").
They are kept in bits (h scaled by log₂e), because exp2 costs half of exp.

With bfloat16 logits only the normaliser is rounded, and as little as can be: the mean row of W is taken out first
(softmax does not see a constant added to every logit of a token; small logits round to small errors), and the
target's term is the exact float32 dot product in the sum as in the numerator, so that it cannot be off in one
and not in the other. (With soft-capped logits the mean row stays in: the cap sees a constant.)

An unembedding may have a bias, and its logits may be scaled and soft-capped (`models.host.layout.Readout`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.cpu.bfloat16 import multiplies_bfloat16, product
from models.host.layout import Readout

_ROWS, _COLUMNS = 1024, 2048  # a tile: 8 MiB of float32
_GRAM_ROWS = 8192  # of the vocabulary, added up in float32
_LOG2_E = 1.0 / math.log(2.0)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


class NextTokenLoss:
    """The unembedding of one model with its tile. Not thread-safe: one call at a time."""

    def __init__(self, head: nn.Linear, readout: Readout | None = None) -> None:
        readout = readout or Readout()
        self._scale = readout.scale
        self._to_bits = _LOG2_E * readout.scale
        self._cap = readout.cap * _LOG2_E  # in bits; 0: none
        self._weight_VD: Tensor = wide(head.weight.detach())
        self.exact: torch.dtype = self._weight_VD.dtype
        """What logits_dtype=float32 computes in: float64 for a model of that type."""
        bias = getattr(head, "bias", None)
        self._bias_V: Tensor | None = None if bias is None else wide(bias.detach()) * self._to_bits
        self._mean_D: Tensor = self._weight_VD.mean(0) * (1 - bool(self._cap))
        self._centred_bf16_VD: Tensor | None = None
        self._tiles: dict[torch.dtype, Tensor] = {}

    @property
    def _tile_shape(self) -> tuple[int, int]:
        # a CPU wants the tile in cache, an accelerator wants few launches
        scale = 1 if self._weight_VD.device.type == "cpu" else 4
        return scale * _ROWS, scale * _COLUMNS

    def __call__(self, hidden_BTD: Tensor, tokens_BT: Tensor, *, logits_dtype: torch.dtype) -> Tensor:
        """Summed CE of each sequence's T−1 predictions, [B] nats; differentiable in ``hidden_BTD``."""
        return _SummedLoss.apply(hidden_BTD, tokens_BT, self, logits_dtype)

    def of_constant(self, hidden_D: Tensor, tokens_BT: Tensor) -> Tensor:
        """Summed CE of each sequence, [B] nats, when every position has the same final hidden state."""
        logits_V = self._weight_VD @ hidden_D.to(self.exact)
        if self._bias_V is not None or self._cap or self._scale != 1.0:
            bits_V = logits_V * self._to_bits if self._bias_V is None else logits_V * self._to_bits + self._bias_V
            logits_V = self._capped(bits_V) / _LOG2_E
        log_p_V = logits_V.log_softmax(0)
        return -log_p_V[tokens_BT[:, 1:]].sum(1)

    def rows(
        self, hidden_ND: Tensor, targets_N: Tensor, logits_dtype: torch.dtype, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """CE of each prediction [N], and its gradient in ``hidden_ND`` when asked for."""
        if logits_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"logits_dtype={logits_dtype} is not supported; choose float32 or bfloat16")
        loss_N = hidden_ND.new_empty(len(hidden_ND), dtype=self.exact)
        grad_ND = torch.empty_like(hidden_ND, dtype=self.exact) if with_gradient else None
        height, _ = self._tile_shape
        for start in range(0, len(hidden_ND), height):
            rows = slice(start, start + height)
            grad_RD = None if grad_ND is None else grad_ND[rows].zero_()
            h_RD = hidden_ND[rows].to(self.exact) * self._to_bits
            loss_N[rows] = self._row_of_tiles(h_RD, targets_N[rows], logits_dtype, grad_RD)
        return loss_N, grad_ND

    def _row_of_tiles(
        self, h_RD: Tensor, target_R: Tensor, logits_dtype: torch.dtype, grad_RD: Tensor | None
    ) -> Tensor:
        rounded = logits_dtype != torch.float32
        target_R1 = torch.empty_like(h_RD[:, :1])
        if rounded:
            target_R1 = (h_RD * (self._weight_VD[target_R] - self._mean_D)).sum(1, keepdim=True)
            if self._bias_V is not None:
                target_R1 += self._bias_V[target_R][:, None]
            target_R1 = self._capped(target_R1)
        peak_R1 = torch.full_like(target_R1, -math.inf)
        sums_R1 = torch.zeros_like(target_R1)
        _, width = self._tile_shape
        for first in range(0, len(self._weight_VD), width):
            bits_RC = self._tile(h_RD, first, logits_dtype)
            inside = ((target_R >= first) & (target_R < first + bits_RC.shape[1])).nonzero().squeeze(1)
            column = target_R[inside] - first
            if rounded:
                bits_RC[inside, column] = target_R1[inside, 0]
            else:
                target_R1[inside, 0] = bits_RC[inside, column]
            higher_R1 = torch.maximum(peak_R1, bits_RC.amax(1, keepdim=True))
            shrink_R1 = torch.exp2(peak_R1 - higher_R1)
            slope_RC = self._slope(bits_RC) if self._cap and grad_RD is not None else None
            mass_RC = bits_RC.sub_(higher_R1).exp2_()
            sums_R1.mul_(shrink_R1).add_(mass_RC.sum(1, keepdim=True))
            if grad_RD is not None:
                if slope_RC is not None:
                    mass_RC *= slope_RC
                grad_RD.mul_(shrink_R1).addmm_(mass_RC, self._weight_VD[first : first + width])
            peak_R1 = higher_R1
        if grad_RD is not None:
            own_RD = self._weight_VD[target_R]
            grad_RD.div_(sums_R1).sub_(own_RD * self._slope(target_R1) if self._cap else own_RD)
            if self._scale != 1.0:
                grad_RD *= self._scale
        return (sums_R1.log2_() + (peak_R1 - target_R1)).squeeze(1) * math.log(2.0)

    def _capped(self, bits: Tensor) -> Tensor:
        """Logits in bits, soft-capped in place where the model caps them."""
        return bits.div_(self._cap).tanh_().mul_(self._cap) if self._cap else bits

    def _slope(self, bits: Tensor) -> Tensor:
        """d(capped)/d(logit) at capped logits in bits."""
        return 1 - (bits / self._cap).square_()

    def _tile(self, h_RD: Tensor, first: int, logits_dtype: torch.dtype) -> Tensor:
        """Logits in bits of all rows and a tile's width of vocabulary from ``first`` on, float32 [R, C]."""
        bits_RC = self._products(h_RD, first, logits_dtype)
        if self._bias_V is not None:
            bits_RC += self._bias_V[first : first + bits_RC.shape[1]]
        return self._capped(bits_RC)

    def _products(self, h_RD: Tensor, first: int, logits_dtype: torch.dtype) -> Tensor:
        columns = slice(first, min(first + self._tile_shape[1], len(self._weight_VD)))
        shape = (len(h_RD), columns.stop - columns.start)
        bits_RC = self._buffer(self.exact, shape)
        if logits_dtype == torch.float32:
            return torch.mm(h_RD, self._weight_VD[columns].T, out=bits_RC)
        low_RC = self._buffer(torch.bfloat16, shape)
        low_RD, weight_DC = h_RD.bfloat16(), self._centred_bf16[columns].T
        if multiplies_bfloat16(h_RD.device):
            torch.mm(low_RD, weight_DC, out=low_RC)
        else:  # as in `bfloat16.product`, but in this buffer: a new one for each tile takes a fifth longer
            low_RC.copy_(torch.mm(low_RD.float(), weight_DC.float(), out=bits_RC))
        return bits_RC.copy_(low_RC)

    @property
    def _centred_bf16(self) -> Tensor:
        if self._centred_bf16_VD is None:
            self._centred_bf16_VD = (self._weight_VD - self._mean_D).bfloat16()
        return self._centred_bf16_VD

    @property
    def linear(self) -> bool:
        """Whether the logits are linear in the hidden states (no soft cap)."""
        return not self._cap

    def gram_DD(self) -> Tensor:
        """Σ_v (W_v − W̄)(W_v − W̄)ᵀ in float64: hᵀGh is the squared length of the logits W·h around their mean."""
        mean_D = self._weight_VD.mean(0)
        sum_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64, device=mean_D.device)
        for block_RD in self._weight_VD.split(_GRAM_ROWS):
            centred_RD = block_RD - mean_D
            sum_DD += centred_RD.T @ centred_RD
        return sum_DD

    @property
    def rows_at_once(self) -> int:
        """Predictions of one tile."""
        return self._tile_shape[0]

    def tiles(self, hidden_RD: Tensor, logits_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Logits in bits, up to a constant a row, a width of vocabulary at a time: (its columns, [R, C]).

        One buffer serves all tiles. ``hidden_RD``: at most `rows_at_once` rows.
        """
        for first in range(0, len(self._weight_VD), self._tile_shape[1]):
            bits_RC = self.tile(hidden_RD, first, logits_dtype)
            yield slice(first, first + bits_RC.shape[1]), bits_RC

    def tile(self, hidden_RD: Tensor, first: int, logits_dtype: torch.dtype) -> Tensor:
        """The one of `tiles` that begins at vocabulary entry ``first``."""
        return self._tile(hidden_RD.to(self.exact) * self._to_bits, first, logits_dtype)

    def logit_gradient(self, index_N: Tensor, hidden_ND: Tensor) -> Tensor:
        """d logit_v / d hidden at one vocabulary entry v for each row, [N, D]."""
        own_ND = self._weight_VD[index_N] * self._scale
        if self.linear:
            return own_ND
        bits_N1 = (own_ND * hidden_ND.to(self.exact)).sum(1, keepdim=True) * _LOG2_E
        if self._bias_V is not None:
            bits_N1 += self._bias_V[index_N][:, None]
        return own_ND * self._slope(self._capped(bits_N1))

    def moved(
        self, tangent_RD: Tensor, mean_R: Tensor, tile: tuple[slice, Tensor], logits_dtype: torch.dtype
    ) -> Tensor:
        """Change of a tile's logits in nats when the final hidden states move by ``tangent_RD``, less ``mean_R``."""
        columns, bits_RC = tile
        tangent_RD = tangent_RD * self._scale
        if not self.linear:
            moved_RC = tangent_RD @ self._weight_VD[columns].T
            return moved_RC.mul_(self._slope(bits_RC)).sub_(mean_R[:, None])
        if logits_dtype == torch.float32:
            return torch.addmm(-mean_R[:, None], tangent_RD, self._weight_VD[columns].T)
        moved_RC = product(tangent_RD.bfloat16(), self._centred_bf16[columns].T).to(self.exact)
        return moved_RC.sub_((mean_R - tangent_RD @ self._mean_D)[:, None])

    def _buffer(self, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        if dtype not in self._tiles:
            self._tiles[dtype] = self._weight_VD.new_empty(math.prod(self._tile_shape), dtype=dtype)
        return self._tiles[dtype][: shape[0] * shape[1]].view(shape)


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
