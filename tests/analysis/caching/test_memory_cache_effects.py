"""Effects of the memory-caching study: intervals that cover, exact pairing, verdicts by rule, and the report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.caching.effects import ArmData, effects, layer_means, openness_movement, verdicts
from analysis.caching.report import headline, write_report
from analysis.crossed import NEEDS_SEEDS, Effect, crossed_mean
from analysis.recordings import likelihood_differences

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


def gates(end: float, n_seeds: int = 3, layers: tuple[int, ...] = (1, 2), seed: int = 5) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    records = []
    for s in range(n_seeds):
        for layer in layers:
            for weights, openness in (("start", 0.12), ("raw", 0.5), ("ema", end + 0.001 * rng.standard_normal())):
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
    lr = replace(base, name="lr=0.01", variable="lr", gates=gates(0.25, n, seed=6), cached=scores(-0.2, n))
    segment = replace(base, name="segment=8", variable="segment", gates=gates(0.05, n, seed=7), cached=scores(0.2, n))
    start = replace(base, name="start_layer=2", variable="start_layer", gates=gates(0.12, n, (2,), seed=8))
    start = replace(start, cached=scores(0.0, n, seed=3))
    recall = replace(base, name="recall", planted=True, gates=gates(0.4, n, seed=9), cached=scores(-0.1, n))
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


def effect(value: float, p: float, needs: str = "") -> Effect:
    return Effect(value, math.nan, math.nan, p, needs)


def test_holm_runs_over_those_that_could_be_tested() -> None:
    found = [effect(-1.0, 0.02), effect(1.0, 0.04), effect(1.0, math.nan, NEEDS_SEEDS)]
    adjusted, words = verdicts(found, ("closes", "opens"))
    assert adjusted == pytest.approx([0.04, 0.04, math.nan], nan_ok=True)
    assert words == ["closes", "opens", NEEDS_SEEDS]
    assert verdicts([effect(-1.0, 0.03), effect(1.0, 0.04)], ("closes", "opens"))[1] == ["no evidence"] * 2


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    table = effects(study(1))
    for name in ("worth", "moved", "gate", "more"):
        assert table[[f"{name}_lo", f"{name}_hi", f"{name}_p", f"{name}_holm"]].isna().all(axis=None)
        assert set(table[f"{name}_verdict"].dropna()) == {NEEDS_SEEDS}
    lines = headline(table)
    assert lines[1] == "caching, against the control: helps: none; hurts: none; no evidence for 0 of 4; " + (
        f"not tested 4 ({NEEDS_SEEDS})"
    )
    assert lines[-1] == f"planted recall task: not tested ({NEEDS_SEEDS})"


def test_one_recording_decides_nothing_about_likelihood() -> None:
    some = [
        replace(arm, **{side: getattr(arm, side).assign(recording_id="r") for side in ("cached", "control")})
        for arm in study()
    ]
    table = effects(some).set_index("arm")
    assert set(table["n_units"]) == {1}
    assert set(table["worth_verdict"]) == {"needs ≥ 2 held-out recordings"}
    assert table.loc["lr=0.01", "gate_verdict"] == "opens"  # openness does not depend on recordings


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
