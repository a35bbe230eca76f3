"""Splits of k-nearest-neighbour patches into training and test rows, and what the two sides still share.

Rows whose patches overlap are not independent: two patches that share molecules have like features and like targets,
whatever the features mean. Random folds, and folds by skeleton, leave such pairs on both sides. `neighbourhood_folds`
does not.

Shapes: N rows, P = K + 1 patch points (`patches_NP`: each row, then its K nearest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.model_selection import RepeatedKFold

FOLDS, REPEATS = 5, 3
_LEAST_FOLDS = 10
_FEWEST_TRAINING = 20  # rows, and
_LEAST_TRAINING = 0.1  # share of the rows that a fold must keep for training
_LEAST_TESTED = 0.25  # share of the rows that must be tested

Fold = tuple[np.ndarray, np.ndarray]  # training rows, test rows


class TooFewRows(ValueError):
    """Rows that are too few, or patches that overlap too widely, for the folds asked for."""


def folds(n: int, groups_N: np.ndarray | Sequence[str] | None = None) -> list[Fold]:
    """The FOLDS × REPEATS splits of n rows: RepeatedKFold with seed 0, or with no group on both sides of a split.

    Grouped test folds are as equal in size as whole groups allow; a group larger than a fold is a fold of its own.

    Raises:
        TooFewRows: too few rows or groups for the folds, or not one group a row.
    """
    if n < 2 * FOLDS:
        raise TooFewRows(f"{n} rows for {FOLDS} folds; give at least {2 * FOLDS}")
    if groups_N is None:
        return list(RepeatedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=0).split(np.empty((n, 0))))
    _, code_N = np.unique(np.asarray(groups_N), return_inverse=True)
    if len(code_N) != n or code_N.max() + 1 < 2 * FOLDS:
        raise TooFewRows(
            f"{len(code_N)} group labels of {code_N.max() + 1} groups for {n} rows and {FOLDS} folds; give one label a "
            f"row and at least {2 * FOLDS} groups"
        )
    out = []
    for repeat in range(REPEATS):
        fold_N = _fill(np.bincount(code_N), np.random.default_rng(repeat))[code_N]
        out += [(np.flatnonzero(fold_N != f), np.flatnonzero(fold_N == f)) for f in range(FOLDS)]
    return out


def _fill(size_G: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fold of each group: the emptiest so far, large groups first and by size, small ones in random order."""
    order = rng.permutation(len(size_G))
    large = np.where(size_G > size_G.sum() / (10 * FOLDS), size_G, 0)
    order = order[np.argsort(-large[order], kind="stable")]
    filled_F, fold_G = np.zeros(FOLDS, np.int64), np.empty(len(size_G), np.int64)
    for group in order:
        fold_G[group] = filled_F.argmin()
        filled_F[fold_G[group]] += size_G[group]
    return fold_G


def neighbourhood_folds(patches_NP: np.ndarray, seed: int = 0) -> list[Fold]:
    """Splits in which no patch of a test row shares a molecule with the patch of a training row.

    A test fold is a neighbourhood: a row drawn at random and the rows, not tested before, whose patches share most
    molecules with its own, as many as a patch holds (a twentieth of the rows, where that is fewer). Rows outside the
    fold that share any molecule with it are left out of both sides (purged). A neighbourhood that would leave less
    than a tenth of the rows for training is not tested.

    Args:
        patches_NP: the molecules of each row's patch.
        seed: of the random order in which neighbourhoods are formed.

    Raises:
        TooFewRows: the patches are so large, or overlap so widely, that fewer than ten folds or than a quarter
            of the rows are left to test.
    """
    patches_NP = np.asarray(patches_NP)
    n = len(patches_NP)
    share_NN = shared_molecules(patches_NP)
    size = max(1, min(patches_NP.shape[1], n // 20))
    free_N = np.ones(n, bool)
    out: list[Fold] = []
    for seed_row in np.random.default_rng(seed).permutation(n):
        if not free_N[seed_row]:
            continue
        row = share_NN[[seed_row]]
        near = row.indices[np.argsort(-row.data, kind="stable")]
        test = near[free_N[near]][:size]
        free_N[test] = False
        apart_N = np.ones(n, bool)
        apart_N[share_NN[test].indices] = False
        if apart_N.sum() >= max(_FEWEST_TRAINING, _LEAST_TRAINING * n):
            out.append((np.flatnonzero(apart_N), np.sort(test)))
    tested = sum(len(test) for _, test in out)
    if len(out) < _LEAST_FOLDS or tested < _LEAST_TESTED * n:
        raise TooFewRows(
            f"patches of {patches_NP.shape[1]} among {n} rows overlap so widely that {tested} rows in {len(out)} "
            f"neighbourhoods can be tested on rows that share none of their molecules; choose fewer neighbours, or "
            f"give more rows"
        )
    return out


def shared_molecules(patches_NP: np.ndarray) -> sparse.csr_array:
    """How many molecules the patches of two rows have in common: sparse int32 [N, N], each row sorted by column."""
    n, width = patches_NP.shape
    at = (np.repeat(np.arange(n), width), patches_NP.ravel())
    holds = sparse.csr_array((np.ones(n * width, np.int32), at), shape=(n, int(patches_NP.max()) + 1))
    shared = sparse.csr_array(holds @ holds.T)
    shared.sort_indices()
    return shared


def share_molecules(patches_NP: np.ndarray, splits: Sequence[Fold]) -> bool:
    """Whether any test row's patch holds a molecule that a patch of its training rows holds."""
    patches_NP = np.asarray(patches_NP)
    for train, test in splits:
        held = np.zeros(int(patches_NP.max()) + 1, bool)
        held[patches_NP[train]] = True
        if held[patches_NP[test]].any():
            return True
    return False


@dataclass(frozen=True)
class Reach:
    """What a list of splits leaves: `tested` rows in all, and the fewest and mean rows of training of a fold."""

    folds: int
    tested: int
    fewest_training: int
    mean_training: float


def reach(splits: Sequence[Fold]) -> Reach:
    """Counts of a list of splits; a row tested in several folds counts once, means are over tested rows."""
    train_F, test_F = (np.array([len(fold[side]) for fold in splits]) for side in (0, 1))
    return Reach(
        folds=len(splits),
        tested=len(np.unique(np.concatenate([test for _, test in splits]))),
        fewest_training=int(train_F.min()),
        mean_training=float(np.average(train_F, weights=test_F)),
    )


def neighbours_in_training(patches_NP: np.ndarray, splits: Sequence[Fold]) -> float:
    """Mean share of a test row's neighbours that lie in its training set: how near the test is to the training."""
    shares = []
    for train, test in splits:
        trained_N = np.zeros(len(patches_NP), bool)
        trained_N[train] = True
        shares.append(trained_N[patches_NP[test, 1:]].mean())
    return float(np.mean(shares))
