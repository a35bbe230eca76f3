"""The report of the memory-caching study: what moves the gate, what caches are worth, how they are used."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.caching import plots as figures
from analysis.caching.effects import GATE_WORDS, MORE_WORDS, NO_EVIDENCE, WORTH_WORDS
from analysis.markdown import table

_GATE_NOTE = (
    "Openness is sigmoid(b), averaged over the layers with caches and, after training, of the averaged weights. "
    "`moved`: its change in training. `against base`: moved less the base setting's, over the layers that cache in "
    "both, paired by seed; opens or closes where its p, adjusted by Holm over all variants, is below 0.05. Intervals "
    "are t intervals over seeds. `reach`: sigmoid(b + sum of the learning rates), what the openness can become if "
    "every step agrees, as Adam moves a scalar by about the learning rate a step."
)
_WORTH_NOTE = (
    "val_nll(MC) - val_nll(control), nats per token, averaged weights: below 0, caches help. The control has the same "
    "size, data, learning rate, seed, batches and held-out clips, no caches, and an MLP widened until its parameters "
    "match the base setting of that size. 95% intervals hold for other seeds and held-out recordings. `against "
    "base`: what the change adds to the difference; below 0, caching is worth more than in the base setting. Verdicts "
    "by p < 0.05, adjusted by Holm over the settings; small effects need five seeds or more."
)
_USE_NOTE = (
    "Held-out clips, tokens that see at least one cache, mean over layers, seeds and clips. mass: share of the softmax "
    "gate on caches rather than on the current segment. entropy: of that gate, over its maximum. read ratio: root mean "
    "square of what a fully open gate would add to the layer's read, over that of the read itself. contribution: "
    "openness times read ratio, so what the caches do add; far above 1 the layer is all caches however shut its gate "
    "looks. spikes: steps a run whose gradient norm was five times its running mean, and those of them laid to W_u and "
    "b. gradient: share of the squared gradient norm in W_u and b."
)
_PLANTED_NOTE = (
    "Here the answer stands in a segment long past, so caching is needed: if the gate could not open and caching could "
    "not help here, a shut gate elsewhere would say nothing. 2 of a clip's 52 tokens are answers, and val_nll is over "
    "all of them."
)


def write_report(
    effects: pd.DataFrame,
    layers: pd.DataFrame,
    curves: pd.DataFrame,
    out: Path,
    *,
    preset: str,
    facts: Sequence[str],
) -> list[str]:
    """Write report.md, cells.parquet, cells.csv, effects.csv and the figures into `out`; returns the headline lines.

    Args:
        effects: from `memory_cache_effects.effects`, with the facts n_parameters, control_parameters, val_nll,
            control_val_nll, reach, spikes, cache_spikes, gradient_share and control (an id shared by arms).
        layers: columns arm, weights, seed, layer and the statistics of `models.codec.cache_health`, with contribution.
        curves: columns arm, role, seed, metric, layer, step, value, of the averaged weights.
        facts: lines on what the numbers stand on.
    """
    out.mkdir(parents=True, exist_ok=True)
    effects.to_csv(out / "effects.csv", index=False)
    order = effects["arm"].tolist()
    audio, planted = effects[~effects["planted"]], effects[effects["planted"]]
    figures.effect_figure(effects, out / "effects.png")
    figures.layer_figure(layers, order, out / "layers.png")
    inside = curves[curves["role"] == "mc"]
    figures.step_figure(inside, effects, "gate_openness", "openness", out / "openness.png")
    figures.step_figure(inside, effects, "gate_cache_mass", "share of mass on caches", out / "cache_mass.png")
    figures.likelihood_figure(curves, effects, out / "curves.png")
    lines = headline(effects)
    text = [f"# Memory caching: {preset}", "", *[f"- {fact}" for fact in facts], "", "## At a glance", ""]
    text += [f"- {line}" for line in lines]
    text += ["", "## What moves the gate", "", _GATE_NOTE, "", _gate_table(audio), "", "![effects](effects.png)", ""]
    text += ["![openness over training](openness.png)", ""]
    text += ["## What caching is worth", "", _WORTH_NOTE, "", _worth_table(audio), "", "![curves](curves.png)", ""]
    text += ["## How the caches are used", "", _USE_NOTE, "", _use_table(effects), "", "![layers](layers.png)", ""]
    text += ["![share of mass on caches](cache_mass.png)", ""]
    if len(planted):
        text += [
            "## Can the instrument tell?",
            "",
            _PLANTED_NOTE,
            "",
            _worth_table(planted),
            "",
            _gate_table(planted),
            "",
        ]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    return lines


def headline(effects: pd.DataFrame) -> list[str]:
    """What the verdicts say, in sentences made by rule; what could not be tested is named with what it needs."""
    audio, planted = effects[~effects["planted"]], effects[effects["planted"]]
    variants = audio[audio["arm"] != "base"]
    lines = [
        _listing("the gate, against base", variants, "gate", GATE_WORDS[::-1]),
        _listing("caching, against the control", audio, "worth", WORTH_WORDS),
        _listing("caching, against base", variants, "more", MORE_WORDS),
    ]
    base = audio[audio["arm"] == "base"].iloc[0]
    lines.append(
        f"base: openness {base['openness_start']:.3f} -> {base['openness']:.3f} ({base['moved_verdict']}; Adam could "
        f"reach about {base['reach']:.3f}), the caches add {base['contribution']:.1f} times the layer's own read"
    )
    if len(planted) and planted[["worth_holm", "moved_holm"]].isna().all(axis=None):
        lines.append(f"planted recall task: not tested ({planted['worth_verdict'].iloc[0]})")
    elif len(planted):
        opened, helped = (planted["moved_verdict"] == "opened").any(), (planted["worth_verdict"] == "helps").any()
        lines.append(
            f"planted recall task: caching {'helps' if helped else 'was not shown to help'}, and a gate "
            f"{'opened' if opened else 'was not shown to open'}"
            + ("" if opened and helped else "; so the verdicts above cannot be trusted to tell")
        )
    return lines


def _listing(title: str, arms: pd.DataFrame, name: str, words: tuple[str, str]) -> str:
    parts = []
    for word in words:
        names = arms.loc[arms[f"{name}_verdict"] == word, "arm"].tolist()
        parts.append(f"{word}: {', '.join(names) or 'none'}")
    unknown = int((arms[f"{name}_verdict"] == NO_EVIDENCE).sum())
    parts.append(f"no evidence for {unknown} of {len(arms)}")
    untested = arms.loc[arms[f"{name}_holm"].isna(), f"{name}_verdict"]
    parts += [f"not tested {n} ({needs})" for needs, n in untested.value_counts().items()]
    return f"{title}: {'; '.join(parts)}"


def _interval(row: Mapping[Hashable, Any], name: str, digits: int) -> str:
    if pd.isna(row.get(name)):
        return ""
    if pd.isna(row[f"{name}_lo"]):
        return f"{row[name]:+.{digits}f} [–]"
    return f"{row[name]:+.{digits}f} [{row[f'{name}_lo']:+.{digits}f}, {row[f'{name}_hi']:+.{digits}f}]"


def _verdict(row: Mapping[Hashable, Any], name: str) -> str:
    """The word and its adjusted p, bold where it is decided; or what the test lacks."""
    word, p = row.get(f"{name}_verdict"), row.get(f"{name}_holm")
    if pd.isna(word) or pd.isna(p):
        return "" if pd.isna(word) else str(word)
    return f"{word} ({p:.3g})" if word == NO_EVIDENCE else f"**{word}** ({p:.3g})"


def _name(row: Mapping[Hashable, Any]) -> str:
    return f"{row['arm']} ({row['value']})" if row["variable"] == "together" else str(row["arm"])


def _gate_table(effects: pd.DataFrame) -> str:
    rows = []
    for r in effects.to_dict("records"):
        rows.append(
            [
                _name(r),
                f"{r['openness_start']:.3f} → {r['openness']:.3f}",
                f"{r['reach']:.3f}",
                str(r["by_layer"]),
                _interval(r, "moved", 4),
                _verdict(r, "moved"),
                _interval(r, "gate", 4),
                _verdict(r, "gate"),
            ]
        )
    head = ["setting", "openness", "reach", "openness by layer", "moved [95% CI]", "by itself (p)"]
    return table([*head, "against base [95% CI]", "verdict (p)"], rows)


def _worth_table(effects: pd.DataFrame) -> str:
    rows = [
        [
            _name(r),
            f"{int(r['n_parameters']):,} / {int(r['control_parameters']):,}",
            f"{r['val_nll']:.4f}",
            f"{r['control_val_nll']:.4f}",
            _interval(r, "worth", 4),
            _verdict(r, "worth"),
            _interval(r, "more", 4),
            _verdict(r, "more"),
        ]
        for r in effects.to_dict("records")
    ]
    head = ["setting", "parameters MC / control", "val_nll MC", "control", "MC - control [95% CI]", "verdict (p)"]
    return table([*head, "against base [95% CI]", "verdict (p)"], rows)


def _use_table(effects: pd.DataFrame) -> str:
    rows = [
        [
            _name(r),
            f"{r['cache_mass_start']:.2f} → {r['cache_mass']:.2f}",
            f"{r['entropy_share_start']:.2f} → {r['entropy_share']:.2f}",
            f"{r['read_ratio_start']:.3g} → {r['read_ratio']:.3g}",
            f"{r['contribution']:.3g}",
            f"{r['spikes']:.1f} ({r['cache_spikes']:.1f})",
            f"{r['gradient_share']:.1%}",
        ]
        for r in effects.to_dict("records")
    ]
    return table(["setting", "mass", "entropy", "read ratio", "contribution", "spikes (of W_u, b)", "gradient"], rows)
