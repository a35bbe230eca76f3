"""Inference of SAEs whose features fire above thresholds of their own: what BatchTopK and Matryoshka SAEs become.

Shape suffixes: B tokens, D = d_in input width, M = d_sae features, K entries per token, padded.

With a_j = W_enc[j] · (x − b_dec) + b_enc[j], a feature is active when a_j exceeds both its threshold and zero, and
x̂ = b_dec + Σ_j a_j W_dec[j] (SAELens' JumpReLU SAE; Rajamanoharan et al. 2024, arXiv:2407.14435). In training a
BatchTopK SAE follows the smallest activation that a batch keeps; that average is the threshold of every feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.sae.model import TopKSAE, row_chunks

THRESHOLD_RATE = 0.01
"""Share of a step in the running average of the smallest kept activation: SAELens' `topk_threshold_lr`."""
DENSE_FROM = 8  # a dense product is cheaper than gathered rows when more than a DENSE_FROM-th of the features fire


def padded(acts_BM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positive entries of acts [B, M] as feature indices (int64) and values, both [B, K].

    K is the largest number of a token, at least 1; shorter rows end with features of value zero, which have not fired.
    """
    fired_BM = acts_BM > 0
    count = max(1, int(fired_BM.sum(-1).amax())) if len(acts_BM) else 1
    rows, features = fired_BM.nonzero(as_tuple=True)
    first = fired_BM.sum(-1).cumsum(0) - fired_BM.sum(-1)
    place = torch.arange(len(rows), device=rows.device) - first[rows]
    index = torch.zeros(len(acts_BM), count, dtype=torch.int64, device=rows.device)
    value = torch.zeros(len(acts_BM), count, device=rows.device)
    index[rows, place] = features
    value[rows, place] = acts_BM[rows, features].float()
    return index, value


def weighted_rows(index_BK: torch.Tensor, value_BK: torch.Tensor, W_MD: torch.Tensor) -> torch.Tensor:
    """Σ_q value[b, q] · W[index[b, q]], [B, D]: by rows where few features fire, else by a dense product."""
    features = len(W_MD)
    if index_BK.shape[1] * DENSE_FROM <= features:
        return F.embedding_bag(index_BK, W_MD, mode="sum", per_sample_weights=value_BK)
    out = torch.empty(len(index_BK), W_MD.shape[1], device=W_MD.device)
    for rows in row_chunks(len(index_BK), 4 * features):
        acts = torch.zeros(rows.stop - rows.start, features, device=W_MD.device)
        torch.mm(acts.scatter_add_(1, index_BK[rows], value_BK[rows]), W_MD, out=out[rows])
    return out


class JumpReLUSAE(nn.Module):
    """Weights of a JumpReLU SAE (float32) and its inference, with the interface of `TopKSAE`.

    W_enc [d_sae, d_in] (transposed to SAELens), W_dec [d_sae, d_in], b_enc and threshold [d_sae], b_dec [d_in].
    """

    def __init__(
        self, *, d_in: int, d_sae: int, apply_b_dec_to_input: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.apply_b_dec_to_input = apply_b_dec_to_input

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device), requires_grad=False)

        self.W_enc, self.W_dec = zeros(d_sae, d_in), zeros(d_sae, d_in)
        self.b_enc, self.threshold, self.b_dec = zeros(d_sae), zeros(d_sae), zeros(d_in)

    @classmethod
    @torch.no_grad()
    def of_batch_topk(cls, sae: TopKSAE, threshold: float) -> JumpReLUSAE:
        """The inference form of a trained BatchTopK SAE, with decoder norms folded where the training rescaled."""
        weights = sae.folded() if sae.rescale_acts_by_decoder_norm else sae
        out = cls(
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            apply_b_dec_to_input=sae.apply_b_dec_to_input,
            device=sae.W_enc.device,
        )
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(out, name).copy_(getattr(weights, name))
        out.threshold.fill_(threshold)
        return out

    @torch.no_grad()
    def encode(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., d_in] -> feature indices and activations, both [..., K] as `padded` says; ValueError on a width."""
        if x_BD.shape[-1] != self.d_in:
            raise ValueError(
                f"activations have width {x_BD.shape[-1]}, the SAE d_in={self.d_in}; check the hook's layer"
            )
        flat_BD = x_BD.reshape(-1, self.d_in).to(self.W_enc.dtype)
        xc_BD = flat_BD - self.b_dec if self.apply_b_dec_to_input else flat_BD
        parts = []
        for rows in row_chunks(len(xc_BD), 4 * self.d_sae):
            a_BM = torch.addmm(self.b_enc, xc_BD[rows], self.W_enc.T)
            parts.append(padded(a_BM.mul_(a_BM > self.threshold)))
        width = max((index.shape[1] for index, _ in parts), default=1)
        found = [torch.cat([F.pad(part[i], (0, width - part[i].shape[1])) for part in parts]) for i in (0, 1)]
        shape = (*x_BD.shape[:-1], width)
        return found[0].view(shape), found[1].view(shape)

    @torch.no_grad()
    def decode(self, index_BK: torch.Tensor, value_BK: torch.Tensor) -> torch.Tensor:
        """Reconstruction [..., d_in] of the activations at the features index (both [..., K])."""
        x_hat = weighted_rows(index_BK.flatten(0, -2), value_BK.flatten(0, -2), self.W_dec)
        return x_hat.add_(self.b_dec).view(*index_BK.shape[:-1], self.d_in)

    def architecture(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this SAE without its weights."""
        return {"d_in": self.d_in, "d_sae": self.d_sae, "apply_b_dec_to_input": self.apply_b_dec_to_input}

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """x̂ = decode(encode(x)), shape and device of x, float32."""
        return self.decode(*self.encode(x_BD))
