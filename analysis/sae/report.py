"""The proxy-gap report: pure functions from cells, sequence tables and layer geometry to files.

The same input gives the same bytes: resampling is seeded and nothing is stamped with a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.sae import published as paper
from analysis.sae import tables
from analysis.sae import tables as details
from analysis.sae import variance_tables as variance
from analysis.sae.adjudication import adjudication
from analysis.sae.cells import SequenceTables, depths_of, prepare_cells, tokens_label
from analysis.sae.columns import LAYER_COLUMNS
from analysis.sae.contrasts import configuration_means, model_deltas
from analysis.sae.hypotheses import Thresholds, adjudicate
from analysis.sae.information_tables import information
from analysis.sae.leaderboard import leaderboard
from analysis.sae.legibility_tables import labels, legibility
from analysis.sae.measured import Study, measured, study_name
from analysis.sae.plots import write_figures
from analysis.sae.rung_tables import rungs
from analysis.sae.rungs import merged_costs
from analysis.sae.tables import markdown

SEED = 0
N_RESAMPLES = 400
GEOMETRY_COLUMNS = ("model", "layer", "d_model", "pr", "pr_deflated")


def write_report(study: Study, out: Path, *, preset: str, facts: Mapping[str, str], notes: Sequence[str] = ()) -> Path:
    """Write report.md, its figures, cells.parquet, cells.csv, leaderboard.csv and the tables they show.

    Args:
        study: what `measure` found.
        out: folder, made when absent; files of an earlier report are overwritten.
        preset: its name, for the title.
        facts: what it ran on, in plain words (models, real or stand-in; text; budget; hardware), in order.
        notes: caveats to print, a line each.
    Returns:
        The path of report.md.
    """
    out.mkdir(parents=True, exist_ok=True)
    study.cells.to_parquet(out / "cells.parquet", index=False)
    for name, table in {
        "cells.csv": study.cells,
        "means.csv": study.means,
        "deltas.csv": study.deltas,
        "leaderboard.csv": study.board.table,
        "leaderboard_pairs.csv": study.board.pairs,
        "geometry.csv": study.geometry,
        "costs.csv": study.costs.rename_axis("rung").reset_index(),
    }.items():
        table.to_csv(out / name, index=False)
    if len(study.legibility):
        study.legibility.to_csv(out / "legibility.csv", index=False)
    figures = write_figures(study, out)
    report = out / "report.md"
    report.write_text(compose(study, figures, preset=preset, facts=facts, notes=notes), encoding="utf-8")
    return report


def measure(
    cells: pd.DataFrame,
    sequences: Mapping[str, pd.DataFrame] | pd.DataFrame | None,
    geometry: pd.DataFrame | None,
    *,
    published: bool = False,
    n_resamples: int = N_RESAMPLES,
    costs: Mapping[str, pd.DataFrame] | None = None,
    thresholds: Thresholds | None = None,
    recorded: Sequence[str] = (),
) -> Study:
    """Everything that the report prints or draws, computed.

    Args:
        cells: one row per cell, columns `columns.CELL_COLUMNS` (more are kept).
        sequences: the evaluated sequences by cell_key (or one frame with that column), columns
            `columns.SEQUENCE_COLUMNS`; None leaves intervals to seeds alone, and the report states it.
        geometry: one row per layer, columns GEOMETRY_COLUMNS and, unless an older ledger lacks them,
            columns.LAYER_COLUMNS; None leaves the sections out.
        published: whether the preset is one of the study's, so that its numbers are printed with ours.
        n_resamples: of the sequences, for the leaderboard.
        costs: what each rung took, by cell_key (`rungs.merged_costs`).
        thresholds, recorded: those of the verdicts, and the hashes that the cells record (`hypotheses.adjudicate`).
    Raises:
        ValueError: a table lacks columns, repeats a cell, or is empty.
    """
    ordered = prepare_cells(cells)
    evaluated = SequenceTables(ordered, sequences)
    ordered, earlier = _renewed(ordered, evaluated)
    means = configuration_means(ordered, evaluated)
    scopes = tables.correlation_scopes(ordered)
    board = leaderboard(ordered, evaluated, scopes=scopes, n_resamples=n_resamples, seed=SEED)
    layers = _prepare_geometry(geometry)
    return Study(
        cells=ordered,
        means=means.table,
        deltas=model_deltas(means),
        board=board,
        geometry=layers,
        published=published,
        sequences=evaluated.given,
        n_resamples=n_resamples,
        earlier_intervals=earlier,
        adjudication=adjudicate(means, board, layers, ordered, thresholds or Thresholds(), recorded),
        costs=merged_costs(costs or {}),
    )


def _renewed(cells: pd.DataFrame, evaluated: SequenceTables) -> tuple[pd.DataFrame, int]:
    """The cells with CE_rec's limits of today's method, and how many were stored with others."""
    found = evaluated.ce_rec_intervals()
    if found is None:
        return cells, 0
    limits = {"ce_rec_lo": np.array([e.lo for e in found]), "ce_rec_hi": np.array([e.hi for e in found])}
    same = [np.isclose(cells[name], values, rtol=0, atol=1e-9, equal_nan=True) for name, values in limits.items()]
    return cells.assign(**limits), int((~(same[0] & same[1])).sum())


def compose(
    study: Study, figures: Mapping[str, str], *, preset: str, facts: Mapping[str, str], notes: Sequence[str] = ()
) -> str:
    """The report's Markdown; `figures` maps the files that were drawn to their captions."""
    sections = [
        (tables.headline(study), ["r2_vs_ce_rec.png"]),
        (tables.model_deltas(study), ["delta.png"]),
        (tables.by_model_and_k(study), []),
        (tables.correlations(study), []),
        (details.leaderboard(study), ["leaderboard.png", "cost.png"]),
        (rungs(study), []),
        (tables.k_stars(study), ["ce_rec_vs_k.png"]),
        (tables.budget_deltas(study), []),
        (tables.budget_cells(study), ["budget.png"]),
        (variance.layers(study), []),
        (variance.controls(study), ["r2_no_sinks_vs_ce_rec.png"]),
        (variance.scale_parts(study), []),
        (details.participation_ratios(study), ["participation_ratio.png"]),
        (information(study.cells, study.geometry), []),
        (details.conventions(study), []),
        (details.rates(study), ["rate_distortion.png", "alive.png"]),
        (legibility(study), []),
        (labels(study), []),
        (variance.definition_check(study), []),
        (adjudication(study), []),
    ]
    text = [
        f"# SAE proxy gap: {preset}",
        "Does R² of a sparse autoencoder's reconstruction rank SAEs as the language model does, when the "
        "reconstruction is patched back in and the loss is measured?",
        "## What was run",
        markdown([{"what": name, "value": value} for name, value in _facts(study, facts).items()]),
        "## At a glance",
        "\n".join(f"- {line}" for line in glance(study)),
        "## Notes",
        "\n".join(f"- {note}" for note in (*_notes(study), *confounds(study), *notes)),
    ]
    for section, names in sections:
        text += [f"## {section.title}", *section.lines]
        text.append(markdown(section.rows) if not section.needs else f"Not in this grid. It needs {section.needs}.")
        text += [f"![{figures[name]}]({name})" for name in names if name in figures]
    return "\n\n".join(text) + "\n"


def _prepare_geometry(geometry: pd.DataFrame | None) -> pd.DataFrame:
    if geometry is None or geometry.empty:
        return pd.DataFrame(columns=[*GEOMETRY_COLUMNS, *LAYER_COLUMNS])
    missing = [c for c in GEOMETRY_COLUMNS if c not in geometry.columns]
    if missing:
        raise ValueError(f"the geometry table lacks columns {missing}; build its rows with CovarianceSums.summary")
    geometry = geometry.assign(**{c: math.nan for c in LAYER_COLUMNS if c not in geometry.columns})
    return geometry.sort_values(["d_model", "model", "layer"]).reset_index(drop=True)


def _facts(study: Study, facts: Mapping[str, str]) -> dict[str, str]:
    cells = study.cells
    grid = {
        "cells": str(len(cells)),
        "models": ", ".join(f"{m} (d_model {d})" for m, d in _models(cells)),
        "depths": ", ".join(f"{d} ({', '.join(_hooks(cells, d))})" for d in depths_of(cells)),
        "k": ", ".join(str(k) for k in sorted(cells["k"].unique())),
        "training tokens": ", ".join(tokens_label(t) for t in study.budgets),
        "seeds": ", ".join(str(s) for s in sorted(cells["seed"].unique())),
    }
    return {**facts, **{name: value for name, value in grid.items() if name not in facts}}


def _models(cells: pd.DataFrame) -> list[tuple[str, int]]:
    frame = cells[["model", "d_model"]].drop_duplicates().sort_values(["d_model", "model"])
    return [(str(m), int(d)) for m, d in zip(frame["model"], frame["d_model"], strict=True)]


def _hooks(cells: pd.DataFrame, depth: str) -> list[str]:
    frame = cells.loc[cells["depth"] == depth, ["model", "layer", "d_model"]].drop_duplicates()
    frame = frame.sort_values(["d_model", "model"])
    return [f"{m} L{layer}" for m, layer in zip(frame["model"], frame["layer"], strict=True)]


def glance(study: Study) -> list[str]:
    """The findings in sentences, each computed from the tables below it."""
    lines = []
    at_depth = study.deltas[study.deltas["depth"] == study.reference_depth]
    for tokens, part in at_depth.groupby("tokens", sort=True):
        row = part.sort_values("k").iloc[0]
        needs = row["delta_ce_rec_needs"] or row["delta_r2_needs"]
        verdict = {
            "opposite": "R² and the patched loss point in opposite directions",
            "same": "R² and the patched loss point the same way",
            "undetermined": f"directions undetermined ({needs or 'not both differences pass 5% after Holm'})",
        }[tables.direction(row)]
        lines.append(
            f"{study.reference_depth}, k = {row['k']}, {tokens_label(float(str(tokens)))} tokens, {row['large']} minus "
            f"{row['small']}: ΔR² {measured(row, 'delta_r2', sign=True)}, "
            f"ΔCE_rec {measured(row, 'delta_ce_rec', sign=True)}; {verdict}."
        )
    if len(study.deltas):
        count = pd.Series([tables.direction(row) for _, row in study.deltas.iterrows()]).value_counts()
        lines.append(
            f"Of {len(study.deltas)} comparisons of these two models (depth, k, budget): opposite in "
            f"{count.get('opposite', 0)}, same in {count.get('same', 0)}, undetermined in "
            f"{count.get('undetermined', 0)}."
        )
    table = study.board.table
    ranked = table[(table["scope"] == "all cells") & (table["statistic"] == "spearman") & table["value"].notna()]
    for relation, part in ranked.groupby("relation", sort=False):
        best, r2 = part.iloc[0], part[part["proxy"] == "r2"]
        text = f"Spearman with CE_rec, {relation}: {best['label']} ranks first of {len(part)} at "
        text += measured(best, "value", ("lo", "hi"), sign=True)
        if len(r2) and best["proxy"] != "r2":
            row = r2.iloc[0]
            text += f"; R² is number {row['rank']} at {measured(row, 'value', ('lo', 'hi'), sign=True)}, "
            text += f"behind by {measured(best, 'minus_r2', sign=True)} (paired)"
        lines.append(text + ".")
    lines += variance.flags(study)
    return lines or ["One cell alone compares nothing; add models, k or depths."]


def _notes(study: Study) -> list[str]:
    crossed = (
        "training seeds and evaluated sequences"
        if study.sequences
        else "training seeds (no sequence tables were given)"
    )
    notes = [
        "The language models' weights are used unprocessed: no folding of layer norms, no centring of weights.",
        f"Brackets are 95% t intervals over {crossed}, each interval for its own number alone. Models evaluated on the "
        "same text are paired. Sequences of one document are alike and count as one unit, where the cells tell their "
        "documents. R²'s total variation stays around the mean of the whole evaluation "
        "set. “[–]”: these data support no interval.",
        "A configuration of one seed: its interval is that of the one trained SAE over sequences and covers no "
        "variation between trainings. Seeds differ in the SAE's initial weights; all see the same tokens in the same "
        "order.",
        "CE_rec_lo and CE_rec_hi in cells.csv are per cell, for other text alone.",
    ]
    lacking = int(study.cells["sst_share_top1pct"].isna().sum())
    if lacking:
        notes.append(
            f"{lacking} of {len(study.cells)} cells were published before what owns the variance was measured: their "
            "columns on it are “–” here and empty in cells.parquet."
        )
    if study.earlier_intervals:
        notes.append(
            f"{study.earlier_intervals} cells were published with limits of CE_rec by an earlier method (too "
            "narrow); here they are computed again from the cells' sequences."
        )
    if study.published:
        notes.append("“Published” columns: the source study's numbers; blank where it printed none for that cell.")
    else:
        notes.append("“Published” columns are blank: these are not the study's settings.")
    return notes


def confounds(study: Study) -> list[str]:
    """Depth names that mean different things in different models: the final block in one, not in another."""
    lines = []
    whole = {str(m): sorted(part["layer"]) for m, part in study.geometry.groupby("model")}
    n_blocks = {m: len(layers) for m, layers in whole.items() if layers == list(range(len(layers)))} | paper.N_LAYERS
    hooked = study.cells[["model", "depth", "layer", "d_model"]].drop_duplicates()
    for depth in study.depths:
        part = hooked[hooked["depth"] == depth].sort_values(["d_model", "model"])
        blocks = [n_blocks.get(m, n_blocks.get(study_name(m))) for m in part["model"]]
        ends = [int(layer) + 1 == n for layer, n in zip(part["layer"], blocks, strict=True)]
        if any(ends) and not all(ends):
            words = [
                f"{study_name(m)} {depth} (L{layer}) is {'the final block' if end else 'not the final block'}"
                for m, layer, end in zip(part["model"], part["layer"], ends, strict=True)
            ]
            lines.append(f"Confound: {'; '.join(words)}. A difference between these models at {depth} mixes the two.")
    return lines
