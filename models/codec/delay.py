"""The delay pattern (Copet et al. 2023, MusicGen, arXiv 2306.05284): codebook k is shifted right by k steps.

A model that predicts one column at a time then sees the coarser codebooks of a frame before the finer ones.
Shapes: B batch, K codebooks, T frames, L = T + K - 1 delayed steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delay(codes_BKT: Tensor, *, pad: int) -> Tensor:
    """[B, K, T] -> [B, K, T + K - 1]: delayed[:, k, t + k] = codes[:, k, t], every other place is `pad`.

    Raises ValueError for another rank or an empty sequence.
    """
    if codes_BKT.dim() != 3 or codes_BKT.shape[-1] == 0:
        raise ValueError(f"codes have shape {tuple(codes_BKT.shape)}, expected [B, K, T] with T >= 1")
    B, K, T = codes_BKT.shape
    delayed = codes_BKT.new_full((B, K, T + K - 1), pad)
    for k in range(K):
        delayed[:, k, k : k + T] = codes_BKT[:, k]
    return delayed


def undelay(delayed_BKL: Tensor) -> Tensor:
    """Exact inverse of `delay`: [B, K, L] -> [B, K, L - K + 1]. Raises ValueError when L < K."""
    if delayed_BKL.dim() != 3 or delayed_BKL.shape[-1] < delayed_BKL.shape[1]:
        raise ValueError(
            f"delayed codes have shape {tuple(delayed_BKL.shape)}, expected [B, K, L] with L >= K; no frame is complete"
        )
    _, K, L = delayed_BKL.shape
    T = L - K + 1
    return torch.stack([delayed_BKL[:, k, k : k + T] for k in range(K)], dim=1)


def training_pair(codes_BKT: Tensor, *, pad: int, bos: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, K, L] of next-column prediction: the targets are the delayed codes, the inputs the
    same columns one step later, after a first column of `bos`. Shorter clips of a batch end in `pad`."""
    targets = delay(codes_BKT, pad=pad)
    first = torch.full_like(targets[..., :1], bos)
    return torch.cat([first, targets[..., :-1]], dim=-1), targets
