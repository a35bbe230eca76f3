"""Figures of the audio-token language models: spectrograms, curves, codebooks, differences, gradients.

Shape suffixes: N samples.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.ticker import MaxNLocator

from analysis import plots

_WINDOW_S = 0.032
_FLOOR_DB = -80.0


def spectrogram_png(waves: Mapping[str, npt.ArrayLike], sample_rate: int) -> bytes:
    """A PNG with one spectrogram (dB under the loudest bin, kHz over s) a wave_N, titled by its name.

    Raises ValueError for a wave shorter than one 32 ms window.
    """
    n_fft = 2 ** round(math.log2(_WINDOW_S * sample_rate))
    with plots.style():
        figure, axes = plots.panels(len(waves), 1, width=7.0, height=1.9, sharex=False)
        for axis, (title, wave) in zip(axes[:, 0], waves.items(), strict=True):
            wave_N = np.asarray(wave, dtype=np.float64)
            if len(wave_N) < n_fft:
                raise ValueError(f"{title}: {len(wave_N)} samples are shorter than one window of {n_fft}")
            frames = np.lib.stride_tricks.sliding_window_view(wave_N, n_fft)[:: n_fft // 4] * np.hanning(n_fft)
            power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
            decibels = 10 * np.log10(np.maximum(power / max(power.max(), 1e-20), 10 ** (_FLOOR_DB / 10)))
            extent = (0.0, len(wave_N) / sample_rate, 0.0, sample_rate / 2000)
            axis.imshow(decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=_FLOOR_DB, vmax=0)
            axis.set_title(title)
            axis.set_ylabel("kHz")
            axis.grid(False)
        axes[-1, 0].set_xlabel("s")
        sink = io.BytesIO()
        figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _look(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of series i: dashed once the palette is used up."""
    n = len(plots.PALETTE)
    marker = plots.MARKERS[i % len(plots.MARKERS)]
    return {"color": plots.PALETTE[i % n], "marker": marker, "linestyle": "-" if i < n else "--"}


def _mean_line(rows: pd.DataFrame, x: str, y: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Sorted distinct values of column x and the mean of column y (over seeds) at each."""
    line = rows.groupby(x)[y].mean().sort_index()
    return np.asarray(line.index), line.to_numpy(float)


def curve_figure(curves: pd.DataFrame, order: Sequence[str], path: Path) -> None:
    """Training loss, and held-out NLL of the averaged weights with its 95% band over clips, against the step.

    curves: columns architecture, metric (train_loss, val_nll, val_nll_lo, val_nll_hi), weights, step, value, one row a
    seed; lines and bands are means over seeds. One colour an architecture, in `order`.
    """
    shown = {"train_loss": "training loss (label-smoothed)", "val_nll": "held-out NLL, EMA weights"}
    chosen = curves[curves["weights"].isna() | (curves["weights"] == "ema")]
    with plots.style():
        figure, axes = plots.panels(1, 2, width=4.6, height=3.6, sharey=False)
        handles: list[Any] = []
        for axis, (metric, title) in zip(axes[0], shown.items(), strict=True):
            handles = []
            for i, name in enumerate(order):
                some = chosen[chosen["architecture"] == name]
                steps, values = _mean_line(some[some["metric"] == metric], "step", "value")
                handles += axis.plot(steps, values, label=name, **_look(i))
                if metric == "val_nll":
                    ends = [
                        _mean_line(some[some["metric"] == f"val_nll_{e}"], "step", "value")[1] for e in ("lo", "hi")
                    ]
                    axis.fill_between(steps, *ends, color=_look(i)["color"], alpha=0.07, linewidth=0)
            axis.set_title(title)
            axis.set_xlabel("step")
        axes[0, 0].set_ylabel("nats per token")
        plots.legend_below(figure, handles)
        plots.save(figure, path)


def lr_figure(models: pd.DataFrame, chosen: pd.DataFrame, order: Sequence[str], path: Path) -> None:
    """Held-out NLL against the learning rate; one panel per architecture, one dot per seed, a ring at the choice.

    models: columns architecture, lr, seed, val_nll_ema. chosen: architecture, lr.
    """
    best = dict(zip(chosen["architecture"], chosen["lr"], strict=True))
    rates = sorted(models["lr"].unique())
    with plots.style():
        figure, axes = plots.panel_each(len(order), 5, width=2.0, height=1.9)
        for axis, name in zip(axes.flat, order, strict=False):
            some = models[models["architecture"] == name]
            lrs, means = _mean_line(some, "lr", "val_nll_ema")
            axis.plot(lrs, means, color=plots.PALETTE[0])
            axis.plot(some["lr"], some["val_nll_ema"], color=plots.PALETTE[0], linestyle="none", marker="o")
            axis.plot([best[name]], means[lrs == best[name]], "o", ms=12, mfc="none", mec=plots.PALETTE[1], mew=1.6)
            axis.set_title(name)
            plots.log_ticks(axis, rates)
            axis.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
            axis.xaxis.set_tick_params(labelbottom=True)
        plots.outer_labels(axes, "learning rate", "held-out NLL")
        plots.save(figure, path)


def difference_figure(differences: pd.DataFrame, reference: str, path: Path) -> None:
    """val_nll of each architecture minus the reference's, with 95% intervals; filled where Holm leaves p < 0.05.

    differences: the table of `ArmResamples.differences`.
    """
    one = differences[(differences["a"] == reference) | (differences["b"] == reference)]
    sign = np.where(one["a"] == reference, 1.0, -1.0)
    rows = sorted(
        zip(
            np.where(one["a"] == reference, one["b"], one["a"]),
            sign * one["difference"],
            np.where(sign > 0, one["lo"], -one["hi"]),
            np.where(sign > 0, one["hi"], -one["lo"]),
            one["p_holm"] < 0.05,
            strict=True,
        ),
        key=lambda row: -row[1],
    )
    with plots.style():
        figure, axes = plots.panels(1, 1, width=6.2, height=0.34 * len(rows) + 0.7)
        axis = axes[0, 0]
        for y, (_, value, low, high, sure) in enumerate(rows):
            axis.errorbar(
                value,
                y,
                xerr=plots.error_lengths([value], [low], [high]),
                fmt="o",
                color=plots.PALETTE[0],
                mfc=plots.PALETTE[0] if sure else "white",
            )
        axis.axvline(0, color=plots.GREY, linewidth=1)
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlabel(f"held-out NLL minus that of {reference} (nats per token); left is better")
        plots.save(figure, path)


def codebook_figure(codebooks: pd.DataFrame, order: Sequence[str], path: Path) -> None:
    """NLL, top-1 and top-5 accuracy by codebook, EMA weights, means over seeds.

    codebooks: columns architecture, weights, codebook, nll, top1, top5, one row per seed.
    """
    shown = {"nll": "held-out NLL (nats)", "top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)"}
    ema = codebooks[codebooks["weights"] == "ema"]
    with plots.style():
        figure, axes = plots.panels(1, 3, width=3.3, height=3.2, sharey=False)
        handles: list[Any] = []
        for axis, (metric, title) in zip(axes[0], shown.items(), strict=True):
            handles = []
            for i, name in enumerate(order):
                books, values = _mean_line(ema[ema["architecture"] == name], "codebook", metric)
                handles += axis.plot(books, values * (1 if metric == "nll" else 100), label=name, **_look(i))
            axis.set_title(title)
            axis.set_xlabel("codebook")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        plots.legend_below(figure, handles)
        plots.save(figure, path)


def gradient_figure(curves: pd.DataFrame, order: Sequence[str], path: Path) -> bool:
    """Gradient norm (before clipping) of each parameter group against the step, one panel per architecture, log scale.

    curves: columns architecture, metric, group, step, value. Returns False, and writes nothing, without such rows.
    """
    rows = curves[(curves["metric"] == "grad_norm") & curves["group"].notna()]
    if rows.empty:
        return False
    groups = sorted(rows["group"].unique())
    with plots.style():
        figure, axes = plots.panel_each(len(order), 3, width=3.2, height=2.2)
        handles: dict[str, Any] = {}
        for axis, name in zip(axes.flat, order, strict=False):
            for i, group in enumerate(groups):
                some = rows[(rows["architecture"] == name) & (rows["group"] == group)]
                if len(some):
                    (handles[group],) = axis.plot(*_mean_line(some, "step", "value"), label=group, **_look(i))
            axis.set_yscale("log")
            axis.set_title(name)
        plots.outer_labels(axes, "step", "gradient norm")
        plots.legend_below(figure, [handles[g] for g in groups])
        plots.save(figure, path)
    return True


def audio_figure(audio: pd.DataFrame, order: Sequence[str], path: Path) -> None:
    """Fréchet distance and coherence of each model's samples with 95% intervals; real audio as a line with its band.

    audio: one row per architecture and one named "real audio", columns architecture, frechet_limit, frechet_lo,
    frechet_hi, coherence, coherence_lo, coherence_hi (NaN: not measured).
    """
    shown = {"frechet": "Fréchet distance to held-out audio (at infinite N)", "coherence": "long-range coherence"}
    table = audio.set_index("architecture")
    names = list(reversed(order))
    with plots.style():
        figure, axes = plots.panels(1, 2, width=3.9, height=0.32 * len(order) + 0.8, sharex=False)
        for axis, (metric, title) in zip(axes[0], shown.items(), strict=True):
            columns = ["frechet_limit" if metric == "frechet" else metric, f"{metric}_lo", f"{metric}_hi"]
            value, low, high = table.loc[names, columns].to_numpy(float).T
            lengths = plots.error_lengths(value, low, high)
            axis.errorbar(value, range(len(names)), xerr=lengths, fmt="o", color=plots.PALETTE[0], label="samples")
            real = table.loc["real audio"]
            axis.axvline(real[columns[0]], color=plots.PALETTE[1], label="real audio")
            axis.axvspan(real[f"{metric}_lo"], real[f"{metric}_hi"], color=plots.PALETTE[1], alpha=0.12, linewidth=0)
            axis.set_title(title)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(-0.6, len(names) - 0.4)
        plots.legend_below(figure, axes[0, 0].get_legend_handles_labels()[0])
        plots.save(figure, path)
