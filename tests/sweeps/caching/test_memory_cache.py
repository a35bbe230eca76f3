"""The memory-caching study: one variable at a time, matched controls, bad input, end to end, the planted task."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.codec.cost import lm_cost
from sweeps.caching import arms as arms_module
from sweeps.caching import cells as cells_module
from sweeps.caching.arms import BASE, PLANTED_NORMALIZED, TOGETHER, arms
from sweeps.caching.cells import CACHE, SHARED, VARIABLES, CacheCell
from sweeps.caching.presets import PRESETS
from sweeps.caching.report import reach, write
from sweeps.caching.run import run_pack
from sweeps.caching.sweep import SWEEP
from sweeps.core.cells import UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.ledger.ledger import Ledger

MACHINE = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=8 * 2**30, hardware="test")
LOCAL = PRESETS["local"]
TINY = replace(
    LOCAL,
    variables=("train_clips", "normalized_retrieval"),
    together=(),
    train_clips=(9, 0),
    segment=(16,),
    seeds=(1, 2),
    corpus_clips=40,
    codebook_size=256,
    chunk_s=1.0,
    min_s=0.8,
    holdout=0.3,
    steps=4,
    batch_size=2,
    warmup_steps=1,
    eval_every=2,
    eval_clips=4,
)


def context_on(storage: str) -> PackContext:
    ledger = Ledger(storage, SWEEP.name, SWEEP.version)
    return PackContext(ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f")


def changed(a: CacheCell, b: CacheCell) -> set[str]:
    return {name for name, value in a.identity().items() if b.identity()[name] != value}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_one_variable_at_a_time_and_a_control_for_each(preset: str) -> None:
    study = PRESETS[preset]
    every = list(arms(study))
    base = every[0]
    assert base.name == BASE
    varied = set()
    for arm in every:
        for seed, cell, control in zip(study.seeds, arm.cells, arm.controls, strict=True):
            assert cell.seed == control.seed == seed
            against = changed(cell, control)
            assert "architecture" in against
            assert against - {"architecture"} <= set(CACHE)  # same size, data, rate, corpus, steps and batches
        if not arm.planted and arm.name not in (BASE, TOGETHER):
            assert changed(arm.cells[0], base.cells[0]) == {arm.variable}
            assert changed(arm.controls[0], base.controls[0]) == {arm.variable} & set(SHARED)
            varied.add(arm.variable)
    assert varied == set(VARIABLES)
    together = next(arm for arm in every if arm.name == TOGETHER)
    assert changed(together.cells[0], base.cells[0]) == set(study.together)
    cells = SWEEP.plan(study)
    assert {c.key for arm in every for c in (*arm.cells, *arm.controls)} == {c.key for c in cells}
    assert len({c.key for c in cells}) == len(cells)
    estimate = SWEEP.estimate(cells, study, MACHINE, RunSettings())
    assert estimate.flops > 0 < estimate.seconds


@pytest.mark.parametrize("preset", list(PRESETS))
def test_controls_have_no_caches_and_as_many_parameters(preset: str) -> None:
    study = PRESETS[preset]
    for arm in arms(study):
        control = arm.controls[0].lm_config()
        assert control.memory_cache is None
        with_base_options = replace(arm.controls[0], architecture="mc_la").lm_config()
        assert lm_cost(control).parameters == pytest.approx(lm_cost(with_base_options).parameters, rel=0.01)
        cached = arm.cells[0].lm_config()
        assert cached.memory_cache is not None
        assert (cached.d_model, cached.n_layers) == (control.d_model, control.n_layers)
        assert control.d_ff >= cached.d_ff


def test_presets_are_the_study() -> None:
    study = PRESETS["mc_a100"]
    base = next(arms(study)).cells[0]
    assert lm_cost(base.lm_config()).parameters == 48_705_996
    together = next(arm for arm in arms(study) if arm.name == TOGETHER).cells[0]
    assert lm_cost(together.lm_config()).parameters == 95_099_141
    assert (base.segment, base.lr, base.train_clips) == (256, 1e-4, 25_000)
    assert (together.segment, together.lr, together.start_layer) == (128, 3e-4, 10)


def test_packs_hold_every_cell_once_and_share_the_work() -> None:
    cells = SWEEP.plan(LOCAL)
    packs = SWEEP.pack(cells, LOCAL, MACHINE, RunSettings())
    assert len(packs) == 2
    assert sorted(c.key for p in packs for c in p.cells) == sorted(c.key for c in cells)
    weights = [sum(c.weight for c in p.cells) for p in packs]  # type: ignore[attr-defined]
    assert max(weights) < 1.05 * min(weights)
    gpus = replace(MACHINE, gpus=4)
    alone = SWEEP.pack(cells, PRESETS["mc_a100"], gpus, RunSettings())
    assert len(alone) == len(cells)
    assert all(p.gpus == 1 for p in alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": ("segmnt",)}, "variables: 'segmnt' is no variable of this study; did you mean segment"),
        ({"together": ("depth",)}, "together: 'depth' is no variable of this study"),
        ({"segment": (32, 400)}, "segment=400 is not shorter than the 159 steps of a clip"),
        ({"segment": (0,)}, "segment=0"),
        ({"start_layer": (1, 9)}, "start_layer=9 exceeds n_layers=3"),
        ({"start_layer": (0,)}, "layers count from 1"),
        ({"rank": (8, 49)}, "rank=49 exceeds d_model=48"),
        ({"rank": (-1,)}, "rank=-1"),
        ({"scale": ("smal",)}, "scale='smal' is not known; did you mean small"),
        ({"train_clips": (-3,)}, "train_clips=-3 must be >= 0"),
        ({"lr": ()}, "lr is empty"),
        ({"corpus": "recall"}, r"corpus 'recall' is not known.*planted=true"),
        ({"codec": "opus"}, "codec 'opus' is not known"),
        ({"codec": "encodec"}, "synthetic_speech goes with its own melvq"),
        ({"warmup_steps": 250}, "warmup_steps=250 leaves no step"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        SWEEP.plan(replace(LOCAL, **changes))
    assert "\n" not in str(caught.value)


def test_reach_is_the_sum_of_the_learning_rates() -> None:
    cell = replace(next(arms(LOCAL)).cells[0], steps=100, warmup_steps=0, lr=0.04, lr_end=0.0, gate_bias_init=-2.0)
    assert np.log(reach(cell) / (1 - reach(cell))) == pytest.approx(-2 + 0.5 * 100 * 0.04, abs=0.03)


def test_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    short = {"steps": 4, "warmup_steps": 1, "eval_every": 2, "eval_clips": 6, "corpus_clips": 300, "batch_size": 8}
    for module in (arms_module, cells_module):
        monkeypatch.setattr(module, "PLANTED_SETTING", {**cells_module.PLANTED_SETTING, **short})
    context = context_on(f"memory://{uuid.uuid4().hex}")
    cells = SWEEP.plan(TINY)
    run_pack(cells, TINY, context)
    published = context.ledger.read_many([c.key for c in cells])
    assert len(published) == len(cells) == 2 * (3 + 2 + 3)
    lines = write(published, "local", TINY, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert any("SYNTHETIC" in line for line in lines)
    assert text.startswith("# ")  # below which the launcher says that cells are missing
    assert "PLANTED" in text
    table = pd.read_csv(tmp_path / "report" / "effects.csv").set_index("arm")
    assert list(table.index) == [BASE, "train_clips=all", "normalized_retrieval=True", "recall", PLANTED_NORMALIZED]
    numbers = pd.read_parquet(tmp_path / "report" / "cells.parquet").set_index(["arm", "role", "seed"]).sort_index()
    column = numbers["final_val_nll_ema"]
    for arm in table.index:
        expected = (column[arm, "mc"] - column[arm, "control"]).mean()
        assert table.loc[arm, "worth"] == pytest.approx(expected, rel=1e-6)
        assert 0.1 < table.loc[arm, "openness_start"] < 0.13
        assert 0 < table.loc[arm, "cache_mass"] < 1
    assert table.loc[BASE, "read_ratio"] > 10 * table.loc["normalized_retrieval=True", "read_ratio"]
    by_key = {c.key: c for c in published}
    base = by_key[next(arms(TINY)).cells[0].key]
    assert b'"train_clips": 9,' in context.ledger.file(base.key, "tokens.json")
    curve = base.rows[(base.rows["metric"] == "gate_openness") & (base.rows["weights"] == "ema")]
    assert sorted(set(zip(curve["step"], curve["layer"], strict=True))) == [(s, x) for s in (2, 4) for x in (1, 2, 3)]
    partial = [c for c in published if by_key[c.key].identity["normalized_retrieval"] is False]
    assert any(
        "left out: normalized_retrieval=True" in line for line in write(partial, "local", TINY, tmp_path / "part")
    )
    greedy = replace(TINY, planted=False, train_clips=(999,))
    with pytest.raises(UserError, match=r"train_clips=999: 999 clips asked for, but this side has \d+.*or 0 for all"):
        run_pack(SWEEP.plan(greedy)[:1], greedy, context)
    with pytest.raises(UserError, match="base setting and its control are not finished"):
        write(published[:1], "local", TINY, tmp_path / "none")


@pytest.mark.slow
def test_where_memory_is_needed_the_gate_opens_and_caching_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The instrument can tell: from the same shut start, on a task whose answer is segments back."""
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    arm = next(arm for arm in arms(replace(LOCAL, seeds=(1,))) if arm.name == PLANTED_NORMALIZED)
    context = context_on(f"memory://{uuid.uuid4().hex}")
    run_pack([*arm.cells, *arm.controls], replace(LOCAL, seeds=(1,)), context)
    cached, control = (context.ledger.read(c[0].key).rows for c in (arm.cells, arm.controls))
    final = [
        r.loc[(r["metric"] == "final_val_nll") & (r["weights"] == "ema"), "value"].item() for r in (cached, control)
    ]
    assert final[0] < final[1] - 0.01
    openness = cached[(cached["metric"] == "gate_openness") & (cached["weights"] == "ema")]
    assert openness.loc[openness["step"] == openness["step"].max(), "value"].max() > 0.3  # from sigmoid(-2) = 0.12
