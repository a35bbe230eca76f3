"""What a search's report says of its trials, on tables whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.search.importance import importances
from analysis.search.report import Evidence, write_report
from analysis.search.trials import Again, Axis, Goal, StudyTable, edges

LR, K, WORD = Axis("lr", "log", 1e-4, 1e-2), Axis("k", "int", 1, 9), Axis("word", "choice", choices=("a", "b"))
LOSS, SIZE = Goal("loss", "min"), Goal("size", "max")


def study(n: int = 40, seed: int = 0) -> StudyTable:
    """The loss depends on lr alone; every seventh trial failed, every fifth breaks a condition."""
    rng = np.random.default_rng(seed)
    lr = 10 ** rng.uniform(-4, -2, n)
    trial = np.arange(n)
    failed, broken = trial % 7 == 3, trial % 5 == 2
    frame = pd.DataFrame(
        {
            "trial": trial,
            "state": np.where(failed, "failed", "done"),
            "reason": np.where(failed, "it broke", ""),
            "allowed": ~failed & ~broken,
            "lr": lr,
            "k": rng.integers(1, 10, n),
            "word": rng.choice(["a", "b"], n),
            "loss": np.where(failed, np.nan, np.log10(lr / 1e-3) ** 2),
            "size": np.where(failed, np.nan, rng.uniform(0, 1, n)),
        }
    )
    return StudyTable("", frame)


def test_the_best_is_the_best_of_what_is_allowed() -> None:
    table = study().trials
    best = study().best([LOSS])
    assert best is not None
    assert best["loss"] == min(v for v, ok in zip(table["loss"], table["allowed"], strict=True) if ok)
    so_far = study().best_so_far(LOSS)
    assert so_far[-1] == best["loss"]
    for i in range(2, len(table)):
        assert so_far[i] == table.loc[:i][table.loc[:i, "allowed"]]["loss"].min()
    assert StudyTable("", table.assign(allowed=False)).best([LOSS]) is None


def test_the_front_equals_its_definition() -> None:
    allowed = study().trials[study().trials["allowed"]]
    front = set(study().front([LOSS, SIZE])["trial"])
    for _, a in allowed.iterrows():
        beaten = any(
            b["loss"] <= a["loss"] and b["size"] >= a["size"] and (b["loss"] < a["loss"] or b["size"] > a["size"])
            for _, b in allowed.iterrows()
        )
        assert (a["trial"] in front) != beaten


def test_edges_are_of_ranges_and_in_their_own_scale() -> None:
    assert edges(pd.Series({"lr": 1.1e-4, "k": 5, "word": "a"}), [LR, K, WORD]) == [
        "lr=0.00011 lies at the lower end of its range (0.0001); widen it"
    ]
    assert edges(pd.Series({"lr": 1e-3, "k": 9, "word": "b"}), [LR, K, WORD]) == [
        "k=9 lies at the upper end of its range (9); widen it"
    ]
    assert edges(pd.Series({"lr": 6e-4, "k": 5, "word": "b"}), [LR, K, WORD]) == []


def test_importance_finds_the_field_that_matters_and_refuses_few_trials() -> None:
    shares = importances(study(), [K, WORD, LR], LOSS)
    assert shares.index[0] == "lr"
    assert shares["lr"] > 0.8
    with pytest.raises(ValueError, match="trials are too few"):
        importances(StudyTable("", study().trials.head(8)), [LR, K], LOSS)


def test_fresh_trainings_give_the_t_interval_and_the_optimism() -> None:
    interval = Again((1.0, 2.0, 4.0)).interval()
    assert interval is not None
    half = stats.t.ppf(0.975, 2) * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    assert (interval.lo, interval.hi) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert Again((1.0, 3.0)).optimism(LOSS, 1.5) == pytest.approx(0.5)
    assert Again((1.0, 3.0)).optimism(SIZE, 2.5) == pytest.approx(0.5)
    assert Again((1.0, 2.0), failed=1).interval() is None
    assert Again((1.0,)).interval() is None


def test_the_report_has_every_part(tmp_path: Path) -> None:
    evidence = Evidence("which rate?", (LR, K, WORD), (LOSS, SIZE), (study(), study(12, seed=1)), ("a fact",))
    lines = write_report(evidence, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    names = {p.name for p in tmp_path.glob("*.png")}
    assert all(f"({name})" in text for name in names)
    assert {f"{kind}-{i}.png" for kind in ("slices", "contour", "parallel", "pareto") for i in (0, 1)} < names
    assert "6 of 40 trials failed; first: it broke" in "\n".join(lines)
    assert len(pd.read_parquet(tmp_path / "trials.parquet")) == 52
