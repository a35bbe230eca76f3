"""From published cells of the topology audit to the tables that `analysis` turns into the report."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.topology.report import summary, write_report
from analysis.topology.tables import audit
from analysis.topology.unit import OBSERVED, Unit
from analysis.topology.utility_report import ensemble_correlations
from sweeps.core.cells import PublishedCell
from sweeps.launch.first_view import SUMMARY
from sweeps.launch.lines import labelled
from sweeps.ledger.published import files_of
from sweeps.topology.cells import UTILITY_SCORES, Audit
from sweeps.topology.sources import Sources

_PLACE = ("table", "representation", "metric", "split")
_WHOLE = (  # numbers of a utility cell as a whole, not of one target
    *("rows", "neighbours_in_training", "folds", "tested", "fewest_training"),
    *("label_jaccard_train", "label_jaccard_test"),
)


def units_of(cells: Sequence[PublishedCell]) -> list[Unit]:
    """Diagrams and null draws, gathered by (table, representation, metric, route) in plan order."""
    units: dict[tuple[str, str, str, str], Unit] = {}
    wanted = [cell for cell in cells if cell.identity["kind"] == "diagram"]
    for cell, data in zip(wanted, files_of(wanted, "diagrams.npz"), strict=True):
        identity = cell.identity
        place = (identity["table"], identity["representation"], identity["metric"], identity["route"])
        unit = units.setdefault(place, Unit(place))
        diagrams = read_diagrams(data)
        run, values = identity["run"], cell.rows.set_index("metric")["value"]
        if identity["null"] == OBSERVED:
            unit.observed[run] = diagrams[0]
            if "h1_top1_quantile" in values:  # ledgers older than this row lack it
                unit.quantile[run] = float(values["h1_top1_quantile"])
            continue
        unit.joint = identity["null_stream"] == "joint"
        drawn = unit.nulls.setdefault(identity["null"], {}).setdefault(run, [])
        if identity["first_draw"] == len(drawn):  # after a gap a draw's place no longer says which draw it is
            drawn += values.loc[["h1_top1"]].tolist()
            unit.null_diagrams.setdefault(identity["null"], {}).setdefault(run, []).extend(diagrams)
    for unit in units.values():
        for by_run in unit.nulls.values():
            for run in [run for run, drawn in by_run.items() if not drawn]:
                del by_run[run]
    return list(units.values())


def write(cells: Sequence[PublishedCell], preset_name: str, preset: Audit, out: Path) -> list[str]:
    """Write the report folder; returns the headline lines for the screen."""
    sources = Sources(preset)
    units = [u for u in units_of(cells) if u.observed]
    result = audit(units)
    members, embeddings = _members(cells)
    embeddings |= sources.embeddings
    facts = [*sources.banner(), f"null draws: the {preset.null_stream} random streams", f"{len(cells)} cells"]
    out.mkdir(parents=True, exist_ok=True)
    if (kept_out := sources.invalid_rows()) is not None:
        kept_out.to_csv(out / "invalid.csv", index=False)
        facts.append(f"rows kept out of the table: {len(kept_out)}, listed in invalid.csv")
    findings = write_report(
        units,
        result,
        out,
        preset=preset_name,
        facts=facts,
        members=members,
        correlations=ensemble_correlations(embeddings) if len(embeddings) > 1 else pd.DataFrame(),
        utility=utility_frame(cells),
    )
    (out / SUMMARY).write_text(json.dumps(summary(result), indent=1), encoding="utf-8")
    return [*labelled("answer", findings), *labelled("ran on", sources.banner()[:1])]


def _members(cells: Sequence[PublishedCell]) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    rows, embeddings = [], {}
    wanted = [cell for cell in cells if cell.identity["kind"] == "member"]
    for cell, data in zip(wanted, files_of(wanted, "embedding.npy"), strict=True):
        name = cell.identity["representation"]
        rows.append({"table": cell.identity["table"], "member": name, **cell.numbers()})
        embeddings[name] = np.load(io.BytesIO(data))
    return pd.DataFrame(rows), embeddings


def _short(metric: str) -> str:
    return metric.removeprefix("utility_")


def utility_frame(cells: Sequence[PublishedCell]) -> pd.DataFrame:
    """A row per place, target and family of the published cells; one without scores where a cell had too few rows."""
    rows = []
    for cell in cells:
        if cell.identity["kind"] == "utility":
            scores = cell.table("target", "family")
            wide = pd.DataFrame([{}]) if scores.empty else scores.reset_index()
            place = {name: cell.identity[name] for name in (*_PLACE, "neighbours")}
            whole = {_short(name): value for name, value in cell.numbers().items()}
            rows.append(wide.rename(columns=_short).assign(**place, **whole))
    if not rows:
        return pd.DataFrame()
    columns = [*_PLACE, "neighbours", *_WHOLE, "target", "family", *UTILITY_SCORES, "p"]
    return pd.concat(rows, ignore_index=True).reindex(columns=columns)


def read_diagrams(data: bytes) -> list[np.ndarray]:
    """Diagrams [P, 2] of a published cell's `diagrams.npz`, one per draw."""
    with np.load(io.BytesIO(data)) as packed:
        return list(np.split(packed["pairs"], np.cumsum(packed["lengths"])[:-1]))
