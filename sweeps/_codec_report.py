"""From published language models to the tables that `analysis` turns into the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.codec_report import write_report
from sweeps._codec_data import banner
from sweeps._storage import Store
from sweeps._sweep import PublishedCell

if TYPE_CHECKING:
    from sweeps.codec_lm import Study

_PLAIN = ("n_parameters", "flops_per_column", "tokens_per_second", "train_tokens", "unigram_nll", "corpus_audio")


def labels(cells: Sequence[PublishedCell]) -> list[str]:
    """What tells the cells apart: the architecture, and lr or seed where they differ."""
    names = [n for n in ("lr", "seed") if len({c.identity[n] for c in cells}) > 1]
    return [" ".join([c.identity["architecture"], *(f"{n}={c.identity[n]}" for n in names)]) for c in cells]


def tables(cells: Sequence[PublishedCell]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(models: one row a cell, curves: one row a point, codebooks: one row a cell, weights and codebook)."""
    records: list[dict[str, Any]] = []
    curves, codebooks = [], []
    for cell, label in zip(cells, labels(cells), strict=True):
        rows = cell.rows
        record: dict[str, Any] = {"model": label, "cell_key": cell.key, **cell.identity}
        plain = rows[rows["metric"].isin(_PLAIN)]
        record |= dict(zip(plain["metric"], plain["value"], strict=True))
        record["grad_spikes"] = rows.loc[rows["metric"] == "grad_spikes", "value"].sum()
        final = rows[rows["weights"].notna() & rows["step"].isna() & rows["codebook"].isna()]
        for row in final.to_dict("records"):
            record[f"{row['metric'].removeprefix('final_')}_{row['weights']}"] = row["value"]
        records.append(record)
        points = rows[rows["step"].notna() & rows["metric"].isin(["train_loss", "val_nll"])]
        curves.append(points[["metric", "weights", "step", "value"]].assign(model=label))
        books = rows[rows["codebook"].notna()]
        books = books.assign(metric=books["metric"].str.removeprefix("codebook_"))
        wide = books.pivot_table(index=["weights", "codebook"], columns="metric", values="value").reset_index()
        codebooks.append(wide.assign(model=label))
    return (
        pd.DataFrame(records),
        pd.concat(curves, ignore_index=True),
        pd.concat(codebooks, ignore_index=True),
    )


def write(cells: Sequence[PublishedCell], preset_name: str, study: Study, out: Path) -> list[str]:
    """Write the report folder; returns the headline lines for the screen."""
    models, curves, codebooks = tables(cells)
    out.mkdir(parents=True, exist_ok=True)
    samples = []
    for cell, label in zip(cells, labels(cells), strict=True):
        store, name = Store(cell.uri), label.replace(" ", "_")
        samples.append(f"{name}.png")
        (out / f"{name}.png").write_bytes(store.read("spectrogram.png"))
        (out / f"{name}.wav").write_bytes(store.read("sample.wav"))
    tokens = json.loads(Store(cells[0].uri).read("tokens.json"))
    codec = tokens["codec"]
    facts = [
        *banner(study),
        f"tokens: {tokens['n_tokens']:,} of {tokens['audio_s']:.0f} s, {codec['name']} at {codec['frame_rate_hz']:g} "
        f"Hz with {codec['n_codebooks']} codebooks; {tokens['train_clips']} training and {tokens['held_out_clips']} "
        "held-out clips, split by hash of the recording's id",
        f"{study.steps} steps of {study.batch_size} clips, lr {', '.join(f'{x:g}' for x in study.lr)}, "
        f"seeds {', '.join(map(str, study.seeds))}",
        f"hardware: {', '.join(sorted({str(c.meta.get('hardware')) for c in cells}))}",
        f"commit: {', '.join(sorted({str(c.meta.get('git_commit')) for c in cells}))}",
    ]
    if len(study.seeds) < 3:
        facts.append(f"{len(study.seeds)} seed: differences between architectures do not include training noise")
    write_report(models, curves, codebooks, out, preset=preset_name, facts=facts, samples=samples)
    best = models.sort_values("val_nll_ema").to_dict("records")
    lines = [
        f"val_nll      {r['val_nll_ema']:.4f} [{r['val_nll_lo_ema']:.4f}, {r['val_nll_hi_ema']:.4f}] {r['model']}"
        for r in best
    ]
    return [*banner(study), *lines, f"unigram      {best[0]['unigram_nll']:.4f} nats a token: what a model must beat"]
