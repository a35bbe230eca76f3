"""The report of the audio-token language models: tables with intervals, figures, and the words that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.codec import plots
from analysis.codec.contrasts import Arms, arm_resamples, choose_lr
from analysis.codec.published import REFERENCE, Published, published_section
from analysis.codec.results import Results, at
from analysis.crossed import NEEDS_SEEDS
from analysis.markdown import table
from analysis.multiplicity import ALPHA

REAL = "real audio"
_LISTED = 3  # architectures that the findings name with their numbers, from the best on


def write_report(
    results: Results,
    out: Path,
    *,
    preset: str,
    facts: Sequence[str],
    audio_facts: Sequence[str],
    published: Published | None = None,
    tried: Mapping[str, Sequence[float]] | None = None,
    texts: Sequence[str] = (),
) -> tuple[pd.DataFrame, list[str]]:
    """Write report.md, its figures and the tables as Parquet and CSV into `out`.

    Returns the main table and the findings in sentences.

    Args:
        facts: lines on what the numbers stand on. audio_facts: the same for distances and coherence.
        published: which published numbers are printed with ours, if any, and why they do not compare.
        tried: learning rates planned for each architecture, where some of them left no cell.
        texts: lines on what a transcript is worth (`analysis.codec.texts.text_section`).
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
    plots.lr_figure(results.models, chosen, order, out / "learning_rates.png")
    findings = glance(main, pairs)
    text = [f"# Audio-token language models: {preset}", "", *[f"- {fact}" for fact in facts], ""]
    text += ["## At a glance", "", *[f"- {line}" for line in findings], ""]
    text += ["## Held-out likelihood at matched size", "", _TABLE_NOTE, "", _main_table(main), ""]
    text += [*texts, *_lr_section(chosen), *_difference_section(arms, order, out)]
    text += published_section(results, chosen, published) if published else []
    text += ["## Cost", "", _COST_NOTE, "", _cost_table(main), ""]
    text += _curve_section(at(results.curves, chosen), order, out)
    text += _codebook_section(at(results.codebooks, chosen), order, out)
    text += _audio_section(results, order, audio_facts, out)
    text += _gradient_section(results, chosen, order, out)
    if len(results.gates):
        text += ["## Memory caches", "", _GATE_NOTE, "", _gate_table(at(results.gates, chosen)), ""]
    text += _sample_section(results)
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    return main, findings


def glance(main: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """The findings in sentences: the order of the architectures, which of them differ, what they must beat.

    main: what `write_report` returns; pairs: of `Arms.differences`.
    """
    rows = main.to_dict("records")
    named = [f"{r['architecture']} {interval(r['val_nll'], r['lo'], r['hi'], 4)}" for r in rows]
    listed = ", ".join(named[:_LISTED]) + (f", …, {named[-1]}" if len(named) > _LISTED else "")
    what = "held-out NLL in nats per token, averaged weights"
    lines = [f"{what}{', lowest first' if len(rows) > 1 else ''}: {listed}; unigram {rows[0]['unigram_nll']:.4f}."]
    lines += _differing(str(rows[0]["architecture"]), pairs)
    if edges := [f"{r['architecture']} (the {r['edge']})" for r in rows if r["edge"] in ("lowest", "highest")]:
        lines.append(f"The learning rate chosen lies at the edge of those tried for {', '.join(edges)}.")
    return lines


def _differing(best: str, pairs: pd.DataFrame) -> list[str]:
    """Which pairs differ by their tests; why none was tested."""
    if pairs.empty:
        return []
    tested = pairs[pairs["p_holm"].notna()]
    untested = pairs.loc[pairs["p_holm"].isna(), "needs"]
    lines = []
    if len(tested):
        beaten = tested.loc[(tested["a"] == best) & (tested["p_holm"] < ALPHA), "b"].tolist()
        count = int((tested["p_holm"] < ALPHA).sum())
        lines.append(
            f"{count} of {len(tested)} pairs differ (p < {ALPHA:g} after Holm); {best} is lower than "
            f"{', '.join(beaten) or 'none of the others'} by these tests."
        )
    for needs, n in untested.value_counts().items():
        lines.append(f"{n} of {len(pairs)} differences not tested ({needs}); their order is no finding.")
    return lines


def _difference_section(arms: Arms, order: Sequence[str], out: Path) -> list[str]:
    """All pairs with their tests; nothing for one architecture alone."""
    if len(order) < 2:
        return []
    pairs = arms.differences()
    reference = str(REFERENCE if REFERENCE in order else order[0])
    plots.difference_figure(pairs, reference, out / "differences.png")
    text = ["## Differences", "", _difference_note(arms), "", *_seed_note(arms), _pair_table(pairs, order), ""]
    return [*text, f"![differences to {reference}](differences.png)", ""]


def _curve_section(curves: pd.DataFrame, order: Sequence[str], out: Path) -> list[str]:
    plots.curve_figure(curves, order, out / "curves.png")
    return ["## Curves", "", _CURVE_NOTE, "", "![curves](curves.png)", ""]


def _codebook_section(codebooks: pd.DataFrame, order: Sequence[str], out: Path) -> list[str]:
    plots.codebook_figure(codebooks, order, out / "codebooks.png")
    text = ["## By codebook", "", "EMA weights; codebook 1 is the coarsest.", ""]
    return [*text, _codebook_table(codebooks, order), "", "![codebooks](codebooks.png)", ""]


def _audio_section(results: Results, order: Sequence[str], facts: Sequence[str], out: Path) -> list[str]:
    """Distances and coherence of generated audio, a table per embedder."""
    if not len(results.audio):
        return []
    by_embedder = dict(list(results.audio.groupby("embedder", sort=False)))
    plots.audio_figure(next(iter(by_embedder.values())), order, out / "audio.png")
    text = ["## Generated audio", "", *[f"- {fact}" for fact in facts], ""]
    for embedder, some in by_embedder.items():
        text += [f"Embedder: {embedder!s}.", "", _audio_table(some, order), ""]
    return [*text, "![audio](audio.png)", ""]


def _gradient_section(results: Results, chosen: pd.DataFrame, order: Sequence[str], out: Path) -> list[str]:
    if not plots.gradient_figure(at(results.curves, chosen), order, out / "gradients.png"):
        return []
    text = ["## Gradients", "", _GRADIENT_NOTE, "", _spike_table(at(results.spikes, chosen), order), ""]
    return [*text, "![gradient norms by parameter group](gradients.png)", ""]


def _sample_section(results: Results) -> list[str]:
    if not results.samples:
        return []
    given = ", models with text given one of a held-out clip (in the .txt files)" if len(results.texts) else ""
    text = [
        "## Samples",
        "",
        f"From nothing{given}, EMA weights; the WAV files lie in the same folder as this page.",
        "",
    ]
    return [*text, *(line for name, file in results.samples for line in (f"![{name}]({file})", ""))]


_TABLE_NOTE = (
    "val_nll: true mean negative log-likelihood, nats per token. Its 95% interval holds for other held-out recordings "
    "and, where there are two seeds or more, other seeds; with one seed it speaks of the trained model at hand. The "
    "recordings' variation is shared by all models: overlapping intervals do not show two models to be equal; the "
    "differences below do not contain it. seed sd: val_nll over seeds. Perplexity and bits per second follow from "
    "val_nll. val_loss_smoothed is the published convention with label smoothing 0.1 and is no likelihood. unigram: "
    "the same clips under each codebook's training frequencies."
)
_COST_NOTE = (
    "FLOPs: forward, a token of one codebook, at the scale's full context. tokens/s: real (unpadded) tokens of "
    "training "
    "on this machine, shared with whatever else ran; not comparable between machines or runs. GFLOP/s: three times the "
    "forward FLOPs at that rate."
)
_CURVE_NOTE = (
    "Mean over seeds; bands: 95% for these trained models on other recordings (which all models share); "
    "they say nothing about other seeds."
)
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


def _main_frame(results: Results, chosen: pd.DataFrame, arms: Arms, raw: Arms) -> pd.DataFrame:
    """One row per architecture, best first: means over seeds of the chosen models' numbers, and intervals."""
    numbers = at(results.models, chosen).groupby("architecture", sort=False).mean(numeric_only=True)
    numbers = numbers.drop(columns=["lr", "seed", "val_nll_ema", "val_nll_raw"])
    raw_columns = raw.table().rename(columns={"val_nll": "val_nll_raw", "lo": "raw_lo", "hi": "raw_hi"})
    frame = arms.table().merge(raw_columns.drop(columns=["n_seeds", "seed_sd", "needs"]), on="architecture")
    frame = frame.merge(chosen[["architecture", "lr", "edge"]], on="architecture")
    return frame.merge(numbers.reset_index(), on="architecture")


def _main_table(main: pd.DataFrame) -> str:
    head = ["architecture", "parameters", "best lr", "seeds", "val_nll EMA [95% CI]", "seed sd"]
    rows = [
        [
            str(r["architecture"]),
            f"{int(r['n_parameters']):,}",
            f"{r['lr']:g}" + ("*" if r["edge"] else ""),
            str(r["n_seeds"]),
            interval(r["val_nll"], r["lo"], r["hi"], 4),
            f"{r['seed_sd']:.4f}" if np.isfinite(r["seed_sd"]) else "–",
            f"{r['val_nll_raw']:.4f}",
            f"{r['val_loss_smoothed_ema']:.4f}",
            f"{r['perplexity_ema']:.1f}",
            f"{r['bits_per_second_ema']:.0f}",
            f"{r['unigram_nll'] - r['val_nll']:.3f}",
        ]
        for r in main.to_dict("records")
    ]
    head += ["val_nll raw", "smoothed EMA"]
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


def _difference_note(arms: Arms) -> str:
    seeds = "/".join(map(str, sorted(set(arms.n_seeds))))
    note = (
        f"Row minus column, val_nll of EMA weights in nats per token on the same {arms.n_units} held-out {arms.units}, "
        f"{seeds} {'seed' if seeds == '1' else 'seeds'} an architecture. "
    )
    if max(arms.n_seeds) < 2:
        return note + (
            f"**No intervals and no tests: {NEEDS_SEEDS}.** Two models trained once each differ by the noise of "
            "training, too, and nothing here tells how large that is."
        )
    unequal = f" [–]: {NEEDS_SEEDS}, of both." if min(arms.n_seeds) < 2 else ""
    return note + (
        "95% interval for other seeds and other recordings; the noise of training is pooled over the architectures "
        f"({arms.crossed.seed_df} degrees of freedom). \\*: p < 0.05 after Holm's correction over all pairs that were "
        f"tested.{unequal}"
    )


def _seed_note(arms: Arms) -> list[str]:
    """Says so where one architecture's seeds differ too much for a pooled variance."""
    found = arms.odd_seeds()
    if found is None:
        return []
    name, own, others, p = found
    return [
        f"**The seeds of {name} differ by a standard deviation of {own:.4f}, those of the others by {others:.4f} "
        f"(p = {p:.2g}): the pooled one is too small for its differences and too large for the others', and stars of "
        f"{name} are too frequent.**",
        "",
    ]


def _pair_table(pairs: pd.DataFrame, order: Sequence[str]) -> str:
    """Each pair once: the worse architecture's row, the better one's column."""
    found = {(r["b"], r["a"]): r for r in pairs.to_dict("records")}
    rows = []
    for i, worse in enumerate(order[1:], start=1):
        cells = []
        for better in order[:i]:
            r = found[worse, better]
            ends = interval(r["difference"], r["lo"], r["hi"]) if np.isfinite(r["lo"]) else f"{r['difference']:.3f} [–]"
            cells.append(ends + ("\\*" if r["p_holm"] < ALPHA else ""))
        rows.append([worse, *cells, *[""] * (len(order) - 1 - i)])
    return table(["minus →", *order[:-1]], rows)


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
                f"{r['frechet']:.1f}" if np.isfinite(r["frechet"]) else "–",
                interval(r["frechet_limit"], r["frechet_lo"], r["frechet_hi"], 1),
                f"{r['kernel']:.3f}" if np.isfinite(r["kernel"]) else "–",
                interval(r["coherence"], r["coherence_lo"], r["coherence_hi"]),
            ]
        )
    head = ["architecture", "N vectors / clips", "Fréchet", "Fréchet at infinite N [95% CI]", "kernel"]
    return table([*head, "coherence [95% CI]"], rows)


def _spike_table(spikes: pd.DataFrame, order: Sequence[str]) -> str:
    if spikes.empty:
        return "No step had a gradient spike."
    total = {place: float(some["value"].sum()) for place, some in spikes.groupby(["architecture", "group"])}
    groups = sorted({str(group) for _, group in total})
    rows = [[name, *(f"{total.get((name, g), 0):.0f}" for g in groups)] for name in order]
    return table(["spikes", *groups], rows)


def _gate_table(gates: pd.DataFrame) -> str:
    """One row per architecture and layer: means weighted by tokens, and the gate's bias at the start."""
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
