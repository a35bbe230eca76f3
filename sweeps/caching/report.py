"""From published cells of the memory-caching study to the tables that `analysis` turns into the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from analysis.caching.effects import ArmData, effects, layer_means
from analysis.caching.report import write_report
from analysis.crossed import NEEDS_SEEDS
from sweeps.caching.arms import BASE, Arm, arms
from sweeps.caching.cells import VARIABLES, CacheCell, CacheStudy
from sweeps.codec.clip_tables import with_recordings
from sweeps.codec.corpora import PLANTED, RECALL
from sweeps.codec.loop import TrainConfig
from sweeps.codec.report import final_scores, tokens_of_one_codec
from sweeps.codec.tokens import banner
from sweeps.core.cells import PublishedCell, UserError
from sweeps.launch.lines import labelled
from sweeps.ledger.published import recorded, tables_of

_CURVES = ("val_nll", "gate_openness", "gate_cache_mass")


def write(cells: Sequence[PublishedCell], preset_name: str, study: CacheStudy, out: Path) -> list[str]:
    """Write the report folder; returns the headline lines for the screen.

    Arms that are not finished with every seed are left out and named. Raises UserError without a finished base setting.
    """
    published = {cell.key: cell for cell in cells}
    planned = list(arms(study))
    done = [arm for arm in planned if all(c.key in published for c in (*arm.cells, *arm.controls))]
    missing = [arm.name for arm in planned if arm not in done]
    if not done or done[0].name != BASE:
        raise UserError("the base setting and its control are not finished for every seed; run the same command again")
    table = effects([_arm_data(arm, published) for arm in done])
    controls = {arm.name: arm.controls[0].key for arm in done}
    table["control"] = table["arm"].map(controls)
    layers, curves = [], []
    for arm in done:
        means = layer_means(_parquet(arm.cells, published, "gates.parquet"))
        means["contribution"] = means["openness"] * means["read_ratio"]
        layers.append(means.assign(arm=arm.name))
        for role, some in (("mc", arm.cells), ("control", arm.controls)):
            curves += [_curve(published[c.key]).assign(arm=arm.name, role=role, seed=c.seed) for c in some]
    out.mkdir(parents=True, exist_ok=True)
    _cell_table(done, published).to_parquet(out / "cells.parquet", index=False)
    notes = [*banner(study.token_study(planted=False)), *([PLANTED] if study.planted else [])]
    unfinished = [f"not finished, left out: {', '.join(missing)}"] if missing else []
    facts = [*notes, *unfinished, *_facts(done, published, study)]
    lines = write_report(
        table,
        pd.concat(layers, ignore_index=True),
        pd.concat(curves, ignore_index=True),
        out,
        preset=preset_name,
        facts=facts,
    )
    return [*labelled("answer", [*lines, *unfinished]), *labelled("ran on", notes[:1])]


def _facts(done: Sequence[Arm], published: Mapping[str, PublishedCell], study: CacheStudy) -> list[str]:
    first = published[done[0].cells[0].key]
    every = [published[c.key] for arm in done for c in (*arm.cells, *arm.controls)]
    (tokens, *_), _ = (
        tokens_of_one_codec([c for c in every if (c.identity["corpus"] == RECALL) is planted])
        for planted in (False, True)
    )
    base = {name: getattr(study, name)[0] for name in VARIABLES}
    unigram = first.rows.loc[first.rows["metric"] == "unigram_nll", "value"].iloc[0]
    return [
        "base setting: " + ", ".join(f"{name} {value}" for name, value in base.items()),
        f"{study.steps} steps of {study.batch_size} clips of up to {study.chunk_s:g} s; {tokens['train_clips']} "
        f"training clips in the base setting, {min(study.eval_clips, tokens['held_out_clips'])} held-out clips scored; "
        f"{tokens['codec']['name']} at {tokens['codec']['frame_rate_hz']:g} Hz with {tokens['codec']['n_codebooks']} "
        f"codebooks; a unigram model has {unigram:.4f} nats per token",
        f"seeds {', '.join(map(str, study.seeds))}, each paired with its control's; averaged weights throughout"
        + ("" if len(study.seeds) > 1 else f"; ONE SEED: no interval, no p, no verdict: {NEEDS_SEEDS}"),
        f"hardware: {recorded(every, 'hardware')}",
        f"commit: {recorded(every, 'git_commit')}",
    ]


def _arm_data(arm: Arm, published: Mapping[str, PublishedCell]) -> ArmData:
    cached, control = (_scores(cells, published) for cells in (arm.cells, arm.controls))
    rows = [published[c.key].rows for c in arm.cells]
    spikes = [r[r["metric"] == "grad_spikes"] for r in rows]
    facts = {
        "n_parameters": _value(rows[0], "n_parameters"),
        "control_parameters": _value(published[arm.controls[0].key].rows, "n_parameters"),
        "val_nll": float(cached["nll"].sum() / cached["tokens"].sum()),
        "control_val_nll": float(control["nll"].sum() / control["tokens"].sum()),
        "reach": reach(arm.cells[0]),
        "spikes": sum(float(s["value"].sum()) for s in spikes) / len(spikes),
        "cache_spikes": sum(float(s.loc[s["group"] == "memory_cache", "value"].sum()) for s in spikes) / len(spikes),
        "gradient_share": sum(map(_gradient_share, rows)) / len(rows),
    }
    gates = _parquet(arm.cells, published, "gates.parquet")
    return ArmData(arm.name, arm.variable, arm.value, arm.planted, cached, control, gates, facts)


def reach(cell: CacheCell) -> float:
    """Openness if each step moved the gate's bias up by the learning rate, about the most that Adam does."""
    config = TrainConfig(steps=cell.steps, lr=cell.lr, lr_end=cell.lr_end, warmup_steps=cell.warmup_steps)
    bias = cell.gate_bias_init + sum(config.lr_at(step) for step in range(cell.steps))
    return 1 / (1 + math.exp(-bias))


def _gradient_share(rows: pd.DataFrame) -> float:
    """Mean over the measured steps of the share of the squared gradient norm that W_u and b have."""
    norms = rows[rows["metric"] == "grad_norm"]
    whole = norms[norms["group"].isna()].set_index("step")["value"]
    own = norms[norms["group"] == "memory_cache"].set_index("step")["value"]
    return float((own**2 / whole**2).mean())


def _value(rows: pd.DataFrame, metric: str) -> float:
    return float(rows.loc[rows["metric"] == metric, "value"].iloc[0])


def _parquet(cells: Sequence[CacheCell], published: Mapping[str, PublishedCell], name: str) -> pd.DataFrame:
    tables = tables_of([published[c.key] for c in cells], name)
    return pd.concat(
        [with_recordings(t).assign(seed=c.seed) for c, t in zip(cells, tables, strict=True)], ignore_index=True
    )


def _scores(cells: Sequence[CacheCell], published: Mapping[str, PublishedCell]) -> pd.DataFrame:
    clips = _parquet(cells, published, "clips.parquet")
    return clips[clips["weights"] == "ema"]


def _curve(cell: PublishedCell) -> pd.DataFrame:
    rows = cell.rows[cell.rows["step"].notna() & cell.rows["metric"].isin(_CURVES) & (cell.rows["weights"] == "ema")]
    return rows.reindex(columns=["metric", "layer", "step", "value"])


def _cell_table(done: Sequence[Arm], published: Mapping[str, PublishedCell]) -> pd.DataFrame:
    """One row per cell (a control once for each arm that is compared with it): its fields and final numbers."""
    records = []
    for arm in done:
        for role, some in (("mc", arm.cells), ("control", arm.controls)):
            for cell in some:
                rows = published[cell.key].rows
                record = {"arm": arm.name, "role": role, "cell_key": cell.key, **cell.identity()}
                record |= {f"{r['metric']}_{r['weights']}": r["value"] for r in final_scores(rows).to_dict("records")}
                records.append(record | {"n_parameters": _value(rows, "n_parameters")})
    return pd.DataFrame(records)
