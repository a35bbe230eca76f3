"""Mutual information of two views of the same tokens by bottleneck width, each part of the sequences held out once.

Shape suffixes: S sequences, T tokens of a sequence, D width of a view, F folds, K bottleneck widths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.information.critics import CriticBank
from models.information.settings import CriticSettings
from models.information.training import Pairs, TellLine, train
from models.information.views import scaled

_ROWS = 4096  # tokens encoded at once


@dataclass(frozen=True)
class Information:
    """InfoNCE on the held-out part in nats and the step it was read at, by fold and k_z; none exceeds `ceiling`.

    ratio_F: of the member with the largest k_z, the participation ratio (Σσ)² / Σσ² of the singular values of the
    cross-covariance of f(x) and g(y) over the held-out tokens: the one-shot estimate of the dimension.
    """

    dimensions: tuple[int, ...]
    estimate_FK: npt.NDArray[np.float64]
    step_FK: npt.NDArray[np.int64]
    ratio_F: npt.NDArray[np.float64]
    ceiling: float


def measure(
    x_STD: Tensor,
    y_STD: Tensor,
    settings: CriticSettings,
    *,
    kept_ST: Tensor | None = None,
    tell: TellLine = lambda line: None,
) -> Information:
    """I(X; Y) by k_z: one bank of critics per fold, trained on the other folds, with seed and batches of its own; of
    several starts the better counts.

    `kept_ST`: tokens to use (bool), all when not given. `tell` is called after each test estimate.
    Raises ValueError where sequences or tokens are too few, or k_z exceeds a view's width.
    """
    settings.require(*x_STD.shape[:2])
    settings.require_width(min(x_STD.shape[2], y_STD.shape[2]))
    device = x_STD.device
    kept_ST = torch.ones(x_STD.shape[:2], dtype=torch.bool) if kept_ST is None else kept_ST.cpu()
    pairs = Pairs(*(scaled(view_STD[kept_ST.to(device)]) for view_STD in (x_STD, y_STD)))
    sequence_T = torch.arange(len(kept_ST)).repeat_interleave(kept_ST.sum(dim=1))
    trained, ratios = [], []
    for fold, held_S in enumerate(_folds(len(kept_ST), settings)):
        test_T = torch.isin(sequence_T, held_S)
        train_T, test_T = (torch.nonzero(part_T).squeeze(1).to(device) for part_T in (~test_T, test_T))
        if min(len(train_T), len(test_T)) < settings.batch:
            raise ValueError(
                f"part {fold + 1} of {settings.folds} keeps {len(test_T)} tokens, fewer than batch={settings.batch}; "
                "give more sequences"
            )
        seed = settings.seed * settings.folds + fold
        members = [(k, start) for k in settings.dimensions for start in range(settings.starts)]
        bank = CriticBank(settings, members, pairs.widths, seed, device)
        say = functools.partial(_tell, tell, f"part {fold + 1} of {settings.folds}")
        found = train(bank, pairs, train_T, test_T, seed, say)
        trained.append([max((m for m in found if m.k == k), key=lambda m: m.estimate) for k in settings.dimensions])
        ratios.append(cross_covariance_ratio(bank, trained[-1][-1].weights, pairs, test_T))
    return Information(
        settings.dimensions,
        np.array([[member.estimate for member in fold] for fold in trained]),
        np.array([[member.step for member in fold] for fold in trained]),
        np.array(ratios),
        settings.ceiling,
    )


def _tell(tell: TellLine, place: str, line: str) -> None:
    tell(f"{place}: {line}")


def _folds(sequences: int, settings: CriticSettings) -> Iterator[Tensor]:
    """The sequences that each fold holds out: all of them, each once."""
    order_S = torch.randperm(sequences, generator=torch.Generator().manual_seed(settings.seed))
    yield from (order_S[fold :: settings.folds] for fold in range(settings.folds))


@torch.no_grad()
def cross_covariance_ratio(bank: CriticBank, weights: dict[str, Tensor], pairs: Pairs, rows_T: Tensor) -> float:
    """(Σσ)² / Σσ², σ the singular values of the cross-covariance of one member's f(x) and g(y); NaN where all are 0."""
    sides = []
    for view, table_TD in (("f", pairs.x_TD), ("g", pairs.y_TD)):
        codes = [bank.encode(table_TD[rows], view, weights)[0] for rows in rows_T.split(_ROWS)]
        code_TK = torch.cat(codes).double()
        sides.append(code_TK - code_TK.mean(dim=0))
    sigma_K = torch.linalg.svdvals(sides[0].T @ sides[1])
    square = float(sigma_K.square().sum())
    return float(sigma_K.sum()) ** 2 / square if square > 0 else float("nan")
