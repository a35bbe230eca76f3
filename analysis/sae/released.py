"""The audit of SAEs that were trained elsewhere: how R² and each proxy rank them, and where R² misleads.

Everything here describes the SAEs that were given: ranks, and differences between ranks. No statement is made about
other SAEs, and none has an error rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.sae.cells import ce_rec_interval
from analysis.sae.information_tables import information
from analysis.sae.leaderboard import PROXIES, REFERENCE, TARGET
from analysis.sae.legibility_tables import MEANING, by_cell, cells_of, rows_of
from analysis.sae.measured import measured
from analysis.sae.tables import markdown

FLAG_SHARE = 0.25
"""R² misleads about an SAE where the two ranks differ by at least this share of the SAEs (and by two places)."""
SHOWN = ("r2", "r2_no_sinks", "ce_loss_score", "kl", "fisher", "swd")


def ranks(cells: pd.DataFrame) -> pd.DataFrame:
    """Rank of each SAE (1 is best; equal values share the better rank) by CE_rec and by every proxy that was measured.

    A proxy that is not known for all SAEs is left out: its ranks would be among others.
    """
    table = {TARGET: cells[TARGET].rank(ascending=False, method="min")}
    for proxy in PROXIES:
        if proxy.metric in cells and cells[proxy.metric].notna().all():
            score = pd.Series(proxy.transform(cells[proxy.metric].to_numpy(float)), index=cells.index)
            table[proxy.name] = score.rank(ascending=False, method="min")
    return pd.DataFrame(table).astype(int)


def flags(cells: pd.DataFrame) -> list[str]:
    """A sentence for each SAE whose rank by R² is far from its rank by CE_rec, the largest difference first.

    Args:
        cells: one row per SAE, columns `sae`, CE_rec and R².
    """
    ranked, n = ranks(cells), len(cells)
    apart = (ranked[REFERENCE] - ranked[TARGET]).abs()
    least = max(2, int(np.ceil(FLAG_SHARE * n)))
    lines = []
    for row in apart[apart >= least].sort_values(ascending=False, kind="stable").index:
        by_r2, by_ce = ranked.loc[row, REFERENCE], ranked.loc[row, TARGET]
        way = "flatters" if by_r2 < by_ce else "hides"
        lines.append(f"R² {way} {cells.loc[row, 'sae']}: rank {by_r2} of {n} by R², {by_ce} by CE_rec.")
    return lines


def agreement(cells: pd.DataFrame) -> pd.DataFrame:
    """Spearman correlation of each proxy with CE_rec over these SAEs, the highest first; NaN where one is constant."""
    ranked = ranks(cells)
    labels = {proxy.name: proxy.label for proxy in PROXIES}
    rows = [
        {
            "proxy": labels[name],
            "Spearman with CE_rec": ranked[name].corr(ranked[TARGET], method="spearman"),
            "largest difference of ranks": int((ranked[name] - ranked[TARGET]).abs().max()),
        }
        for name in ranked.columns.drop(TARGET)
    ]
    return pd.DataFrame(rows).sort_values("Spearman with CE_rec", ascending=False, kind="stable")


def glance(cells: pd.DataFrame) -> list[str]:
    """The findings in sentences."""
    best = cells.sort_values([TARGET, "sae"], ascending=[False, True]).iloc[0]
    lines = [f"Best by CE_rec: {best['sae']} ({best['sae_class']}) at {best[TARGET]:.3f}, R² {best['r2']:.3f}."]
    if len(cells) < 3:
        return [*lines, "Ranks are compared from three SAEs on."]
    found = flags(cells)
    if not found:
        lines.append(f"R² ranks none of the {len(cells)} SAEs far from where CE_rec does (see the ranks).")
    table = agreement(cells)
    ranked = ranks(cells)
    r2 = float(ranked[REFERENCE].corr(ranked[TARGET], method="spearman"))
    top = table.to_dict("records")[0]
    lines.append(
        f"Spearman with CE_rec over these {len(cells)} SAEs: R² {r2:+.2f}; highest {top['proxy']!s} "
        f"{float(top['Spearman with CE_rec']):+.2f}."
    )
    return lines + found


def write_audit(
    cells: pd.DataFrame,
    sequences: pd.DataFrame,
    out: Path,
    *,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    probed: Mapping[str, pd.DataFrame] | None = None,
    geometry: pd.DataFrame | None = None,
) -> Path:
    """Write report.md, cells.parquet, cells.csv, ranks.csv and proxies.csv of audited SAEs (and legibility.csv).

    Args:
        cells: one row per SAE: `sae` (its name), `sae_class` and `columns.CELL_COLUMNS`.
        sequences: the evaluated sequences by `cell_key`.
        out: folder, made when absent.
        facts: what it ran on, in plain words, in order.
        notes: caveats, a line each.
        probed: what probes found of each class of tokens, by cell_key, for SAEs that were asked.
        geometry: one row per model and layer, as `information_tables.information` takes it.
    Returns:
        The path of report.md.
    """
    out.mkdir(parents=True, exist_ok=True)
    of_cell = sequences.groupby("cell_key").get_group
    limits = {key: ce_rec_interval(of_cell(key)) for key in cells["cell_key"]}
    cells = cells.assign(
        ce_rec_lo=[limits[key].lo for key in cells["cell_key"]], ce_rec_hi=[limits[key].hi for key in cells["cell_key"]]
    )
    cells = cells.sort_values([TARGET, "sae"], ascending=[False, True], kind="stable").reset_index(drop=True)
    ranked = pd.concat([cells[["sae", "sae_class"]], ranks(cells)], axis=1)
    cells.to_parquet(out / "cells.parquet", index=False)
    cells.to_csv(out / "cells.csv", index=False)
    ranked.to_csv(out / "ranks.csv", index=False)
    agreement(cells).to_csv(out / "proxies.csv", index=False)
    text = _compose(cells, ranked, facts, notes)
    if probed:
        table = by_cell(probed)
        table.to_csv(out / "legibility.csv", index=False)
        text += "\n".join(_legibility(cells, table))
    layers = None if geometry is None else information(cells, geometry)
    if layers is not None and not layers.needs:
        text += "\n".join(["", f"## {layers.title}", "", *layers.lines, "", markdown(layers.rows), ""])
    report = out / "report.md"
    report.write_text(text, encoding="utf-8")
    return report


def _legibility(cells: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """The report's part on probes, in lines of Markdown."""
    known = cells[cells["cell_key"].isin(table["cell_key"])]
    rows = [
        {"SAE": str(row["sae"]), "CE_rec": f"{row['ce_rec']:.3f}", "R²": f"{row['r2']:.4f}"} | cells_of(row)
        for _, row in known.iterrows()
    ]
    by_class = ["", "By class, means over these SAEs:", "", markdown(rows_of(table))]
    return ["", "## Legibility: probes for classes of tokens", "", MEANING, "", markdown(rows), *by_class, ""]


def _compose(cells: pd.DataFrame, ranked: pd.DataFrame, facts: Mapping[str, str], notes: Sequence[str]) -> str:
    plain = [
        "Ranks and their differences describe the SAEs that were given, on this text; they say nothing about others.",
        "SAEs of different layers or models are ranked together. CE_rec is easier at some layers than at others: "
        "compare within a layer before you choose.",
        "CE_rec's brackets are 95% t intervals for the one SAE and other text: over the documents of the evaluated "
        "sequences where they are known, else over the sequences.",
        "A sequence begins with BOS where the model's tokenizer puts that token before texts, and the "
        "model's weights are unprocessed; an SAE that was trained on other input may do worse here than where it was "
        "made.",
    ]
    rows = [
        {
            "SAE": row["sae"],
            "class": row["sae_class"],
            "model": row["model"],
            "layer": str(row["layer"]),
            "d_sae": f"{row['d_sae']:.0f}",
            "L0": f"{row['l0']:.1f}",
            "CE_rec": measured(row, "ce_rec", ("ce_rec_lo", "ce_rec_hi")),
            **{name: f"{row[name]:.4g}" if np.isfinite(row[name]) else "–" for name in SHOWN},
            "alive": f"{row['alive']:.1%}",
            "median density": f"{row['density_median']:.2g}",
            "dense features": f"{row['dense_share']:.1%}",
        }
        for _, row in cells.iterrows()
    ]
    table = agreement(cells).round(3) if len(cells) >= 3 else None
    text = [
        "# Audit of trained SAEs",
        "Does R² rank these SAEs as the language model does, when their reconstructions are patched back in?",
        "## What was run",
        markdown([{"what": name, "value": value} for name, value in facts.items()]),
        "## At a glance",
        "\n".join(f"- {line}" for line in glance(cells)),
        "## Notes",
        "\n".join(f"- {note}" for note in (*plain, *notes)),
        "## The SAEs, best by CE_rec first",
        markdown(rows),
        "## Ranks by each proxy (1 is best)",
        markdown([{str(k): str(v) for k, v in row.items()} for row in ranked.to_dict("records")]),
        "## Proxies against CE_rec",
        "Needs three SAEs."
        if table is None
        else markdown([{str(k): str(v) for k, v in row.items()} for row in table.to_dict("records")]),
    ]
    return "\n\n".join(text) + "\n"
