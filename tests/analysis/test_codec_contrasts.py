"""Paired contrasts of architectures: what cancels, what seeds add, whose learning rate wins."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.bootstrap import bootstrap_ci
from analysis.codec_contrasts import arm_resamples, choose_lr


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
    arms = arm_resamples(clip_table({("x", 0): hard, ("y", 0): hard + 0.1, ("z", 0): hard}, tokens))
    assert arms.table()["architecture"].tolist() == ["x", "z", "y"]
    expected = bootstrap_ci(np.stack([hard * tokens, tokens], 1), lambda m: m[:, 0] / m[:, 1], n_resamples=10_000)
    assert tuple(arms.table().loc[0, ["lo", "hi"]]) == pytest.approx(tuple(expected))
    pairs = arms.differences().set_index(["a", "b"])
    assert pairs.loc[("x", "y"), ["difference", "lo", "hi"]].tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert pairs.loc[("x", "y"), "p"] < 1e-3
    assert pairs.loc[("x", "z"), "difference"] == 0
    assert pairs.loc[("x", "z"), "p_holm"] == 1
    assert arms.table().loc[0, "hi"] - arms.table().loc[0, "lo"] > 0.2


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_seeds_add_the_variance_of_their_mean(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    tokens = np.full(30, 100)
    clip = rng.normal(5, 0.5, 30)
    shift_S = rng.normal(0, 0.3, seeds)
    arms = arm_resamples(clip_table({("x", s): clip + shift for s, shift in enumerate(shift_S)}, tokens))
    expected = clip.var() / 30 + shift_S.var(ddof=1) / seeds
    assert arms.value_RA[:, 0].var() == pytest.approx(expected, rel=0.05)
    assert arms.value_A[0] == pytest.approx(clip.mean() + shift_S.mean())
    assert arms.n_seeds_A == (seeds,)


def test_null_pairs_are_found_different_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(3)
    tokens, found = np.full(60, 10), 0
    for trial in range(120):
        common = rng.normal(6, 1, 60)
        nll = {(name, 0): common + rng.normal(0, 0.2, 60) for name in "xy"}
        found += arm_resamples(clip_table(nll, tokens), n_resamples=800, seed=trial).differences().loc[0, "p"] < 0.05
    assert 1 <= found <= 14


def test_holm_covers_all_pairs() -> None:
    rng = np.random.default_rng(1)
    tokens, common = np.full(50, 10), rng.normal(6, 1, 50)
    nll = {(name, 0): common + rng.normal(0.02 * i, 0.1, 50) for i, name in enumerate("wxyz")}
    pairs = arm_resamples(clip_table(nll, tokens)).differences()
    assert len(pairs) == 6
    assert (pairs["difference"] >= 0).all()
    smallest = pairs["p"].idxmin()
    assert pairs.loc[smallest, "p_holm"] == pytest.approx(min(1, 6 * pairs.loc[smallest, "p"]))
    assert (pairs["p_holm"] >= pairs["p"]).all()


def test_models_scored_on_other_clips_are_refused() -> None:
    tokens = np.full(5, 10)
    table = clip_table({("x", 0): np.ones(5), ("y", 0): np.ones(5)}, tokens)
    with pytest.raises(ValueError, match="scored on different clips"):
        arm_resamples(table.drop(index=7))
    changed = table.copy()
    changed.loc[7, "tokens"] = 9
    with pytest.raises(ValueError, match="scored on different clips"):
        arm_resamples(changed)
    with pytest.raises(ValueError, match="1 held-out clip gives no interval"):
        arm_resamples(table[table["clip_id"] == "c00"])


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
