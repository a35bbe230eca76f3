"""Utility and agreement of members in the report: published values, Holm over a table, dashes with reasons."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import pdist

from analysis.topology.utility_report import agreement_lines, ensemble_correlations, utility_section

NAN = float("nan")
PLACE = {"table": "t", "representation": "bits", "metric": "jaccard", "neighbours": 40}
REACH = {"rows": 500, "tested": 500, "folds": 20, "fewest_training": 60, "neighbours_in_training": 0.0}
JACCARD = {"label_jaccard_train": 0.2, "label_jaccard_test": 0.19}
SCORES = {"r2_geometry": 0.1, "r2_topology": 0.02, "r2_both": 0.15, "gain": 0.05, "control": 0.01, "delta": 0.04}


def scored(target: str, p: float, split: str = "neighbourhood") -> dict[str, object]:
    band = {"control_lo": -0.01, "control_hi": 0.03} if p == p else {"control_lo": NAN, "control_hi": NAN}
    return {**PLACE, **REACH, **JACCARD, **SCORES, **band, "split": split, "target": target, "family": "ridge", "p": p}


def test_p_is_adjusted_over_the_tests_of_a_table_and_absent_without_a_fair_fold() -> None:
    rows = [scored("a", 0.01), scored("b", 0.03), scored("a", NAN, "random")]
    text = "\n".join(utility_section(pd.DataFrame(rows)))
    assert (
        "| ridge | 0.1000 | 0.0200 | 0.1500 | 0.0500 | 0.0100 | [-0.0100, 0.0300] | 0.0400 | 0.0100 | 0.0200 |" in text
    )
    assert "| [-0.0100, 0.0300] | 0.0400 | 0.0300 | 0.0300 |" in text
    assert "| 0.0100 | – | 0.0400 | – | – |" in text
    assert "+0.0476 and +0.0415" in text
    assert "test split alone" in text


def test_a_place_with_too_few_rows_says_so() -> None:
    few = {**PLACE, **JACCARD, "rows": 500, "tested": 0, "split": "neighbourhood", "target": NAN, "family": NAN}
    frame = pd.DataFrame([few]).reindex(columns=list(scored("a", 0.5)))
    text = "\n".join(utility_section(frame))
    assert "- t bits jaccard: patches of 41 among 500 rows leave too few for neighbourhood folds" in text
    assert "| t | bits | jaccard | neighbourhood | 500 | 0 | – | – | – | 0.2000 | 0.1900 |" in text
    assert "delta" not in text.split("too few for")[1]


def test_members_agreement_is_pearson_and_spearman_beside_the_published_value() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    bent = np.exp(x)
    found = ensemble_correlations({"a": x, "b": 3 * x @ rotation, "c": rng.normal(size=(60, 5)), "d": bent})
    by_pair = found.set_index(["a", "b"])
    assert by_pair.loc[("a", "b")].tolist() == [pytest.approx(1.0)] * 2
    assert by_pair.loc[("a", "c")].abs().max() < 0.2
    assert by_pair.loc[("a", "d"), "pearson"] == pytest.approx(np.corrcoef(pdist(x), pdist(bent))[0, 1])
    assert by_pair.loc[("a", "d"), "spearman"] == pytest.approx(stats.spearmanr(pdist(x), pdist(bent)).statistic)
    text = "\n".join(agreement_lines(found))
    assert "6 pairs of 4 embeddings" in text
    assert f"Pearson: mean {found['pearson'].mean():.3f}, from {found['pearson'].min():.3f} to 1.000" in text
    assert "0.808 [0.753, 0.861]" in text
