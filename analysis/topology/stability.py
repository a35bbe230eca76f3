"""Does the same loop come back? Diagrams of subsamples or checkpoints compared with one another.

Shapes: M diagrams, each (birth, death) pairs [n, 2]; `distance_MM`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from persim import PersistenceImager
from persim import bottleneck as persim_bottleneck
from persim import wasserstein as persim_wasserstein

from analysis.topology.unit import FULL_TABLE, Place, Unit

_DISTANCES = {"bottleneck": persim_bottleneck, "wasserstein": persim_wasserstein}


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How the top loops of M diagrams match each other.

    `distance_MM` is the distance between the truncated diagrams; `relative` its mean over pairs divided by the mean
    top persistence. `recurrence` is the share of ordered pairs of diagrams in which the largest loop of one is
    matched to a loop of the other, not to the diagonal. Large loops of noise find partners too (measured: 0.9 for
    uniform points), so recurrence far from 1 is evidence against a loop, but 1 is none for it; `relative` separates.
    """

    distance_MM: np.ndarray
    relative: float
    recurrence: float


@dataclass(frozen=True, kw_only=True)
class BirthDeath:
    """Spread over diagrams of the largest loop: standard deviations divided by its mean persistence."""

    birth_spread: float
    death_spread: float

    @property
    def spread(self) -> float:
        return max(self.birth_spread, self.death_spread)


def largest(diagram: np.ndarray, count: int) -> np.ndarray:
    """The `count` finite loops of largest persistence, largest first: [min(count, n), 2]."""
    pairs = np.asarray(diagram, np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    return pairs[np.argsort(pairs[:, 0] - pairs[:, 1], kind="stable")[:count]]


def match(diagrams: Sequence[np.ndarray], count: int = 10, distance: str = "bottleneck") -> Matching:
    """Pairwise bottleneck or Wasserstein matching of the `count` largest loops of each diagram.

    Raises:
        ValueError: fewer than 2 diagrams, an unknown distance, or a count below 1.
    """
    if distance not in _DISTANCES or count < 1:
        raise ValueError(f"distance={distance!r}, count={count}; choose one of {sorted(_DISTANCES)}, count >= 1")
    tops = _several(diagrams, count)
    m = len(tops)
    distance_MM = np.zeros((m, m))
    recurring = 0
    for i in range(m):
        for j in range(i + 1, m):
            distance_MM[i, j], forth, back = _pair(tops[i], tops[j], distance)
            distance_MM[j, i] = distance_MM[i, j]
            recurring += forth + back
    scale = np.mean([_life(top) for top in tops])
    mean = distance_MM[np.triu_indices(m, 1)].mean()
    return Matching(
        distance_MM=distance_MM,
        relative=float(mean / scale) if scale > 0 else 0.0,
        recurrence=recurring / (m * (m - 1)),
    )


def birth_death(diagrams: Sequence[np.ndarray]) -> BirthDeath:
    """Spread of the largest loop's birth and death over diagrams; infinite when a diagram has no loop.

    Raises:
        ValueError: fewer than 2 diagrams.
    """
    tops = _several(diagrams, 1)
    if any(not len(top) for top in tops):
        return BirthDeath(birth_spread=np.inf, death_spread=np.inf)
    pairs = np.concatenate(tops)
    scale = (pairs[:, 1] - pairs[:, 0]).mean()
    return BirthDeath(
        birth_spread=float(pairs[:, 0].std(ddof=1) / scale), death_spread=float(pairs[:, 1].std(ddof=1) / scale)
    )


def image_cosine(diagrams: Sequence[np.ndarray], pixels: int = 20) -> float:
    """Mean cosine similarity over pairs of the diagrams' persistence images (Adams et al. 2017) on one grid.

    The grid of pixels × pixels spans all diagrams; weight is persistence, the kernel a Gaussian as wide as a pixel.

    Raises:
        ValueError: fewer than 2 diagrams, pixels below 2, or a diagram without loops.
    """
    clean = _several(diagrams, None)
    if pixels < 2 or any(not len(d) for d in clean):
        empty = sum(not len(d) for d in clean)
        raise ValueError(f"pixels={pixels}, {empty} diagrams without loops; choose pixels >= 2 and leave those out")
    every = np.concatenate(clean)
    birth, life = every[:, 0], every[:, 1] - every[:, 0]
    top = max(float(life.max()), float(np.ptp(birth)))
    side = top / pixels
    imager = PersistenceImager(
        birth_range=(float(birth.min()), float(birth.min()) + top),
        pers_range=(0.0, top),
        pixel_size=side,
        kernel_params={"sigma": [[side**2, 0.0], [0.0, side**2]]},
    )
    images = np.array([imager.transform(d).ravel() for d in clean])
    norm = np.linalg.norm(images, axis=1)
    i, j = np.triu_indices(len(images), 1)
    return float(((images[i] * images[j]).sum(axis=1) / (norm[i] * norm[j])).mean())


def _several(diagrams: Sequence[np.ndarray], count: int | None) -> list[np.ndarray]:
    if len(diagrams) < 2:
        raise ValueError(f"{len(diagrams)} diagrams; stability needs 2 or more")
    return [largest(d, count if count is not None else len(d)) for d in diagrams]


def _life(top: np.ndarray) -> float:
    return float(top[0, 1] - top[0, 0]) if len(top) else 0.0


def _pair(a: np.ndarray, b: np.ndarray, distance: str) -> tuple[float, int, int]:
    """Distance, and whether the largest loop of a (of b) is matched to a loop of the other."""
    if not len(a) or not len(b):
        rest = a if len(a) else b
        half = (rest[:, 1] - rest[:, 0]) / 2
        flat = half.max(initial=0.0) if distance == "bottleneck" else half.sum() * np.sqrt(2)
        return float(flat), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, pairs = _DISTANCES[distance](a, b, matching=True)
    links = np.asarray(pairs)[:, :2].astype(int)
    both = links[(links >= 0).all(axis=1)]
    return float(value), int(0 in both[:, 0]), int(0 in both[:, 1])


_CHECKPOINT = re.compile(r"^(pom|ae256|file:.+)_\d+(-[0-9a-f]{12})?$")  # a file's hash follows its stem


def stability(diagrams: Sequence[np.ndarray]) -> dict[str, float]:
    """Statistics of `analysis.topology.stability` of two or more diagrams [P, 2], by name.

    Matching is left out where no diagram has a loop, images where one has none; the spreads are infinite then.

    Raises:
        ValueError: fewer than 2 diagrams.
    """
    spread = birth_death(diagrams)
    out = {"birth_spread": spread.birth_spread, "death_spread": spread.death_spread}
    if any(map(len, diagrams)):
        for distance in ("bottleneck", "wasserstein"):
            matched = match(diagrams, distance=distance)
            out |= {f"{distance}_relative": matched.relative, f"{distance}_recurrence": matched.recurrence}
    if all(map(len, diagrams)):
        out["image_cosine"] = image_cosine(diagrams)
    return out


def checkpoints(units: Sequence[Unit]) -> dict[Place, dict[str, float]]:
    """`stability` over the checkpoints of each model, by the model's place, its representation written `pom_*`.

    Checkpoints are `pom_M`, `ae256_M` and embedding files whose stems differ in a last `_M`; `count` says how many.
    Only diagrams of the same rows are compared: those of the full table, or, where one lacks it, those of each run
    that all have, averaged over these runs. A statistic that one of them lacks is left out.
    """
    families: dict[Place, list[Mapping[int, np.ndarray]]] = {}
    for unit in units:
        table, representation, metric, route = unit.place
        if found := _CHECKPOINT.match(representation):
            families.setdefault((table, f"{found[1]}_*", metric, route), []).append(unit.observed)
    out: dict[Place, dict[str, float]] = {}
    for place, members in families.items():
        common = sorted(set.intersection(*map(set, members)))
        if len(members) < 2 or not common:
            continue
        runs = [FULL_TABLE] if FULL_TABLE in common else common
        each = [stability([member[run] for member in members]) for run in runs]
        names = [name for name in each[0] if all(name in one for one in each)]
        out[place] = {"count": len(members), **{n: float(np.mean([one[n] for one in each])) for n in names}}
    return out
