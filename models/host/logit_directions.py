"""Logits in their leading principal directions, from final hidden states, without a [tokens, vocabulary] tensor.

Shape suffixes: B sequences, T tokens, D d_model, M directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.host.next_token_loss import NextTokenLoss

MOST = 500  # directions that are kept


def principal_logits(head: NextTokenLoss, hidden_BTD: Tensor, most: int = MOST) -> Tensor:
    """Scores of the logits in their `most` leading principal directions over these tokens (fewer than that where the
    hidden states have fewer dimensions), [B, T, M] float32, by falling variance.

    A constant added to all logits of a token changes no prediction, so their mean over the vocabulary is taken out.
    With W the unembedding and G = WᵀW (around its mean row), (h − h̄)G^½ has the inner products of the logits, and so
    their principal components. A bias of the unembedding is one constant for all tokens; logits are taken before a soft
    cap, which is invertible.
    """
    values_D, vectors_DD = torch.linalg.eigh(head.gram_DD())
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    logits_ND = hidden_BTD.flatten(0, 1).double() @ root_DD
    logits_ND -= logits_ND.mean(dim=0)
    _, directions_DD = torch.linalg.eigh(logits_ND.T @ logits_ND)
    leading_DM = directions_DD.flip(1)[:, :most]
    return (logits_ND @ leading_DM).float().unflatten(0, hidden_BTD.shape[:2])
