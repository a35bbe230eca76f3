"""The utility study's cells: does local topology say anything about labels beyond local geometry and patch noise?

Shape suffixes: N rows of a table, n rows that a cell may use, D columns, P patch points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from analysis.topology import utility
from analysis.topology.distances import distance_matrix
from analysis.topology.persistence import h1
from analysis.topology.utility_folds import (
    FOLDS,
    REPEATS,
    Fold,
    TooFewRows,
    folds,
    neighbourhood_folds,
    neighbours_in_training,
    reach,
)
from data import molecules
from data.molecules import MoleculeTable
from models.odor.member import split
from sweeps.core.cells import Row
from sweeps.topology.cells import UTILITY_SCORES, UtilityCell, member_of

_TREE_FOLDS = 40  # neighbourhoods that the trees are tested on: one fit takes a hundred times as long as one of ridge


def tree_draws(permutations: int) -> int:
    """Draws of the control under the trees: enough for its mean; a p under the trees needs 1,900 permutations."""
    return min(permutations, max(4, permutations // 100))


def families(permutations: int) -> tuple[tuple[str, int], ...]:
    """The model families and the control draws of each."""
    return ("ridge", permutations), ("trees", tree_draws(permutations))


def fold_count(cell: UtilityCell, rows: int, family: str) -> int:
    """About how many folds a family is fitted on."""
    if cell.split != "neighbourhood":
        return FOLDS * REPEATS
    neighbourhoods = max(20, rows // (cell.neighbours + 1))
    return min(neighbourhoods, _TREE_FOLDS) if family == "trees" else neighbourhoods


def utility_rows(
    cell: UtilityCell, x_ND: np.ndarray, table: MoleculeTable, progress: Callable[[str], None]
) -> list[Row]:
    """All numbers of a cell; where its rows are too few for its folds, their counts alone."""
    distance_NN = distance_matrix(x_ND, cell.metric)
    parts = split(table.labels_NL)
    out = list(_label_jaccard(distance_NN, table.labels_NL, parts.train, parts.test, cell.neighbours))
    # the own odor model was trained on the labels of the other rows
    rows_n = np.sort(parts.test) if member_of(cell.representation) is not None else np.arange(len(table))
    out.append(_row("rows", len(rows_n), "rows"))
    distance_nn, x_nD = distance_NN[np.ix_(rows_n, rows_n)], np.asarray(x_ND, np.float64)[rows_n]
    try:
        if cell.neighbours >= len(rows_n):
            raise TooFewRows(f"{len(rows_n)} rows for patches of {cell.neighbours + 1}")
        progress("patches")
        patches_nP = utility.patches(distance_nn, cell.neighbours)
        splits = _splits(cell, patches_nP, [table.smiles[i] for i in rows_n])
    except TooFewRows:
        return [*out, _row("tested", 0, "rows")]
    found = reach(splits)
    counts = {"folds": found.folds, "tested": found.tested, "fewest_training": found.fewest_training}
    out += [_row(name, value, "rows" if name != "folds" else "folds") for name, value in counts.items()]
    out.append(_row("neighbours_in_training", neighbours_in_training(patches_nP, splits), "share"))
    geometry = utility.geometry_block(distance_nn, x_nD, patches_nP)
    topology = utility.topology_block(distance_nn, patches_nP, h1=h1)
    targets = utility.targets(table.labels_NL[rows_n], patches_nP)
    for family, draws in families(cell.permutations):
        progress(family)
        used = splits[:_TREE_FOLDS] if family == "trees" else splits
        results = utility.compare(
            geometry, topology, targets, family=family, permutations=draws, patches_NP=patches_nP, splits=used
        )
        for result in results:
            at = {"target": result.target, "family": result.family}
            values = {name: getattr(result, name) for name in UTILITY_SCORES} | {"p": result.p}
            out += [
                _row(name, value, "" if name == "p" else "R²", at)
                for name, value in values.items()
                if value is not None and not math.isnan(value)
            ]
    return out


def _row(name: str, value: float, unit: str, at: dict[str, str] | None = None) -> Row:
    return Row(f"utility_{name}", float(value), unit, at or {})


def _splits(cell: UtilityCell, patches_nP: np.ndarray, smiles: list[str]) -> list[Fold]:
    if cell.split == "neighbourhood":
        return neighbourhood_folds(patches_nP)
    return folds(len(patches_nP), molecules.skeletons(smiles) if cell.split == "grouped" else None)


def _label_jaccard(
    distance_NN: np.ndarray, labels_NL: np.ndarray, train: np.ndarray, test: np.ndarray, neighbours: int
) -> Iterator[Row]:
    """Similarity of a row's labels to its neighbours', over the odor model's training and test rows.

    A representation that was trained on labels has more of it where it was trained; a fingerprint has not.
    """
    patches_NP = utility.patches(distance_NN, neighbours)
    jaccard_N = utility.targets(labels_NL, patches_NP)[:, utility.TARGETS.index("label_jaccard")]
    yield _row("label_jaccard_train", jaccard_N[train].mean(), "share")
    yield _row("label_jaccard_test", jaccard_N[test].mean(), "share")
