"""The shape of an activation cloud: the participation ratio of its covariance.

Shape suffixes: N tokens, D activation width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Array = torch.Tensor | npt.NDArray[np.floating]


def rounding_floor(eigenvalues_D: torch.Tensor, n_samples: int) -> float:
    """What ascending float64 eigenvalues of a covariance of so many tokens must exceed to be more than rounding."""
    return float(eigenvalues_D[-1]) * max(eigenvalues_D.numel(), n_samples) * torch.finfo(torch.float64).eps


def participation_ratio_of(eigenvalues_D: torch.Tensor, floor: float, deflate: int = 0) -> float:
    """PR of ascending eigenvalues without the `deflate` largest; those up to `floor` count as zero.

    Raises ValueError when nothing is left.
    """
    if deflate < 0:
        raise ValueError(f"deflate={deflate} must be >= 0, the number of top eigenvectors to remove")
    spectrum = torch.where(eigenvalues_D > floor, eigenvalues_D, 0.0)
    rank = int((spectrum > 0).sum())
    if rank <= deflate:
        raise ValueError(
            f"deflate={deflate} leaves nothing of a covariance of rank {rank}; choose deflate < rank, "
            "on activations that vary"
        )
    kept = spectrum[: eigenvalues_D.numel() - deflate]
    return float(kept.sum().square() / kept.square().sum())


def _ratio(eigenvalues_D: torch.Tensor, deflate: int, n_samples: int) -> float:
    return participation_ratio_of(eigenvalues_D, rounding_floor(eigenvalues_D, n_samples), deflate)


def participation_ratio(x_ND: Array, deflate: int = 0) -> float:
    """PR = (Σλ)² / Σλ² over the eigenvalues λ of the mean-centred covariance of x.

    Isotropic covariance gives D, rank one gives 1 (Gao & Ganguli 2017; Litwin-Kumar et al. 2017).

    Args:
        x_ND: activations, one row per token.
        deflate: how many of the largest eigenvalues to leave out.
    Raises:
        ValueError: fewer than two tokens, non-finite values, or nothing left after deflation.
    """
    x = torch.as_tensor(x_ND).detach().to(torch.float64)
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; the covariance needs (tokens >= 2, d_model)")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds non-finite values; drop those tokens or repair their source")
    centred = x - x.mean(dim=0)
    # the nonzero eigenvalues of XᵀX and XXᵀ agree, so take the smaller matrix
    gram = centred.T @ centred if x.shape[0] >= x.shape[1] else centred @ centred.T
    return _ratio(torch.linalg.eigvalsh(gram), deflate, x.shape[0])


class CovarianceSums:
    """Streaming mean and covariance of one layer's activations, in float64 on the activations' device.

    Sums are taken around the first batch's mean, so a large common offset does not cancel digits.
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self._shift_D = torch.empty(0)
        self._sum_D = torch.empty(0)
        self._outer_DD = torch.empty(0)

    def update(self, x_ND: torch.Tensor) -> None:
        """Add activations; leading dimensions are flattened to tokens."""
        x = x_ND.detach().reshape(-1, x_ND.shape[-1]).to(torch.float64)
        if self.n_tokens == 0:
            self._shift_D = x.mean(dim=0)
            self._sum_D = torch.zeros_like(self._shift_D)
            self._outer_DD = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
        if x.shape[1] != self._sum_D.numel():
            raise ValueError(f"d_model={x.shape[1]} differs from the stream's {self._sum_D.numel()}; use one per layer")
        shifted = x - self._shift_D
        self._sum_D += shifted.sum(dim=0)
        self._outer_DD.addmm_(shifted.T, shifted)
        self.n_tokens += x.shape[0]

    @property
    def mean_D(self) -> torch.Tensor:
        """Per-dimension mean over all tokens so far, float64."""
        self._require(1)
        return self._shift_D + self._sum_D / self.n_tokens

    def covariance_DD(self) -> torch.Tensor:
        """Population covariance (divided by the number of tokens), float64."""
        self._require(2)
        drift = self._sum_D / self.n_tokens
        return self._outer_DD / self.n_tokens - torch.outer(drift, drift)

    def eigenvalues_D(self) -> torch.Tensor:
        """Eigenvalues of the covariance, ascending, float64."""
        covariance = self.covariance_DD()
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("the stream held non-finite activations; drop those tokens or repair their source")
        return torch.linalg.eigvalsh(covariance)

    def summary(self, eigenvalues_D: torch.Tensor | None = None) -> dict[str, float]:
        """d_model, n_tokens, pr, pr_deflated (one top eigenvector removed) and pr_over_d of the layer.

        `eigenvalues_D` saves the decomposition where the caller has them already.
        """
        eigenvalues = self.eigenvalues_D() if eigenvalues_D is None else eigenvalues_D
        d = eigenvalues.numel()
        pr = _ratio(eigenvalues, 0, self.n_tokens)
        return {
            "d_model": d,
            "n_tokens": self.n_tokens,
            "pr": pr,
            "pr_deflated": _ratio(eigenvalues, 1, self.n_tokens),
            "pr_over_d": pr / d,
        }

    def _require(self, n: int) -> None:
        if self.n_tokens < n:
            raise ValueError(f"{self.n_tokens} tokens were added; at least {n} are needed; call update first")
