"""Paired contrasts of architectures: what cancels, what seeds add, whose learning rate wins."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.codec.contrasts import arm_resamples, choose_lr


def clip_table(nll: dict[tuple[str, int], np.ndarray], tokens: np.ndarray) -> pd.DataFrame:
    """A row a model and clip from per-token nll by (architecture, seed)."""
    parts = [
        pd.DataFrame(
            {"architecture": name, "seed": seed, "clip_id": [f"c{i:02d}" for i in range(len(tokens))], "tokens": tokens}
        ).assign(nll=values * tokens)
        for (name, seed), values in nll.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_what_clips_share_cancels() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 500, 40)
    hard = rng.normal(6, 1, 40)
    nll = {(name, s): hard + extra + 0.01 * s for name, extra in (("x", 0.0), ("y", 0.1), ("z", 0.0)) for s in (0, 1)}
    arms = arm_resamples(clip_table(nll, tokens))
    assert arms.table()["architecture"].tolist() == ["x", "z", "y"]
    pairs = arms.differences().set_index(["a", "b"])
    half = stats.t.ppf(0.975, 3) * 0.01 / math.sqrt(2)  # seeds alone: sd 0.01 / sqrt(2) of one, three pooled pairs
    expected = [0.1, 0.1 - half, 0.1 + half]
    assert pairs.loc[("x", "y"), ["difference", "lo", "hi"]].tolist() == pytest.approx(expected)
    assert pairs.loc[("x", "z"), "difference"] == 0
    assert pairs.loc[("x", "z"), "p_holm"] == 1
    assert arms.table().loc[0, "hi"] - arms.table().loc[0, "lo"] > 0.2
    assert arms.table()["seed_sd"].tolist() == pytest.approx([0.01 / math.sqrt(2)] * 3)


def test_one_seed_is_no_statement_about_other_trainings() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 500, 40)
    nll = {(name, 0): rng.normal(6, 1, 40) for name in "xy"} | {("w", s): rng.normal(6, 1, 40) for s in (0, 1)}
    arms = arm_resamples(clip_table(nll, tokens))
    pairs = arms.differences()
    assert pairs[["lo", "hi", "p", "p_holm"]].isna().all(axis=None)
    assert set(pairs["needs"]) == {"needs ≥ 2 seeds"}
    table = arms.table().set_index("architecture")
    assert table["seed_sd"].isna().to_dict() == {"x": True, "y": True, "w": False}
    own = nll["x", 0] * tokens
    without = (own.sum() - own) / (tokens.sum() - tokens)
    ratio = own.sum() / tokens.sum()
    t = stats.ttest_1samp(ratio - 39 * (without - without.mean()), 0).confidence_interval()
    assert table.loc["x", ["lo", "hi"]].tolist() == pytest.approx(list(t))  # of this trained model, for other clips


def test_holm_counts_the_pairs_that_were_tested() -> None:
    rng = np.random.default_rng(1)
    tokens, common = np.full(50, 10), rng.normal(6, 1, 50)
    nll = {(name, s): common + rng.normal(0.02 * i, 0.1, 50) for i, name in enumerate("wxyz") for s in (0, 1)}
    del nll["z", 1]
    pairs = arm_resamples(clip_table(nll, tokens)).differences()
    assert len(pairs) == 6
    assert (pairs["difference"] >= 0).all()
    tested = pairs[pairs["needs"] == ""]
    assert len(tested) == 3
    smallest = tested["p"].idxmin()
    assert tested.loc[smallest, "p_holm"] == pytest.approx(min(1, 3 * tested.loc[smallest, "p"]))
    assert (tested["p_holm"] >= tested["p"]).all()
    assert pairs.loc[pairs["needs"] != "", "p_holm"].isna().all()


def test_clips_of_one_recording_are_one_unit() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(50, 500, 30)
    nll = {(name, s): rng.normal(6, 1, 30) for name in "xy" for s in (0, 1)}
    clips = clip_table(nll, tokens).assign(recording_id=lambda t: t["clip_id"].str[1:].astype(int) // 3)
    arms = arm_resamples(clips)
    assert (arms.n_units, arms.units) == (10, "recordings")
    sums = clips.groupby(["architecture", "seed", "recording_id"], as_index=False)[["nll", "tokens"]].sum()
    by_hand = arm_resamples(sums.rename(columns={"recording_id": "clip_id"}))
    assert by_hand.units == "clips (their recordings are not known)"
    pd.testing.assert_frame_equal(arms.differences(), by_hand.differences())
    one = arm_resamples(clips.assign(recording_id="r"))
    for table in (one.table(), one.differences()):
        assert table[["lo", "hi"]].isna().all(axis=None)
        assert set(table["needs"]) == {"needs ≥ 2 held-out recordings"}


def test_an_architecture_whose_seeds_differ_more_is_named() -> None:
    rng = np.random.default_rng(4)
    tokens, common = np.full(20, 10), rng.normal(6, 1, 20)
    sd = {"u": 0.01, "v": 0.01, "w": 0.01, "x": 0.3}
    nll = {(n, s): common + (s - 1) * d + rng.normal(0, 0.001, 20) for n, d in sd.items() for s in (0, 1, 2)}
    found = arm_resamples(clip_table(nll, tokens)).odd_seeds()
    assert found is not None
    assert found[:3] == ("x", pytest.approx(0.3, rel=0.02), pytest.approx(0.01, rel=0.1))
    alike = {key: value for key, value in nll.items() if key[0] != "x"}
    assert arm_resamples(clip_table(alike, tokens)).odd_seeds() is None
    assert arm_resamples(clip_table({k: v for k, v in nll.items() if k[1] == 0}, tokens)).odd_seeds() is None


def test_models_scored_on_other_clips_are_refused() -> None:
    tokens = np.full(5, 10)
    table = clip_table({("x", 0): np.ones(5), ("y", 0): np.ones(5)}, tokens)
    with pytest.raises(ValueError, match="scored on different clips"):
        arm_resamples(table.drop(index=7))
    changed = table.copy()
    changed.loc[7, "tokens"] = 9
    with pytest.raises(ValueError, match="scored on different clips"):
        arm_resamples(changed)
    with pytest.raises(ValueError, match="no held-out clip was scored"):
        arm_resamples(table[:0])
    assert math.isnan(arm_resamples(table[table["clip_id"] == "c00"]).table().loc[0, "lo"])


def test_each_architecture_gets_its_own_learning_rate() -> None:
    nll = {
        ("x", 1e-3): [3.0, 3.4],
        ("x", 2e-3): [3.1, 3.1],
        ("x", 4e-3): [3.3, 3.2],
        ("y", 1e-3): [2.9, 3.0],
        ("y", 2e-3): [3.1, 3.1],
        ("y", 4e-3): [2.0],  # one seed is missing: not chosen
        ("z", 1e-3): [3.0],
    }
    records = [
        {"architecture": a, "lr": lr, "seed": s, "val_nll_ema": v}
        for (a, lr), values in nll.items()
        for s, v in enumerate(values)
    ]
    best = choose_lr(pd.DataFrame(records)).set_index("architecture")
    assert best["lr"].to_dict() == {"x": 2e-3, "y": 1e-3, "z": 1e-3}
    assert best["edge"].to_dict() == {"x": "", "y": "lowest", "z": "only one"}
    assert best["n_seeds"].to_dict() == {"x": 2, "y": 2, "z": 1}
    assert best.loc["x", "lr_tried"] == (1e-3, 2e-3, 4e-3)
    assert best.loc["x", "val_nll_ema"] == pytest.approx(3.1)
