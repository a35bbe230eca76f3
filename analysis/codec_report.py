"""The report of the audio-token language models: one table with intervals, curves, codebooks, spectrograms.

Shape suffixes: N samples, K codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis import plots


def write_report(
    models: pd.DataFrame,
    curves: pd.DataFrame,
    codebooks: pd.DataFrame,
    out: Path,
    *,
    preset: str,
    facts: Sequence[str],
    samples: Sequence[str],
) -> None:
    """Write report.md, cells.parquet, cells.csv, curves.png and codebooks.png into `out`.

    Args:
        models: a row a cell: model (its label), n_parameters, flops_per_column, tokens_per_second, unigram_nll,
            grad_spikes, and for raw and ema weights val_nll_W, val_nll_lo_W, val_nll_hi_W, val_loss_smoothed_W,
            perplexity_W, bits_per_second_W.
        curves: columns model, metric (train_loss, val_nll), weights, step, value.
        codebooks: columns model, weights, codebook (from 1), nll, top1, top5.
        facts: lines on what the numbers stand on.
        samples: names of spectrogram PNGs in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    models.to_parquet(out / "cells.parquet", index=False)
    models.to_csv(out / "cells.csv", index=False)
    order = models.sort_values("val_nll_ema")["model"].tolist()
    _curve_figure(curves, order, out / "curves.png")
    _codebook_figure(codebooks, order, out / "codebooks.png")
    text = [f"# Audio-token language models: {preset}", "", *[f"- {fact}" for fact in facts], ""]
    text += ["## Held-out likelihood at matched size", "", _TABLE_NOTE, "", _main_table(models), ""]
    text += ["## Cost", "", _COST_NOTE, "", _cost_table(models), ""]
    text += ["## Curves", "", "![curves](curves.png)", ""]
    text += [
        "## By codebook",
        "",
        "EMA weights; codebook 1 is the coarsest.",
        "",
        _codebook_table(codebooks, order),
        "",
    ]
    text += ["![codebooks](codebooks.png)", ""]
    if samples:
        text += ["## Samples", "", "From nothing, EMA weights; `sample.wav` is in each cell's folder.", ""]
        text += [line for name in samples for line in (f"![{Path(name).stem}]({name})", "")]
    (out / "report.md").write_text("\n".join(text))


_TABLE_NOTE = (
    "val_nll: true mean negative log-likelihood in nats a token, 95% bootstrap interval over held-out clips of one "
    "trained model. It holds the clips' variation, which all models share, and not that of training: overlapping "
    "intervals do not show two models to be equal. Perplexity and bits a second follow from val_nll. "
    "val_loss_smoothed is the published convention with label smoothing 0.1 and is no likelihood. unigram: the "
    "held-out clips under each codebook's training frequencies."
)
_COST_NOTE = (
    "FLOPs: forward, a column of all codebooks, at the scale's full context. tokens/s: real (unpadded) tokens of "
    "training on this machine, shared with whatever else ran; not comparable between machines or runs."
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _main_table(models: pd.DataFrame) -> str:
    head = ["model", "parameters", "val_nll raw", "val_nll EMA [95% CI]", "smoothed EMA", "perplexity EMA"]
    rows = []
    for r in models.sort_values("val_nll_ema").to_dict("records"):
        interval = f"{r['val_nll_ema']:.4f} [{r['val_nll_lo_ema']:.4f}, {r['val_nll_hi_ema']:.4f}]"
        rows.append(
            [
                str(r["model"]),
                f"{int(r['n_parameters']):,}",
                f"{r['val_nll_raw']:.4f}",
                interval,
                f"{r['val_loss_smoothed_ema']:.4f}",
                f"{r['perplexity_ema']:.1f}",
                f"{r['bits_per_second_ema']:.0f}",
                f"{r['unigram_nll']:.4f}",
            ]
        )
    return _table([*head, "bit/s of audio EMA", "unigram"], rows)


def _cost_table(models: pd.DataFrame) -> str:
    rows = [
        [
            str(r["model"]),
            f"{r['flops_per_column'] / 1e6:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{int(r['train_tokens']):,}",
            f"{int(r['grad_spikes'])}",
        ]
        for r in models.to_dict("records")
    ]
    return _table(["model", "MFLOP a column", "tokens/s", "tokens trained on", "gradient spikes"], rows)


def _codebook_table(codebooks: pd.DataFrame, order: Sequence[str]) -> str:
    wide = codebooks[codebooks["weights"] == "ema"].pivot_table(index="model", columns="codebook", values="nll")
    top1 = codebooks[codebooks["weights"] == "ema"].groupby("model")["top1"].mean()
    rows = [[name, *(f"{v:.3f}" for v in wide.loc[name]), f"{top1[name]:.1%}"] for name in dict.fromkeys(order)]
    return _table(["nll", *(str(int(k)) for k in wide.columns), "mean top-1"], rows)


def _curve_figure(curves: pd.DataFrame, order: Sequence[str], path: Path) -> None:
    shown = {"train_loss": "training loss (smoothed)", "val_nll": "held-out NLL, EMA weights"}
    with plots.style():
        figure, axes = plots.panels(1, 2, width=4.6, height=3.4, sharey=False)
        handles = []
        for axis, (metric, title) in zip(axes[0], shown.items(), strict=True):
            chosen = curves[(curves["metric"] == metric) & (curves["weights"].isna() | (curves["weights"] == "ema"))]
            lines = []
            for i, name in enumerate(order):
                points = chosen[chosen["model"] == name].sort_values("step")
                (line,) = axis.plot(
                    points["step"],
                    points["value"],
                    color=plots.PALETTE[i % len(plots.PALETTE)],
                    marker=plots.MARKERS[i % len(plots.MARKERS)],
                    linestyle="-" if i < len(plots.PALETTE) else "--",
                    label=name,
                )
                lines.append(line)
            axis.set_title(title)
            axis.set_xlabel("step")
            handles = lines
        axes[0, 0].set_ylabel("nats a token")
        plots.legend_below(figure, handles)
        plots.save(figure, path)


def _codebook_figure(codebooks: pd.DataFrame, order: Sequence[str], path: Path) -> None:
    with plots.style():
        figure, axes = plots.panels(1, 1, width=6.0, height=3.2)
        handles = []
        for i, name in enumerate(order):
            points = codebooks[(codebooks["model"] == name) & (codebooks["weights"] == "ema")].sort_values("codebook")
            (line,) = axes[0, 0].plot(
                points["codebook"],
                points["nll"],
                color=plots.PALETTE[i % len(plots.PALETTE)],
                marker=plots.MARKERS[i % len(plots.MARKERS)],
                linestyle="-" if i < len(plots.PALETTE) else "--",
                label=name,
            )
            handles.append(line)
        plots.outer_labels(axes, "codebook", "held-out NLL (nats)")
        plots.legend_below(figure, handles)
        plots.save(figure, path)
