"""Does a place's largest loop come back: in other subsamples, and in other checkpoints of the same model?

Shapes: P diagram points (`pairs_P2`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.diagram_stability import birth_death, image_cosine, match
from analysis.topology_unit import FULL_TABLE, Place, Unit

_CHECKPOINT = re.compile(r"^(pom|ae256|file:.+)_\d+(-[0-9a-f]{12})?$")  # a file carries its hash behind its stem


def stability(diagrams: Sequence[np.ndarray]) -> dict[str, float]:
    """Statistics of `analysis.diagram_stability` of two or more diagrams [P, 2], by name.

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
