"""Matched bottlenecks: any feature matrix reduced to as many dimensions as the odor embedding has.

They answer whether 256 dimensions alone explain what a learned 256-d embedding shows.

Shapes: N rows, D features, E bottleneck dimensions (`x_ND`, `embedding_NE`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection
from torch import Tensor, nn

from models.cpu.adam import Adam
from models.cpu.threads import torch_threads

DIM = 256


def pca(x_ND: np.ndarray, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Scores on the leading principal components (exact SVD, so `seed` changes nothing): float64 [N, E].

    Raises:
        ValueError: dim exceeds min(N, D), or x is not a finite matrix.
    """
    del seed
    x_ND = _checked(x_ND, dim)
    return PCA(dim, svd_solver="full").fit_transform(x_ND)


def random_projection(x_ND: np.ndarray, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Gaussian random projection (Johnson & Lindenstrauss 1984), entries N(0, 1/dim): float64 [N, E].

    Raises:
        ValueError: see `pca`.
    """
    x_ND = _checked(x_ND, dim)
    return GaussianRandomProjection(dim, random_state=seed).fit_transform(x_ND)


def autoencoder(
    x_ND: np.ndarray,
    dim: int = DIM,
    seed: int = 0,
    *,
    hidden: int = 512,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    threads: int = 1,
) -> np.ndarray:
    """Code float64 [N, E] of an autoencoder D → hidden → dim → hidden → D; code linear, hidden layers ReLU.

    Trained by Adam on binary cross-entropy when x is 0/1, on squared error otherwise; the same seed and thread
    count give the same bits.

    Raises:
        ValueError: see `pca`; or epochs below 1.
    """
    x_ND = _checked(x_ND, dim)
    if epochs < 1:
        raise ValueError(f"epochs={epochs}; choose epochs >= 1")
    width = x_ND.shape[1]
    binary = bool(np.isin(x_ND, (0, 1)).all())
    data_ND = torch.from_numpy(x_ND.astype(np.float32))
    with torch_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encode = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        decode = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        optimiser = Adam([*encode.parameters(), *decode.parameters()], learning_rate)
        loss_of: Callable[[Tensor, Tensor], Tensor] = (
            nn.functional.binary_cross_entropy_with_logits if binary else nn.functional.mse_loss
        )
        for _ in range(epochs):
            for rows in torch.randperm(len(data_ND)).split(batch_size):
                loss = loss_of(decode(encode(data_ND[rows])), data_ND[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            return encode(data_ND).numpy().astype(np.float64)


METHODS: dict[str, Callable[..., np.ndarray]] = {  # by the name of the representation, without its seed
    "pca256": pca,
    "rp256": random_projection,
    "ae256": autoencoder,
}


def _checked(x_ND: np.ndarray, dim: int) -> np.ndarray:
    x_ND = np.asarray(x_ND, np.float64)
    if x_ND.ndim != 2 or not np.isfinite(x_ND).all():
        raise ValueError(f"features of shape {x_ND.shape}; give a finite matrix [N, D]")
    if not 1 <= dim <= min(x_ND.shape):
        raise ValueError(f"dim={dim} for {x_ND.shape[0]} rows of {x_ND.shape[1]} features; choose 1 <= dim <= both")
    return x_ND
