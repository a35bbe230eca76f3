"""Effects of the memory-caching study: intervals that cover, exact pairing, verdicts by rule, and the report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.memory_cache_effects import (
    ArmData,
    crossed_mean,
    effects,
    layer_means,
    likelihood_differences,
    openness_movement,
    verdicts,
)
from analysis.memory_cache_report import write_report

FACTS = {
    "n_parameters": 1000.0,
    "control_parameters": 1004.0,
    "val_nll": 4.0,
    "control_val_nll": 4.1,
    "reach": 0.2,
    "spikes": 1.0,
    "cache_spikes": 0.5,
    "gradient_share": 0.1,
}


@pytest.mark.parametrize(("seed_sd", "clip_sd", "noise_sd"), [(1.0, 1.0, 1.0), (2.0, 0.2, 0.5), (0.0, 1.0, 1.0)])
def test_intervals_cover_with_three_seeds(seed_sd: float, clip_sd: float, noise_sd: float) -> None:
    """95% limits hold the true mean in 95% of 2,000 studies, whichever variation dominates."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        d_SC = 0.3 + seed_sd * rng.standard_normal((3, 1)) + clip_sd * rng.standard_normal((1, 25))
        effect = crossed_mean(d_SC + noise_sd * rng.standard_normal((3, 25)))
        covered += effect.lo <= 0.3 <= effect.hi
    assert 0.93 <= covered / 2000 <= 0.995


def test_false_alarms_are_rare_where_seeds_differ_and_the_mean_is_zero() -> None:
    rng = np.random.default_rng(1)
    alarms = sum(
        crossed_mean(rng.standard_normal((3, 1)) + 0.3 * rng.standard_normal((3, 25))).p < 0.05 for _ in range(2000)
    )
    assert alarms / 2000 < 0.07


def test_one_row_or_column_is_the_ordinary_t_interval() -> None:
    x = np.random.default_rng(2).standard_normal(12)
    expected = stats.ttest_1samp(x, 0.0)
    for table in (x[None], x[:, None]):
        effect = crossed_mean(table)
        assert (effect.value, effect.p, effect.df) == pytest.approx((x.mean(), expected.pvalue, 11))
        assert (effect.lo, effect.hi) == pytest.approx(tuple(expected.confidence_interval()))
    assert math.isnan(crossed_mean([[1.0]]).p)
    with pytest.raises(ValueError, match="finite table of seeds by clips"):
        crossed_mean([[1.0, math.nan]])


def test_the_effect_moves_with_its_data() -> None:
    d = np.random.default_rng(3).standard_normal((3, 10))
    effect, moved = crossed_mean(d), crossed_mean(2 * d[::-1, ::-1] + 5)
    assert (moved.value, moved.lo, moved.hi) == pytest.approx(
        tuple(2 * v + 5 for v in (effect.value, effect.lo, effect.hi))
    )
    assert moved.df == pytest.approx(effect.df)
    with_seeds = crossed_mean(d + np.array([[-3.0], [0.0], [3.0]]))
    assert with_seeds.df == pytest.approx(2, abs=0.05)


def scores(shift: float, n_seeds: int = 3, n_clips: int = 8, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    records = []
    for s in range(n_seeds):
        for c in range(n_clips):
            tokens = 100 + 50 * c
            hard = 4 + 0.3 * c + 0.2 * s + 0.01 * rng.standard_normal()
            records.append({"seed": s, "clip_id": f"c{c}", "tokens": tokens, "nll": tokens * (hard + shift)})
    return pd.DataFrame(records)


def test_differences_are_those_of_val_nll_and_pair_by_clip() -> None:
    cached, control = scores(-0.1, seed=1), scores(0.0, seed=2)
    d_SC = likelihood_differences(cached, control.sample(frac=1, random_state=0))
    per_seed = [t.groupby("seed")["nll"].sum() / t.groupby("seed")["tokens"].sum() for t in (cached, control)]
    np.testing.assert_allclose(d_SC.mean(1), per_seed[0] - per_seed[1], rtol=1e-12)
    effect = crossed_mean(d_SC)
    assert effect.hi - effect.lo < 0.03  # clips differ by 2 nats, their differences by 0.01
    for wrong in (control[control["clip_id"] != "c3"], control.assign(tokens=control["tokens"] + 1)):
        with pytest.raises(ValueError, match="other seeds, clips or tokens"):
            likelihood_differences(cached, wrong)


def gates(end: float, n_seeds: int = 3, layers: tuple[int, ...] = (1, 2), spread: float = 0.001) -> pd.DataFrame:
    rng = np.random.default_rng(5)
    records = []
    for s in range(n_seeds):
        for layer in layers:
            for weights, openness in (("start", 0.12), ("raw", 0.5), ("ema", end + spread * rng.standard_normal())):
                for c, steps in enumerate((10, 30, 0)):
                    health = {"openness": openness, "cache_mass": 0.2 + 0.2 * c, "effective_mass": 0.1, "entropy": 1.0}
                    health |= {"entropy_share": 0.7, "read_ratio": 40.0 + c, "gate_bias": -2.0}
                    if steps == 0:  # a clip no longer than a segment sees no cache
                        health |= dict.fromkeys(health, math.nan)
                    records.append(
                        {"weights": weights, "seed": s, "layer": layer, "clip_id": f"c{c}", "steps": steps, **health}
                    )
    return pd.DataFrame(records)


def test_layer_means_weigh_clips_by_their_steps() -> None:
    means = layer_means(gates(0.2))
    assert len(means) == 3 * 2 * 3
    assert means["cache_mass"].unique() == pytest.approx([(10 * 0.2 + 30 * 0.4) / 40])
    moved = openness_movement(gates(0.2))
    assert moved.shape == (3, 2)
    assert moved.to_numpy() == pytest.approx(np.full((3, 2), 0.08), abs=0.005)


def study(n: int = 3) -> list[ArmData]:
    """The base setting, one variant that opens and helps, one that closes and hurts, one of no effect, and recall."""
    base = ArmData("base", "", "", False, scores(0.0, n, seed=1), scores(0.0, n, seed=2), gates(0.12, n), FACTS)
    lr = replace(base, name="lr=0.01", variable="lr", gates=gates(0.25, n), cached=scores(-0.2, n))
    segment = replace(base, name="segment=8", variable="segment", gates=gates(0.05, n), cached=scores(0.2, n))
    start = replace(base, name="start_layer=2", variable="start_layer", gates=gates(0.12, n, (2,)))
    recall = replace(base, name="recall", planted=True, gates=gates(0.4, n), cached=scores(-0.1, n))
    return [base, lr, segment, start, recall]


def test_verdicts_find_the_planted_effects() -> None:
    table = effects(study()).set_index("arm")
    assert table["gate_verdict"].drop(["base", "recall"]).to_dict() == {
        "lr=0.01": "opens",
        "segment=8": "closes",
        "start_layer=2": "no evidence",
    }
    assert table["worth_verdict"].to_dict() == {
        "base": "no evidence",
        "lr=0.01": "helps",
        "segment=8": "hurts",
        "start_layer=2": "no evidence",
        "recall": "helps",
    }
    assert table.loc["recall", "moved_verdict"] == "opened"
    assert table.loc["lr=0.01", "gate"] == pytest.approx(0.13, abs=0.005)
    assert table.loc["lr=0.01", "more"] == pytest.approx(-0.2, abs=0.02)
    assert table["more_verdict"].drop(["base", "recall"]).tolist() == ["worth more", "worth less", "no evidence"]
    assert table.loc["start_layer=2", "by_layer"].startswith("2: 0.1")
    assert pd.isna(table.loc["base", "gate"])
    assert table.loc["base", "contribution"] == pytest.approx(0.12 * 40.75, rel=0.03)


def test_holm_runs_over_the_family_and_one_seed_decides_nothing_about_openness() -> None:
    adjusted, words = verdicts([0.02, 0.04, math.nan], [-1.0, 1.0, 1.0], ("closes", "opens"))
    assert adjusted == pytest.approx([0.06, 0.08, 1.0])
    assert words == ["no evidence"] * 3
    assert verdicts([0.01], [-1.0], ("closes", "opens"))[1] == ["closes"]
    table = effects(study(1)).set_index("arm")
    assert set(table["gate_verdict"].dropna()) == {"no evidence"}
    assert table.loc["lr=0.01", "worth_verdict"] == "helps"  # of these clips, for this one model


def test_report_says_what_the_verdicts_say(tmp_path: Path) -> None:
    table = effects(study())
    table["control"] = ["a", "b", "a", "a", "c"]
    layers = pd.concat([layer_means(arm.gates).assign(arm=arm.name) for arm in study()])
    layers["contribution"] = layers["openness"] * layers["read_ratio"]
    curves = pd.DataFrame(
        [
            {"arm": arm, "role": role, "seed": s, "metric": m, "layer": 1.0, "step": step, "value": 1 / step}
            for arm in table["arm"] for role in ("mc", "control") for s in range(3)
            for m in ("val_nll", "gate_openness", "gate_cache_mass") for step in (10, 20)
        ]
    )  # fmt: skip
    lines = write_report(table, layers, curves, tmp_path, preset="test", facts=["SYNTHETIC"])
    text = (tmp_path / "report.md").read_text()
    assert "opens: lr=0.01; closes: segment=8; no evidence for 1 of 3" in lines[0]
    assert "helps: lr=0.01; hurts: segment=8; no evidence for 2 of 4" in lines[1]
    assert "worth more: lr=0.01; worth less: segment=8; no evidence for 1 of 3" in lines[2]
    assert all(line in text for line in lines)
    assert "cannot be trusted" not in text
    for name in ("effects.png", "layers.png", "openness.png", "cache_mass.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 5000
        assert f"]({name})" in text
    shut = [*study()[:-1], replace(study()[-1], gates=gates(0.12))]
    table = effects(shut).assign(control="a")
    assert "cannot be trusted to tell" in write_report(table, layers, curves, tmp_path, preset="t", facts=[])[-1]
