"""From published cells to the tables that `analysis` turns into the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.sae import published
from analysis.sae.columns import IDENTITY, INFORMATION_COLUMNS, LAYER_COLUMNS
from analysis.sae.hypotheses import Thresholds
from analysis.sae.legibility_tables import by_cell
from analysis.sae.released import glance as glance_at_audit
from analysis.sae.released import write_audit
from analysis.sae.report import glance, measure, write_report
from analysis.sae.variance_tables import answer
from models.host.specs import HOST_LMS, RESID_POST
from sweeps.core.cells import PublishedCell
from sweeps.launch.lines import labelled
from sweeps.ledger.published import files_of, recorded, tables_of
from sweeps.sae.sources import banner

if TYPE_CHECKING:
    from sweeps.sae.cells import Grid

_FINDINGS = 3  # sentences of the report's "At a glance" that the screen shows
THRESHOLDS = "thresholds.json"
LEGIBILITY_TABLE = "legibility.parquet"
_SELECTION = ("models", "k", "tokens", "depths", "layers", "seeds")  # fields that choose among cells
_READING = ("rungs", "legibility", "information", "h0_margin", "h1_ratio")  # fields that change no published number
_GEOMETRY = {f"{name}_of_layer": name for name in ("pr", "pr_deflated", *LAYER_COLUMNS, *INFORMATION_COLUMNS)}


def tables(cells: Sequence[PublishedCell]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(cells: one row each, sequences: one per cell and sequence, geometry: one per model and layer)."""
    records, sequences = [], []
    geometry: dict[tuple[str, int], dict[str, float]] = {}
    for cell, table in zip(cells, tables_of(cells, "sequences.parquet"), strict=True):
        identity = {name: cell.identity[name] for name in IDENTITY} | {"cell_key": cell.key}
        identity["sae_class"] = kind = cell.identity.get("sae", "topk")
        if kind != "topk":  # classes are compared as depths are, never averaged
            identity["depth"] = f"{identity['depth']} {kind}"
        records.append(identity | cell.numbers())
        sequences.append(table.assign(cell_key=cell.key))
        for row in cell.table("geometry_layer").reset_index().to_dict("records"):
            place = geometry.setdefault((cell.identity["model"], int(row["geometry_layer"])), {})
            known = {short: row[name] for name, short in _GEOMETRY.items() if name in row}
            place |= {name: value for name, value in known.items() if not math.isnan(value)}  # of another pack
    frame = pd.DataFrame(records)
    width = frame.set_index("model")["d_model"].to_dict()
    layers = pd.DataFrame(
        [{"model": m, "layer": layer, "d_model": width[m], **values} for (m, layer), values in geometry.items()]
    )
    return frame, pd.concat(sequences, ignore_index=True), layers


def _costs(cells: Sequence[PublishedCell]) -> dict[str, pd.DataFrame]:
    """What each rung took, by cell; cells of an older ledger have no such file."""
    known = [c for c in cells if "rungs.parquet" in c.files]
    return {c.key: table for c, table in zip(known, tables_of(known, "rungs.parquet"), strict=True)}


def _probed(cells: Sequence[PublishedCell]) -> dict[str, pd.DataFrame]:
    """What probes found, by cell, of the cells that were asked."""
    known = [c for c in cells if LEGIBILITY_TABLE in c.files]
    return {c.key: table for c, table in zip(known, tables_of(known, LEGIBILITY_TABLE), strict=True)}


def thresholds_of(grid: Grid) -> Thresholds:
    """What the preset registers for the verdicts."""
    return Thresholds(h0_margin=grid.h0_margin, h1_ratio=grid.h1_ratio)


def _recorded(cells: Sequence[PublishedCell]) -> list[str]:
    """Hashes of the thresholds in force when the cells were computed, "" for cells without a record."""
    known = [c for c in cells if THRESHOLDS in c.files]
    found = [str(json.loads(text)["digest"]) for text in files_of(known, THRESHOLDS)]
    return found + [""] * (len(cells) - len(known))


def _local_sources(cells: Sequence[PublishedCell]) -> dict[str, str]:
    """Folders that stood in for the hub, so that no report passes local weights or text off as the hub's."""
    names = {"lm_path": "language models read from", "stream_path": "text read from"}
    found = {what: sorted({str(c.meta[k]) for c in cells if c.meta.get(k)}) for k, what in names.items()}
    return {what: ", ".join(paths) for what, paths in found.items() if paths}


def is_the_studys(name: str, grid: Grid, original: Grid) -> bool:
    """Whether published numbers may be printed: for a paper preset that differs at most in its choice of cells."""
    rest = [f.name for f in fields(grid) if f.name not in (*_SELECTION, *_READING)]
    return name in published.PRESETS and all(getattr(grid, n) == getattr(original, n) for n in rest)


def write_released(cells: Sequence[PublishedCell], preset_name: str, grid: Grid, out: Path) -> list[str]:
    """Write the report of audited SAEs; returns the headline lines for the screen."""
    frame, sequences, geometry = tables(cells)
    cards = pd.concat(tables_of(cells, "sae.parquet"), ignore_index=True)
    frame = frame.assign(sae=cards["sae"], hook_name=cards["hook_name"], depth=[c.identity["depth"] for c in cells])
    models = sorted(set(frame["model"]))
    notes = [f"{m}: {HOST_LMS[m].note}" for m in models if m in HOST_LMS and HOST_LMS[m].note]
    others = {f"{row['sae']} names {row['named_model']}" for row in cards.to_dict("records") if grid.models}
    facts = {
        "ran on": ". ".join(banner(preset_name, models, str(cells[0].identity["stream"]), grid.text)),
        "models": ", ".join(models) + (f" (given with --set models=; {'; '.join(sorted(others))})" if others else ""),
        "contexts": ", ".join(str(n) for n in sorted({int(c.identity["context"]) for c in cells})),
        **_local_sources(cells),
        "SAEs": str(len(cells)),
        "hardware": recorded(cells, "hardware"),
        "commit": recorded(cells, "git_commit"),
    }
    write_audit(frame, sequences, out, facts=facts, notes=notes, probed=_probed(cells), geometry=geometry)
    return labelled("answer", glance_at_audit(frame)[:_FINDINGS])


def write(cells: Sequence[PublishedCell], preset_name: str, grid: Grid, original: Grid, out: Path) -> list[str]:
    """Write the report folder; returns the headline lines for the screen.

    `grid` is the preset with the changes of `--set`, `original` without.
    """
    frame, sequences, geometry = tables(cells)
    stream = str(cells[0].identity["stream"])
    notes = [f"{m}: {HOST_LMS[m].note}" for m in grid.models if m in HOST_LMS and HOST_LMS[m].note]
    facts = {
        "ran on": ". ".join(banner(preset_name, grid.models, stream, grid.text)),
        **({} if grid.hook == RESID_POST else {"hook": f"blocks.L.hook_{grid.hook}"}),
        **_local_sources(cells),
        "cells": str(len(cells)),
        "hardware": recorded(cells, "hardware"),
        "commit": recorded(cells, "git_commit"),
    }
    study = measure(
        frame,
        sequences,
        geometry,
        published=is_the_studys(preset_name, grid, original),
        costs=_costs(cells),
        thresholds=thresholds_of(grid),
        recorded=_recorded(cells),
    )
    study = replace(study, legibility=by_cell(_probed(cells)))
    write_report(study, out, preset=preset_name, facts=facts, notes=notes)
    best = frame.sort_values("ce_rec").to_dict("records")[-1]
    return [
        *labelled("answer", [answer(study), *glance(study)[:_FINDINGS]]),
        f"best CE_rec  {best['ce_rec']:.3f} at R² {best['r2']:.3f} "
        f"({best['model']}, {best['depth']}, k={best['k']}, {best['tokens']} tokens)",
        *labelled("ran on", banner(preset_name, grid.models, stream)[:1]),
    ]
