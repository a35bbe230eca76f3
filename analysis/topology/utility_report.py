"""The utility study and the members' agreement as sections of the topology report, with the published values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial.distance import pdist

from analysis.markdown import table
from analysis.multiplicity import ALPHA, holm_list

PUBLISHED_GAINS = (0.0476, 0.0415)
PUBLISHED_PEARSON = "0.808 [0.753, 0.861]"
_PLACE = ["table", "representation", "metric", "split"]
_REACH = ("rows", "tested", "folds", "fewest_training", "neighbours_in_training")
_JACCARD = ("label_jaccard_train", "label_jaccard_test")
_SCORES = ("r2_geometry", "r2_topology", "r2_both", "gain", "control")

_NOTE = (
    "Gain: out-of-sample R² of geometry + topology minus that of geometry, pooled over all test rows. Control: mean "
    "gain of patch noise (drawn once per molecule, averaged over each patch, with topology's margins: no chemistry) in "
    "topology's place, and the range of the middle 95% of these draws, which describes them and is no interval. "
    "Delta: gain − control, what topology adds to that. "
    "p: how often patch noise gains as much; Holm: over all p of a table. Delta has no interval: none that was tried "
    "keeps its level. “–”: not to be had; a p needs neighbourhood folds and ≥ 19 draws of the control, the range 39."
)
_FOLDS_NOTE = (
    "Neighbourhood folds: no patch of a test row shares a molecule with the patch of a training row; rows between the "
    "two are left out, and fewest training is what the poorest fold keeps. Random folds are the study's, grouped folds "
    "have no skeleton (Bemis-Murcko frame without atom types, or the graph of a molecule without rings) on both sides; "
    "both leave molecules of test patches in training patches, so noise gains there, too: no p. Trees are fitted on "
    "the first 40 neighbourhoods alone."
)
_JACCARD_NOTE = (
    "The own odor model (pom_M) was trained on the labels that are asked for here: its rows use the molecules of its "
    "test split alone, patches among themselves (rows). Label Jaccard: likeness of a molecule's labels and its "
    "neighbours', over the training and over the test split of that model; a fingerprint, which saw no label, has it "
    "equal on both but for chance. Of an embedding given as a file it is not known which labels it was trained on."
)


def utility_section(frame: pd.DataFrame) -> list[str]:
    """Markdown of `frame`: a row per place, target and family; a place without scores has NaN there.

    Columns: table, representation, metric, split, neighbours, those of the folds and scores, target, family, p.
    """
    published = " and ".join(f"+{gain:.4f}" for gain in PUBLISHED_GAINS)
    lines = ["## Utility of local topology", "", _NOTE, "", _FOLDS_NOTE, ""]
    lines += [f"Published gains (random folds, no control): {published}; ours to compare: gain under random folds.", ""]
    places = frame.drop_duplicates(_PLACE)
    head = [*_PLACE, *(name.replace("_", " ") for name in (*_REACH, *_JACCARD))]
    lines += [table(head, [_cells(row, (*_REACH, *_JACCARD)) for _, row in places.iterrows()]), "", _JACCARD_NOTE, ""]
    lines += [
        f"- {row['table']} {row['representation']} {row['metric']}: patches of {int(row['neighbours']) + 1} among "
        f"{int(row['rows'])} rows leave too few for {row['split']} folds; choose fewer neighbours or a larger table"
        for _, row in places[places["target"].isna()].iterrows()
    ]
    scored = frame[frame["target"].notna()]
    if scored.empty:
        return lines
    scored = scored.assign(holm=_holm(scored))
    head = [*_PLACE, "target", "family", *(name.replace("_", " ") for name in _SCORES)]
    rows = [
        [*_cells(row, ("target", "family", *_SCORES)), _band(row), *map(_text, (row["delta"], row["p"], row["holm"]))]
        for _, row in scored.iterrows()
    ]
    return [*lines, "", table([*head, "control's 95%", "delta", "p", "p Holm"], rows), ""]


def utility_findings(frame: pd.DataFrame) -> list[str]:
    """How many gains pass their test, and the largest; no line where nothing was scored. `frame` as above."""
    scored = frame[frame["target"].notna()] if len(frame) else frame
    if scored.empty:
        return []
    holm = _holm(scored)
    passed, tests = int((holm < ALPHA).sum()), int(holm.notna().sum())
    text = f"Utility of local topology: {passed} of {tests} tests pass 5% after Holm"
    gains = scored.dropna(subset="delta").sort_values("delta").to_dict("records")
    if not gains:
        return [f"{text}."]
    where = " ".join(str(gains[-1][name]) for name in ("representation", "split", "target", "family"))
    return [f"{text}; the largest of {len(gains)} gains over the control is {gains[-1]['delta']:+.4f} ({where})."]


def _holm(scored: pd.DataFrame) -> pd.Series:
    """Adjusted p over all tests of a table."""
    return scored.groupby("table", group_keys=False)["p"].transform(lambda p: pd.Series(holm_list(p.tolist()), p.index))


def _cells(row: pd.Series, names: Sequence[str]) -> list[str]:
    return [str(row[name]) for name in _PLACE] + [_text(row[name]) for name in names]


def _band(row: pd.Series) -> str:
    if np.isnan(row["control_lo"]):
        return "–"
    return f"[{row['control_lo']:.4f}, {row['control_hi']:.4f}]"


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.0f}" if value.is_integer() else f"{value:.4f}"
    return str(value)


def ensemble_correlations(embeddings: Mapping[str, np.ndarray], rows: int = 500, seed: int = 0) -> pd.DataFrame:
    """How far the pairwise Euclidean distances of every two embeddings [N, E] of the same rows agree.

    Columns a, b, spearman, pearson; the same `rows` rows, drawn by `seed`, for all pairs.
    """
    names = list(embeddings)
    n = len(embeddings[names[0]])
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(rows, n), replace=False))
    distances = {name: pdist(embeddings[name][chosen]) for name in names}
    return pd.DataFrame(
        [
            (a, b, *(float(f(distances[a], distances[b]).statistic) for f in (stats.spearmanr, stats.pearsonr)))
            for a, b in combinations(names, 2)
        ],
        columns=["a", "b", "spearman", "pearson"],
    )


def agreement_lines(correlations: pd.DataFrame) -> list[str]:
    """Mean and range of the pairs' correlations; no interval, since every member is in many pairs."""
    members = len(set(correlations["a"]) | set(correlations["b"]))
    lines = [
        f"- {name.capitalize()}: mean {values.mean():.3f}, from {values.min():.3f} to {values.max():.3f}"
        for name, values in ((name, correlations[name]) for name in ("pearson", "spearman"))
    ]
    return [
        f"{len(correlations)} pairs of {members} embeddings. The pairs share members and are not independent, so the "
        "range is given and no interval.",
        "",
        *lines,
        f"- Published, Pearson over 45 pairs of OpenPOM's members: {PUBLISHED_PEARSON}",
        "",
    ]
