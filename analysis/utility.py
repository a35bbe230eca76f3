"""Does local topology add anything to local geometry? Nested regressions on k-nearest-neighbour patches.

Each row i has a patch: itself and its k nearest neighbours. From the patch come a geometry block, a topology block
and three label targets; the question is ΔR² of geometry + topology over geometry, out of sample.

Patches of similar rows overlap, so random folds leave near-copies of test patches in training. Splits by group (in
chemistry: by skeleton) keep similar rows on one side, and `neighbours_in_training` measures how far that goes.

Shapes: N rows, K neighbours, P = K + 1 patch points, D coordinates, L labels, G geometry and T topology features
(`distance_NN`, `x_ND`, `labels_NL`, `patches_NP`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import RepeatedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

GEOMETRY = (
    "neighbour_mean",
    "neighbour_std",
    "neighbour_p90",
    "neighbour_max",
    "patch_mean",
    "patch_std",
    "density",
    "participation_ratio",
    "pca3_residual",
)
TOPOLOGY = ("h1_count", "h1_max", "h1_total", "h1_mean", "h1_p95")
TARGETS = ("label_jaccard", "any_common_label", "label_entropy")
ALPHAS = np.logspace(-3, 3, 13)
FOLDS, REPEATS = 5, 3


@dataclass(frozen=True, kw_only=True)
class Utility:
    """Out-of-sample R² of one target under one model family, means over the FOLDS × REPEATS shared test folds.

    `delta` = r2_both − r2_geometry, with a 95% interval (`delta_lo`, `delta_hi`) by the corrected resampled t
    (Nadeau & Bengio 2003), which allows for training sets that overlap. `p` is the block-permutation p-value of
    `delta`, None where it was not asked for.
    """

    target: str
    family: str
    r2_geometry: float
    r2_topology: float
    r2_both: float
    delta: float
    delta_lo: float
    delta_hi: float
    p: float | None


def patches(distance_NN: np.ndarray, k: int = 40) -> np.ndarray:
    """Each row followed by its k nearest other rows, nearest first, ties by row number: int64 [N, K + 1].

    Raises:
        ValueError: a distance matrix that is not square, or k outside 1 … N − 1.
    """
    n = len(distance_NN)
    if distance_NN.ndim != 2 or distance_NN.shape[1] != n:
        raise ValueError(f"distances of shape {distance_NN.shape}; give a square matrix [N, N]")
    if not 1 <= k < n:
        raise ValueError(f"k={k} neighbours for n={n} rows; choose 1 <= k <= n - 1")
    out_NP = np.empty((n, k + 1), np.int64)
    out_NP[:, 0] = np.arange(n)
    for i, row in enumerate(distance_NN):
        order = np.argsort(row, kind="stable")
        out_NP[i, 1:] = order[order != i][:k]
    return out_NP


def geometry_block(distance_NN: np.ndarray, x_ND: np.ndarray, patches_NP: np.ndarray, chunk: int = 64) -> np.ndarray:
    """The features of GEOMETRY: float64 [N, 9].

    `density` is 1/(mean neighbour distance + 1e-8). With λ the spectrum of the patch's covariance,
    `participation_ratio` = (Σλ)²/Σλ² and `pca3_residual` = 1 − (λ1 + λ2 + λ3)/Σλ; both are 0 for a patch of
    identical points.
    """
    near_NK = distance_NN[patches_NP[:, :1], patches_NP[:, 1:]].astype(np.float64)
    mean_N = near_NK.mean(axis=1)
    pairs = np.triu_indices(patches_NP.shape[1], 1)
    wide = np.array([distance_NN[np.ix_(p, p)][pairs] for p in patches_NP], np.float64)
    spectrum = np.concatenate([_spectrum(x_ND[patches_NP[i : i + chunk]]) for i in range(0, len(patches_NP), chunk)])
    total_N = spectrum.sum(axis=1)
    safe_N = np.where(total_N > 0, total_N, 1.0)
    squares_N = np.where(total_N > 0, (spectrum**2).sum(axis=1), 1.0)
    return np.column_stack(
        [
            mean_N,
            near_NK.std(axis=1),
            np.quantile(near_NK, 0.9, axis=1),
            near_NK.max(axis=1),
            wide.mean(axis=1),
            wide.std(axis=1),
            1 / (mean_N + 1e-8),
            total_N**2 / squares_N,
            np.where(total_N > 0, 1 - spectrum[:, -3:].sum(axis=1) / safe_N, 0.0),
        ]
    )


def topology_block(
    distance_NN: np.ndarray, patches_NP: np.ndarray, h1: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The features of TOPOLOGY, from the H1 diagram of each patch's Vietoris-Rips filtration: float64 [N, 5].

    `h1` maps a distance matrix [P, P] to (birth, death) pairs [n, 2]. A patch without a loop is a row of zeros.
    """
    out_NT = np.zeros((len(patches_NP), len(TOPOLOGY)))
    for i, patch in enumerate(patches_NP):
        pairs = h1(np.ascontiguousarray(distance_NN[np.ix_(patch, patch)]))
        life = pairs[:, 1] - pairs[:, 0]
        if life.size:
            out_NT[i] = life.size, life.max(), life.sum(), life.mean(), np.quantile(life, 0.95)
    return out_NT


def targets(labels_NL: np.ndarray, patches_NP: np.ndarray) -> np.ndarray:
    """The label targets of TARGETS, each over the k neighbours of a row: float64 [N, 3].

    Mean Jaccard similarity with the row's labels (0 for two empty sets); share of neighbours with any common label;
    mean binary entropy, in bits, of the neighbours' label prevalence over the labels that any neighbour has.

    Raises:
        ValueError: labels that are not a 0/1 matrix of N rows, or a target with a single value.
    """
    labels_NL = np.asarray(labels_NL)
    if labels_NL.ndim != 2 or len(labels_NL) != len(patches_NP) or not np.isin(labels_NL, (0, 1)).all():
        raise ValueError(f"labels of shape {labels_NL.shape} for {len(patches_NP)} rows; give a 0/1 matrix [N, L]")
    have = labels_NL.astype(np.float64)
    size_N = have.sum(axis=1)
    near_NK = patches_NP[:, 1:]
    out_N3 = np.zeros((len(have), 3))
    for i, near in enumerate(near_NK):
        common_K = have[near] @ have[i]
        union_K = size_N[near] + size_N[i] - common_K
        out_N3[i, 0] = np.divide(common_K, union_K, out=np.zeros_like(common_K), where=union_K > 0).mean()
        out_N3[i, 1] = (common_K > 0).mean()
        prevalence = have[near].mean(axis=0)
        active = prevalence[prevalence > 0]
        if active.size:
            out_N3[i, 2] = stats.entropy(np.stack([active, 1 - active]), base=2).mean()
    for name, column in zip(TARGETS, out_N3.T, strict=True):
        if np.ptp(column) == 0:
            raise ValueError(
                f"target {name} is {column[0]:g} in all {len(have)} rows; labels of one class explain nothing"
            )
    return out_N3


Fold = tuple[np.ndarray, np.ndarray]  # training rows, test rows


def folds(n: int, groups_N: np.ndarray | Sequence[str] | None = None) -> list[Fold]:
    """The FOLDS × REPEATS splits of n rows: RepeatedKFold with seed 0, or with no group on both sides of a split.

    Grouped test folds are as equal in size as whole groups allow; a group larger than a fold is a fold of its own.

    Raises:
        ValueError: too few rows or groups for the folds, or not one group a row.
    """
    if n < 2 * FOLDS:
        raise ValueError(f"{n} rows for {FOLDS} folds; give at least {2 * FOLDS}")
    if groups_N is None:
        return list(RepeatedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=0).split(np.empty((n, 0))))
    _, code_N = np.unique(np.asarray(groups_N), return_inverse=True)
    if len(code_N) != n or code_N.max() + 1 < 2 * FOLDS:
        raise ValueError(
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


def neighbours_in_training(patches_NP: np.ndarray, splits: Sequence[Fold]) -> float:
    """Mean share of a test row's neighbours that lie in its training set: how near the test is to the training."""
    shares = []
    for train, test in splits:
        trained_N = np.zeros(len(patches_NP), bool)
        trained_N[train] = True
        shares.append(trained_N[patches_NP[test, 1:]].mean())
    return float(np.mean(shares))


def compare(
    geometry_NG: np.ndarray,
    topology_NT: np.ndarray,
    targets_N3: np.ndarray,
    *,
    family: str = "ridge",
    permutations: int = 0,
    order_N: np.ndarray | None = None,
    block: int = 41,
    groups_N: np.ndarray | Sequence[str] | None = None,
    seed: int = 0,
) -> list[Utility]:
    """One Utility a target; every comparison uses the same `folds`, grouped where `groups_N` is given.

    `family` is "ridge" (StandardScaler, RidgeCV over ALPHAS) or "trees" (histogram gradient boosting). With
    `permutations` B, p = (1 + #{ΔR² of a permutation >= observed})/(B + 1). A permutation moves the rows of the
    topology block as wholes, so its inner correlations stay and its tie to geometry and target breaks. Rows that
    share neighbours resemble each other, and single rows moved about would lose that: p would be too small. So runs
    of `block` rows, next to each other in `order_N` (see `block_order`), move together; without `order_N` rows move
    alone, which is right only for rows that are independent.

    Raises:
        ValueError: an unknown family, blocks of different lengths, too few rows for the folds, permutations below 0,
            or fewer than 5 runs of `block` rows to permute.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}; choose one of {sorted(FAMILIES)}")
    n = len(targets_N3)
    if not (len(geometry_NG) == len(topology_NT) == n):
        raise ValueError(
            f"{len(geometry_NG)} geometry, {len(topology_NT)} topology and {n} target rows; give equal numbers"
        )
    if permutations < 0:
        raise ValueError(f"permutations={permutations}; choose permutations >= 0")
    if permutations and order_N is not None and n < 5 * block:
        raise ValueError(f"block={block} cuts {n} rows into {n // block} runs; choose block <= {n // 5}")
    splits = folds(n, groups_N)
    fit = FAMILIES[family]
    geometry = _scores(fit, geometry_NG, targets_N3, splits)
    topology = _scores(fit, topology_NT, targets_N3, splits)
    both = _scores(fit, np.hstack([geometry_NG, topology_NT]), targets_N3, splits)
    delta = both - geometry
    rng = np.random.default_rng(seed)
    reached = np.ones(targets_N3.shape[1])
    for _ in range(permutations):
        shuffled = np.hstack([geometry_NG, topology_NT[_permutation(n, order_N, block, rng)]])
        reached += (_scores(fit, shuffled, targets_N3, splits) - geometry).mean(axis=0) >= delta.mean(axis=0)
    results = []
    for column, name in enumerate(TARGETS):
        lo, hi = _corrected_interval(delta[:, column])
        results.append(
            Utility(
                target=name,
                family=family,
                r2_geometry=float(geometry[:, column].mean()),
                r2_topology=float(topology[:, column].mean()),
                r2_both=float(both[:, column].mean()),
                delta=float(delta[:, column].mean()),
                delta_lo=lo,
                delta_hi=hi,
                p=float(reached[column] / (permutations + 1)) if permutations else None,
            )
        )
    return results


def block_order(distance_NN: np.ndarray) -> np.ndarray:
    """Rows in the leaf order of average-linkage clustering, so that similar rows are next to each other: int64 [N]."""
    return leaves_list(linkage(squareform(distance_NN, checks=False), "average")).astype(np.int64)


def _permutation(n: int, order_N: np.ndarray | None, block: int, rng: np.random.Generator) -> np.ndarray:
    if order_N is None:
        return rng.permutation(n)
    runs = np.array_split(np.roll(order_N, rng.integers(n)), n // block)
    moved = np.empty(n, np.int64)
    moved[order_N] = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
    return moved


def _spectrum(x_CPD: np.ndarray) -> np.ndarray:
    """Eigenvalues of each patch's covariance, ascending, from its P × P Gram matrix: [C, P]."""
    centred = x_CPD.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    gram = centred @ centred.transpose(0, 2, 1) / (x_CPD.shape[1] - 1)
    values = np.linalg.eigvalsh(gram)
    values[values < 1e-12 * values[:, -1:]] = 0.0
    return values


def _ridge(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    model = make_pipeline(StandardScaler(), RidgeCV(ALPHAS, alpha_per_target=True))
    return model.fit(x, y).predict(x_test)


def _trees(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    def one(column: np.ndarray) -> np.ndarray:
        return HistGradientBoostingRegressor(random_state=0).fit(x, column).predict(x_test)

    return np.column_stack([one(column) for column in y.T])


FAMILIES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {"ridge": _ridge, "trees": _trees}


def _scores(
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    splits: Sequence[Fold],
) -> np.ndarray:
    """R² of each target in each test fold: [folds, targets]."""
    return np.array(
        [r2_score(y[test], fit(x[train], y[train], x[test]), multioutput="raw_values") for train, test in splits]
    )


def _corrected_interval(delta: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of J fold differences: variance (1/J + test/train share)·s²."""
    scale = np.sqrt((1 / len(delta) + 1 / (FOLDS - 1)) * delta.var(ddof=1))
    half = stats.t.ppf(0.975, len(delta) - 1) * scale
    return float(delta.mean() - half), float(delta.mean() + half)
