"""The two regressions of the utility study, each for many feature blocks of the same rows at once.

Shapes: B blocks, n training and m test rows, C features, Y targets, A penalties (`x_BnC`, `y_nY`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

ALPHAS = np.logspace(-3, 3, 13)
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (x_BnC, y_nY, x_BmC) -> predictions [B, m, Y]


def ridge(x_BnC: np.ndarray, y_nY: np.ndarray, x_BmC: np.ndarray) -> np.ndarray:
    """Standardised ridge, each target's penalty the one of ALPHAS with the least leave-one-out error: [B, m, Y].

    The numbers of scikit-learn's `make_pipeline(StandardScaler(), RidgeCV(ALPHAS, alpha_per_target=True))`, from one
    eigendecomposition of the C × C Gram matrix a block: with Z = XV the leverage of row i is 1/n + Σ_c Z_ic²/(λ_c + α),
    and its leave-one-out residual the residual over 1 − leverage (Allen 1974).
    """
    n = x_BnC.shape[1]
    mean_B1C, scale_B1C = x_BnC.mean(axis=1, keepdims=True), x_BnC.std(axis=1, keepdims=True)
    scale_B1C = np.where(scale_B1C > 1e-12 * np.maximum(1.0, np.abs(mean_B1C)), scale_B1C, 1.0)
    x_BnC = (x_BnC - mean_B1C) / scale_B1C
    mean_Y = y_nY.mean(axis=0)
    y_nY = y_nY - mean_Y
    value_BC, vector_BCC = np.linalg.eigh(x_BnC.transpose(0, 2, 1) @ x_BnC)
    z_BnC = x_BnC @ vector_BCC
    shrink_BCA = 1 / (np.maximum(value_BC, 0.0)[:, :, None] + ALPHAS)
    weight_BCAY = shrink_BCA[..., None] * (z_BnC.transpose(0, 2, 1) @ y_nY)[:, :, None, :]
    kept_BnA = 1 - 1 / n - z_BnC**2 @ shrink_BCA
    blocks, columns, penalties, _ = weight_BCAY.shape
    fitted = z_BnC @ weight_BCAY.reshape(blocks, columns, -1)
    left_out = (y_nY[:, None, :] - fitted.reshape(blocks, n, penalties, -1)) / kept_BnA[..., None]
    best_BY = np.einsum("bnay,bnay->bay", left_out, left_out).argmin(axis=1)
    weight_BCY = np.take_along_axis(weight_BCAY, best_BY[:, None, None, :], axis=2)[:, :, 0]
    return ((x_BmC - mean_B1C) / scale_B1C) @ (vector_BCC @ weight_BCY) + mean_Y


def trees(x_BnC: np.ndarray, y_nY: np.ndarray, x_BmC: np.ndarray) -> np.ndarray:
    """Histogram gradient boosting, a model a target: [B, m, Y]."""

    def one(x_nC: np.ndarray, y_n: np.ndarray, x_mC: np.ndarray) -> np.ndarray:
        return HistGradientBoostingRegressor(random_state=0).fit(x_nC, y_n).predict(x_mC)

    return np.stack(
        [np.column_stack([one(x, y_n, x_test) for y_n in y_nY.T]) for x, x_test in zip(x_BnC, x_BmC, strict=True)]
    )


FAMILIES: Mapping[str, Fit] = {"ridge": ridge, "trees": trees}
