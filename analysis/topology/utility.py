"""Does local topology add anything to local geometry? Nested regressions on k-nearest-neighbour patches.

Each row i has a patch: itself and its k nearest neighbours. From the patch come a geometry block, a topology block
and three label targets; the question is what geometry + topology explains out of sample beyond geometry (the gain).

Patches of similar rows share molecules, and so do their features and their targets, whatever the features mean: noise
drawn once per molecule and averaged over each patch gains R², too, where a test patch has molecules in common with
training patches. So the gain of topology is compared with that of such noise (`PatchNoise`, the control), and tested
on neighbourhoods that share no molecule with their training rows (`utility_folds.neighbourhood_folds`).

Shapes: N rows, K neighbours, P = K + 1 patch points, D coordinates, L labels, G geometry and T topology features,
Y targets, F folds, B draws of the control (`distance_NN`, `x_ND`, `labels_NL`, `patches_NP`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.topology.utility_folds import Fold, folds, neighbourhood_folds, share_molecules
from analysis.topology.utility_models import FAMILIES, Fit

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
LEAST_DRAWS = 19  # of the control, for a p that can reach 0.05
_BAND_DRAWS = 39  # for the middle 95% of the control
_ROWS_AT_ONCE = 4_000  # of feature blocks fitted together: as fast as more, and small


@dataclass(frozen=True, kw_only=True)
class Utility:
    """Out-of-sample R² of one target under one model family, pooled over all test rows of all folds.

    gain: r2_both − r2_geometry. control: mean gain of patch noise in place of topology, and the range from
    control_lo to control_hi of the middle 95% of its draws, a description: it held the gain of a further noise block in
    88% to 93% of simulations (docs/calibration.md). delta: gain − control; without
    patches there is no control, and delta is the plain gain. p: how often patch noise gains as much as topology,
    (1 + #)/(B + 1); None where it was not asked for, NaN where it cannot be had, and `why` says what it needs.

    delta_lo and delta_hi are NaN: no interval of delta held its level in simulation (docs/calibration.md); the
    draws of the control are what shows how far delta is from nothing.
    """

    target: str
    family: str
    r2_geometry: float
    r2_topology: float
    r2_both: float
    gain: float
    control: float
    control_lo: float
    control_hi: float
    delta: float
    delta_lo: float = math.nan
    delta_hi: float = math.nan
    p: float | None
    why: str = ""


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


class PatchNoise:
    """Blocks without any chemistry that share molecules as the topology block does.

    A draw has noise per molecule, correlated between columns as the topology block's normal scores are, averaged over
    each patch; each column then takes the topology column's values by rank. So margins are those of topology,
    correlations nearly so, and two rows resemble each other as far as their patches overlap.
    """

    def __init__(self, topology_NT: np.ndarray, patches_NP: np.ndarray) -> None:
        self.patches_NP = np.asarray(patches_NP)
        self.sorted_NT = np.sort(topology_NT, axis=0)
        scores_NT = stats.norm.ppf((stats.rankdata(topology_NT, axis=0) - 0.5) / len(topology_NT))
        value_T, vector_TT = np.linalg.eigh(np.atleast_2d(np.cov(scores_NT, rowvar=False)))
        self._mix_TT = vector_TT * np.sqrt(np.maximum(value_T, 0.0)) @ vector_TT.T

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One block: float64 [N, T]."""
        molecules = int(self.patches_NP.max()) + 1
        noise_MT = rng.standard_normal((molecules, len(self._mix_TT))) @ self._mix_TT
        pooled_NT = np.stack([column[self.patches_NP].mean(axis=1) for column in noise_MT.T], axis=1)
        rank_NT = stats.rankdata(pooled_NT, axis=0, method="ordinal") - 1
        return np.take_along_axis(self.sorted_NT, rank_NT, axis=0)


def compare(
    geometry_NG: np.ndarray,
    topology_NT: np.ndarray,
    targets_N3: np.ndarray,
    *,
    family: str = "ridge",
    permutations: int = 0,
    patches_NP: np.ndarray | None = None,
    splits: Sequence[Fold] | None = None,
    seed: int = 0,
    **before: object,
) -> list[Utility]:
    """One Utility a target; geometry, topology, both and every draw of the control are fitted on the same folds.

    Args:
        family: "ridge" (standardised, penalty by leave-one-out) or "trees" (histogram gradient boosting).
        permutations: draws B of the control. A p needs 19, the control's range 39.
        patches_NP: the molecules of each row's patch; the control and p need it. Rows that share nothing are patches
            of one molecule each, `np.arange(N)[:, None]`.
        splits: training and test rows of each fold: by default `neighbourhood_folds(patches_NP)`, or random folds
            without patches. With splits that leave molecules on both sides there is a control and no p.
        seed: of the control's draws.
        before: arguments of earlier callers: `groups_N` (splits by group, where `splits` is not given), and `order_N`
            and `block`, which have no effect: runs of similar rows do not keep what patches share.

    Raises:
        ValueError: an unknown family, blocks of different lengths, too few rows for the folds, permutations below 0.
        TypeError: an unknown argument.
    """
    if unknown := before.keys() - {"order_N", "block", "groups_N"}:
        raise TypeError(f"compare() got an unexpected keyword argument {min(unknown)!r}")
    _check(geometry_NG, topology_NT, targets_N3, family, permutations)
    groups_N = before.get("groups_N")
    if splits is None:
        given = patches_NP is not None and groups_N is None
        splits = neighbourhood_folds(patches_NP) if given else folds(len(targets_N3), groups_N)  # type: ignore[arg-type]
    score = _Score(FAMILIES[family], targets_N3, splits)
    geometry, topology, both = (
        score.r2(block[None])[0] for block in (geometry_NG, topology_NT, np.hstack([geometry_NG, topology_NT]))
    )
    control_BY = np.empty((0, targets_N3.shape[1]))
    if patches_NP is not None and permutations:
        noise = PatchNoise(topology_NT, patches_NP)
        control_BY = _control(noise, geometry_NG, score, permutations, np.random.default_rng(seed)) - geometry
    why = _no_p(patches_NP, splits, permutations)
    return [
        _utility(name, family, (geometry[y], topology[y], both[y]), control_BY[:, y], None if not permutations else why)
        for y, name in enumerate(TARGETS)
    ]


def _check(
    geometry_NG: np.ndarray, topology_NT: np.ndarray, targets_N3: np.ndarray, family: str, permutations: int
) -> None:
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}; choose one of {sorted(FAMILIES)}")
    n = len(targets_N3)
    if not (len(geometry_NG) == len(topology_NT) == n):
        raise ValueError(
            f"{len(geometry_NG)} geometry, {len(topology_NT)} topology and {n} target rows; give equal numbers"
        )
    if permutations < 0:
        raise ValueError(f"permutations={permutations}; choose permutations >= 0")


def _control(
    noise: PatchNoise, geometry_NG: np.ndarray, score: _Score, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """R² of geometry + noise for each draw: [B, Y]."""
    at_once = max(1, _ROWS_AT_ONCE // len(geometry_NG))
    out = []
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        out.append(score.r2(np.stack([np.hstack([geometry_NG, noise.draw(rng)]) for _ in range(count)])))
    return np.concatenate(out)


def _no_p(patches_NP: np.ndarray | None, splits: Sequence[Fold], permutations: int) -> str:
    """Why there is no p, or nothing where there is one."""
    if patches_NP is None:
        return "needs patches: rows that share molecules are not independent"
    if share_molecules(patches_NP, splits):
        return "needs folds that share no molecules"
    return f"needs ≥ {LEAST_DRAWS} draws" if permutations < LEAST_DRAWS else ""


def _utility(
    target: str, family: str, r2: tuple[float, float, float], control_B: np.ndarray, why: str | None
) -> Utility:
    geometry, topology, both = map(float, r2)
    gain, draws = both - geometry, len(control_B)
    lo, hi = math.nan, math.nan
    if draws >= _BAND_DRAWS:  # exact for a further draw: order statistics j and B + 1 − j hold it, but for 2j/(B + 1)
        outside = int(0.025 * (draws + 1))
        ordered_B = np.sort(control_B)
        lo, hi = float(ordered_B[outside - 1]), float(ordered_B[-outside])
    control = float(control_B.mean()) if draws else math.nan
    p = None if why is None else math.nan if why else float((1 + (control_B >= gain).sum()) / (draws + 1))
    return Utility(
        target=target,
        family=family,
        r2_geometry=geometry,
        r2_topology=topology,
        r2_both=both,
        gain=gain,
        control=control,
        control_lo=lo,
        control_hi=hi,
        delta=gain - control if draws else gain,
        p=p,
        why=why or "",
    )


@dataclass(frozen=True)
class _Score:
    """R² of feature blocks, pooled: 1 − Σ(y − ŷ)²/Σ(y − ȳ)² over the test rows of all folds.

    R² of each fold alone would measure a compact neighbourhood against its own small spread.
    """

    fit: Fit
    y_NY: np.ndarray
    splits: Sequence[Fold]

    def r2(self, x_BNC: np.ndarray) -> np.ndarray:
        """R² of each target for each block: [B, Y]."""
        tested_NY = self.y_NY[np.concatenate([test for _, test in self.splits])]
        error_BY = np.zeros((len(x_BNC), self.y_NY.shape[1]))
        for train, test in self.splits:
            predicted_BmY = self.fit(x_BNC[:, train], self.y_NY[train], x_BNC[:, test])
            error_BY += ((self.y_NY[test] - predicted_BmY) ** 2).sum(axis=1)
        return 1 - error_BY / ((tested_NY - tested_NY.mean(axis=0)) ** 2).sum(axis=0)


def _spectrum(x_CPD: np.ndarray) -> np.ndarray:
    """Eigenvalues of each patch's covariance, ascending, from its P × P Gram matrix: [C, P]."""
    centred = x_CPD.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    gram = centred @ centred.transpose(0, 2, 1) / (x_CPD.shape[1] - 1)
    values = np.linalg.eigvalsh(gram)
    values[values < 1e-12 * values[:, -1:]] = 0.0
    return values
