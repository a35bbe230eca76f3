"""The report of the audio-token language models: tables with intervals, figures, and the words that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import codec_plots
from analysis.codec_contrasts import ArmResamples, arm_resamples, choose_lr
from analysis.markdown import table

# step → label-smoothed validation loss of the source study's speech hybrid, and its exponential (printed as perplexity)
PUBLISHED_SPEECH = {1_800: (4.2847, 72.58), 12_000: (3.8207, 45.63)}
PUBLISHED_LR, PUBLISHED_CLIPS = 3e-4, 666
REFERENCE = "olmo_hybrid"
REAL = "real audio"


@dataclass(frozen=True)
class Results:
    """Everything measured, a row a cell (architecture, lr, seed) or more.

    models: architecture, lr, seed, cell_key, n_parameters, flops_per_token, tokens_per_second, train_tokens,
        unigram_nll, and for W in raw and ema: val_nll_W, val_loss_smoothed_W, perplexity_W, bits_per_second_W.
    curves: architecture, lr, seed, metric, weights, group, step, value.
    codebooks: architecture, lr, seed, weights, codebook, nll, top1, top5.
    clips: architecture, lr, seed, weights, clip_id, recording_id, nll (sum), tokens.
    spikes: architecture, lr, seed, group, value (steps whose gradient norm jumped).
    gates: architecture, lr, seed, weights, clip_id, recording_id, layer, steps and the numbers of models.cache_health;
        may be empty.
    audio: embedder, architecture, clips, vectors, and frechet, kernel and coherence with _lo and _hi, frechet_limit;
        the rows REAL are training audio against held-out audio; may be empty.
    samples: architecture, and the name of a spectrogram beside the report.
    texts: of models with text conditioning, the rows of clips with the averaged weights and other texts too, told apart
        by text (right, shuffled, no_text); may be empty.
    """

    models: pd.DataFrame
    curves: pd.DataFrame
    codebooks: pd.DataFrame
    clips: pd.DataFrame
    spikes: pd.DataFrame
    gates: pd.DataFrame
    audio: pd.DataFrame
    samples: Sequence[tuple[str, str]]
    texts: pd.DataFrame = field(default_factory=pd.DataFrame)


def at(frame: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Rows of a frame (columns architecture, lr) at each architecture's chosen learning rate."""
    return frame.merge(chosen[["architecture", "lr"]], on=["architecture", "lr"])


def write_report(
    results: Results,
    out: Path,
    *,
    preset: str,
    facts: Sequence[str],
    audio_facts: Sequence[str],
    published: str = "",
    curve_clips: int = 0,
    tried: Mapping[str, Sequence[float]] | None = None,
    texts: Sequence[str] = (),
) -> pd.DataFrame:
    """Write report.md, its figures and the tables as Parquet and CSV into `out`; returns the main table.

    Args:
        facts: lines on what the numbers stand on. audio_facts: the same for distances and coherence.
        published: "" leaves the published numbers out, "same" prints them as comparable, other text as the reason
            why they are not.
        curve_clips: held-out clips that a measurement during training is taken on; 0: all.
        tried: learning rates planned for each architecture, where some of them left no cell.
        texts: lines on what a transcript is worth (`analysis.codec_text.text_section`).
    """
    out.mkdir(parents=True, exist_ok=True)
    chosen = choose_lr(results.models, tried=tried)
    arms, raw = (arm_resamples(at(results.clips[results.clips["weights"] == w], chosen)) for w in ("ema", "raw"))
    main = _main_frame(results, chosen, arms, raw)
    order = [str(name) for name in main["architecture"]]
    pairs = arms.differences()
    for name, frame in {"cells": results.models, "architectures": main, "differences": pairs}.items():
        frame.to_parquet(out / f"{name}.parquet", index=False)
        frame.to_csv(out / f"{name}.csv", index=False)
    curves = at(results.curves, chosen)
    reference = str(REFERENCE if REFERENCE in order else order[0])
    codec_plots.curve_figure(curves, order, out / "curves.png")
    codec_plots.lr_figure(results.models, chosen, order, out / "learning_rates.png")
    codec_plots.codebook_figure(at(results.codebooks, chosen), order, out / "codebooks.png")
    text = [f"# Audio-token language models: {preset}", "", *[f"- {fact}" for fact in facts], ""]
    text += ["## Held-out likelihood at matched size", "", _TABLE_NOTE, "", _main_table(main), ""]
    text += [*texts, *_lr_section(chosen)]
    if len(order) > 1:
        codec_plots.difference_figure(pairs, reference, out / "differences.png")
        text += ["## Differences", "", _difference_note(arms), "", _pair_table(pairs, order), ""]
        text += [f"![differences to {reference}](differences.png)", ""]
    text += _published_section(results, chosen, published, curve_clips)
    text += ["## Cost", "", _COST_NOTE, "", _cost_table(main), ""]
    text += ["## Curves", "", _CURVE_NOTE, "", "![curves](curves.png)", ""]
    text += ["## By codebook", "", "EMA weights; codebook 1 is the coarsest.", ""]
    text += [_codebook_table(at(results.codebooks, chosen), order), "", "![codebooks](codebooks.png)", ""]
    if len(results.audio):
        by_embedder = dict(list(results.audio.groupby("embedder", sort=False)))
        codec_plots.audio_figure(next(iter(by_embedder.values())), order, out / "audio.png")
        text += ["## Generated audio", "", *[f"- {fact}" for fact in audio_facts], ""]
        for embedder, some in by_embedder.items():
            text += [f"Embedder: {embedder!s}.", "", _audio_table(some, order), ""]
        text += ["![audio](audio.png)", ""]
    if codec_plots.gradient_figure(curves, order, out / "gradients.png"):
        text += ["## Gradients", "", _GRADIENT_NOTE, "", _spike_table(at(results.spikes, chosen), order), ""]
        text += ["![gradient norms by parameter group](gradients.png)", ""]
    if len(results.gates):
        text += ["## Memory caches", "", _GATE_NOTE, "", _gate_table(at(results.gates, chosen)), ""]
    if results.samples:
        given = ", models with text given one of a held-out clip (in the .txt files)" if len(results.texts) else ""
        text += ["## Samples", "", f"From nothing{given}, EMA weights; the WAV files lie beside this page.", ""]
        text += [line for name, file in results.samples for line in (f"![{name}]({file})", "")]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    return main


_TABLE_NOTE = (
    "val_nll: true mean negative log-likelihood in nats a token, with a 95% bootstrap interval over held-out "
    "clips and, "
    "where there are several, seeds. The clips' variation is shared by all models: overlapping intervals do "
    "not show two "
    "models to be equal; the differences below do. Perplexity and bits a second follow from val_nll. "
    "val_loss_smoothed is the published convention with label smoothing 0.1 and is no likelihood. unigram: the same "
    "clips under each codebook's training frequencies."
)
_COST_NOTE = (
    "FLOPs: forward, a token of one codebook, at the scale's full context. tokens/s: real (unpadded) tokens of "
    "training "
    "on this machine, shared with whatever else ran; not comparable between machines or runs. GFLOP/s: three times the "
    "forward FLOPs at that rate."
)
_CURVE_NOTE = "Mean over seeds; bands: 95% over held-out clips, which all models share."
_GRADIENT_NOTE = (
    "Norm before clipping, by parameter group, at the evaluated steps (mean over seeds). Spikes: steps whose "
    "whole norm "
    "exceeded five times its running mean, laid to the group that grew most; sums over seeds."
)
_GATE_NOTE = (
    "EMA weights, means over the tokens of held-out clips that see a cache. openness: sigmoid of the gate's "
    "bias; cache "
    "mass: softmax weight on caches; effective mass: their product, the weight of caches in the layer's "
    "output; entropy: "
    "as a share of the uniform choice's; read ratio: size of what the gate would let in, over the layer's own output."
)


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """`value [low, high]`, or `–` where there is none."""
    if not np.isfinite(value):
        return "–"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else ""
    return f"{value:.{digits}f}{ends}"


def _main_frame(results: Results, chosen: pd.DataFrame, arms: ArmResamples, raw: ArmResamples) -> pd.DataFrame:
    """A row an architecture, best first: means over seeds of the chosen models' numbers, and intervals."""
    numbers = at(results.models, chosen).groupby("architecture", sort=False).mean(numeric_only=True)
    numbers = numbers.drop(columns=["lr", "seed", "val_nll_ema", "val_nll_raw"])
    raw_columns = raw.table().rename(columns={"val_nll": "val_nll_raw", "lo": "raw_lo", "hi": "raw_hi"})
    frame = arms.table().merge(raw_columns.drop(columns="n_seeds"), on="architecture")
    frame = frame.merge(chosen[["architecture", "lr", "edge"]], on="architecture")
    return frame.merge(numbers.reset_index(), on="architecture")


def _main_table(main: pd.DataFrame) -> str:
    head = ["architecture", "parameters", "best lr", "seeds", "val_nll EMA [95% CI]", "val_nll raw", "smoothed EMA"]
    rows = [
        [
            str(r["architecture"]),
            f"{int(r['n_parameters']):,}",
            f"{r['lr']:g}" + ("*" if r["edge"] else ""),
            str(r["n_seeds"]),
            interval(r["val_nll"], r["lo"], r["hi"], 4),
            f"{r['val_nll_raw']:.4f}",
            f"{r['val_loss_smoothed_ema']:.4f}",
            f"{r['perplexity_ema']:.1f}",
            f"{r['bits_per_second_ema']:.0f}",
            f"{r['unigram_nll'] - r['val_nll']:.3f}",
        ]
        for r in main.to_dict("records")
    ]
    return table([*head, "perplexity EMA", "bit/s of audio EMA", "nats below unigram"], rows)


def _lr_section(chosen: pd.DataFrame) -> list[str]:
    edges = chosen[chosen["edge"].isin(["lowest", "highest"])]
    grids: dict[tuple[float, ...], list[str]] = {}
    for name, grid in zip(chosen["architecture"], chosen["lr_tried"], strict=True):
        grids.setdefault(grid, []).append(str(name))
    lines = ["## Learning rates", ""]
    for grid, names in grids.items():
        whom = "every architecture" if len(grids) == 1 else ", ".join(names)
        lines.append(f"Tried for {whom}: {', '.join(f'{x:g}' for x in grid)}.")
    lines += [
        "Each architecture is shown at the rate of lowest held-out NLL over its seeds, chosen on the clips of "
        "the table: "
        "all numbers are a little too low, the same way for all.",
    ]
    single = chosen.loc[chosen["edge"] == "only one", "architecture"].tolist()
    if single:
        lines += ["", f"**One learning rate only, not tuned and perhaps handicapped by it: {', '.join(single)}.**"]
    if len(edges):
        named = ", ".join(f"{name} ({edge})" for name, edge in zip(edges["architecture"], edges["edge"], strict=True))
        lines += [
            "",
            f"**Warning: the best learning rate lies at the grid's edge (\\* above) for {named}: a better one may lie "
            "outside. Extend the grid with --set lr=...; only new cells run.**",
        ]
    return [*lines, "", "![learning rates](learning_rates.png)", ""]


def _difference_note(arms: ArmResamples) -> str:
    seeds = sorted(set(arms.n_seeds_A))
    level = (
        "over clips only: one seed an architecture, so that the noise of training is in none of these intervals"
        if seeds == [1]
        else f"over clips (drawn once for both models) and seeds ({'/'.join(map(str, seeds))} an architecture)"
    )
    return (
        f"Row minus column, val_nll of EMA weights in nats a token on the same {arms.n_clips} held-out clips, 95% "
        f"interval resampled {level}. \\*: p < 0.05 after Holm's correction over all {len(arms.names)} architectures' "
        "pairs."
    )


def _pair_table(pairs: pd.DataFrame, order: Sequence[str]) -> str:
    """Each pair once: the worse architecture's row, the better one's column."""
    found = {(r["b"], r["a"]): r for r in pairs.to_dict("records")}
    rows = []
    for i, worse in enumerate(order[1:], start=1):
        cells = []
        for better in order[:i]:
            r = found[worse, better]
            cells.append(interval(r["difference"], r["lo"], r["hi"]) + ("\\*" if r["p_holm"] < 0.05 else ""))
        rows.append([worse, *cells, *[""] * (len(order) - 1 - i)])
    return table(["minus →", *order[:-1]], rows)


def _published_section(results: Results, chosen: pd.DataFrame, published: str, curve_clips: int) -> list[str]:
    """The reference at the published learning rate where it was trained with it, otherwise at its own best one."""
    if not published or REFERENCE not in set(results.models["architecture"]):
        return []
    models = results.models[results.models["architecture"] == REFERENCE]
    lr = PUBLISHED_LR if (models["lr"] == PUBLISHED_LR).any() else at(models, chosen)["lr"].iloc[0]

    def of(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[(frame["architecture"] == REFERENCE) & (frame["lr"] == lr)]

    curve = of(results.curves[results.curves["metric"] == "val_loss_smoothed"])
    n_final, last = of(results.clips)["clip_id"].nunique(), curve["step"].max()
    n_curve = min(curve_clips or n_final, n_final)
    rows = []
    for step, (loss, exponential) in PUBLISHED_SPEECH.items():
        here = curve[curve["step"] == step].groupby("weights")["value"].mean().to_dict()
        if step == last:  # measured once more after training, on every clip
            here = {w: of(models)[f"val_loss_smoothed_{w}"].mean() for w in ("raw", "ema")}
        mine = [f"{here[w]:.4f} / {np.exp(here[w]):.2f}" if w in here else "–" for w in ("raw", "ema")]
        clips = str(n_final if step == last else n_curve) if here else "–"
        rows.append([f"{step:,}", f"{loss:.4f} / {exponential:.2f}", *mine, clips])
    note = (
        f"Label-smoothed validation loss and its exponential (published as perplexity, which it is not), "
        f"{REFERENCE} at lr {lr:g} (published: {PUBLISHED_LR:g}), on as many held-out clips as the last column says "
        f"(published: {PUBLISHED_CLIPS})." + ("" if published == "same" else f" **Not comparable: {published}.**")
    )
    return [
        "## Beside the published run",
        "",
        note,
        "",
        table(["step", "published", "here, raw", "here, EMA", "clips"], rows),
        "",
    ]


def _cost_table(main: pd.DataFrame) -> str:
    rows = [
        [
            str(r["architecture"]),
            f"{r['flops_per_token'] / 1e6:.3f}",
            f"{r['tokens_per_second']:.0f}",
            f"{3 * r['flops_per_token'] * r['tokens_per_second'] / 1e9:.2f}",
            f"{int(r['train_tokens']):,}",
        ]
        for r in main.to_dict("records")
    ]
    return table(["architecture", "MFLOP a token", "tokens/s", "GFLOP/s", "tokens trained on"], rows)


def _codebook_table(codebooks: pd.DataFrame, order: Sequence[str]) -> str:
    ema = codebooks[codebooks["weights"] == "ema"]
    wide = ema.pivot_table(index="architecture", columns="codebook", values="nll")
    accuracy = ema.groupby("architecture")[["top1", "top5"]].mean()
    rows = [
        [name, *(f"{v:.3f}" for v in wide.loc[name]), *(f"{v:.1%}" for v in accuracy.loc[name].to_numpy(float))]
        for name in order
    ]
    return table(["nll", *(str(int(k)) for k in wide.columns), "mean top-1", "mean top-5"], rows)


def _audio_table(audio: pd.DataFrame, order: Sequence[str]) -> str:
    by_name = {r["architecture"]: r for r in audio.to_dict("records")}
    rows = []
    for name in [REAL, *order]:
        r = by_name[name]
        rows.append(
            [
                name,
                f"{int(r['vectors'])} / {int(r['clips'])}",
                interval(r["frechet"], r["frechet_lo"], r["frechet_hi"], 1),
                f"{r['frechet_limit']:.1f}" if np.isfinite(r["frechet_limit"]) else "–",
                interval(r["kernel"], r["kernel_lo"], r["kernel_hi"]),
                interval(r["coherence"], r["coherence_lo"], r["coherence_hi"]),
            ]
        )
    head = ["architecture", "N vectors / clips", "Fréchet [95% CI]", "Fréchet at infinite N", "kernel [95% CI]"]
    return table([*head, "coherence [95% CI]"], rows)


def _spike_table(spikes: pd.DataFrame, order: Sequence[str]) -> str:
    if spikes.empty:
        return "No step had a gradient spike."
    total = {place: float(some["value"].sum()) for place, some in spikes.groupby(["architecture", "group"])}
    groups = sorted({str(group) for _, group in total})
    rows = [[name, *(f"{total.get((name, g), 0):.0f}" for g in groups)] for name in order]
    return table(["spikes", *groups], rows)


def _gate_table(gates: pd.DataFrame) -> str:
    """A row an architecture and layer: means weighted by tokens, and the gate's bias at the start."""
    names = ["openness", "cache_mass", "effective_mass", "entropy_share", "read_ratio"]
    seen = gates[gates["steps"] > 0]
    rows = []
    for (architecture, layer), some in seen.groupby(["architecture", "layer"]):
        ema, start = some[some["weights"] == "ema"], some[some["weights"] == "start"]
        means = [float(np.average(ema[n], weights=ema["steps"])) for n in names]
        biases = " → ".join(f"{part['gate_bias'].mean():.3f}" for part in (start, ema))
        rows.append([str(architecture), str(layer), biases, *(f"{m:.3f}" for m in means)])
    if not rows:
        return "No held-out clip is longer than a segment: no cache was read."
    return table(["architecture", "layer", "gate bias, start → end", *(n.replace("_", " ") for n in names)], rows)
