"""What a transcript is worth to a model of audio tokens: paired differences of the held-out likelihood, and a verdict.

text - none: a model with text conditioning less the one without, of the same architecture, size, clips and seeds, each
at its own best learning rate. right - shuffled and right - no text: one model given the clips' own texts, less the same
model given other clips' texts, or none. The first says what conditioning is worth, the others whether a text is read.
no text - none: the model with text conditioning, given none, less the model without: what the first holds that no text
has brought (another shape at the same size, another draw of training).

Every recording (and seed) is its own control: its difference is taken first. With several seeds the intervals are for
other seeds and recordings (`analysis.crossed.crossed_mean`). With one seed a difference within one trained model
(right - shuffled, right - no text) speaks of that model, for other recordings; a difference of two trainings (text -
none, no text - none) has no interval and is not tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from analysis import plots
from analysis.markdown import table
from analysis.multiplicity import ALPHA, holm_list
from analysis.recordings import difference_effect, likelihood_differences

WORTH, SHUFFLED, NO_TEXT, REST = "text - none", "right - shuffled", "right - no text", "no text - none"
WITHIN = (SHUFFLED, NO_TEXT)  # two scores of one trained model
_KEYS = ["seed", "clip_id"]


def text_effects(clips: pd.DataFrame, texts: pd.DataFrame, with_text: Mapping[str, str]) -> pd.DataFrame:
    """One row per contrast and architecture: contrast, architecture, difference (nats per token), lo, hi (95%), p,
    p_holm, n_units (recordings), n_seeds, needs. Holm's correction is over the tested architectures of a contrast;
    lo, hi, p and p_holm are NaN where `needs` says what is missing.

    Args:
        clips: averaged weights at the chosen learning rates; architecture, seed, clip_id, nll (sum), tokens, and
            recording_id where it is known.
        texts: the models with text; the same columns, and text: right, shuffled or no_text.
        with_text: the name of each architecture's model with text. Contrasts with the model without take the seeds
            that it shares with it, and have no row where there are none.
    Raises:
        ValueError: models of a contrast that were scored on other clips.
    """

    def given(arm: str, kind: str) -> pd.DataFrame:
        return texts[(texts["architecture"] == arm) & (texts["text"] == kind)]

    def model(arm: str) -> pd.DataFrame:
        return clips[clips["architecture"] == arm]

    def beside_none(kind: str) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
        pairs = {name: _shared(given(arm, kind), model(name)) for name, arm in with_text.items()}
        return {name: both for name, both in pairs.items() if len(both[0])}

    pairs = {
        WORTH: beside_none("right"),
        SHUFFLED: {name: (given(arm, "right"), given(arm, "shuffled")) for name, arm in with_text.items()},
        NO_TEXT: {name: (given(arm, "right"), given(arm, "no_text")) for name, arm in with_text.items()},
        REST: beside_none("no_text"),
    }
    return pd.concat([_contrast(name, some) for name, some in pairs.items() if some], ignore_index=True)


def _shared(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the seeds that both have: a study that is not finished may lack some."""
    seeds = set(a["seed"]) & set(b["seed"])
    return a[a["seed"].isin(seeds)], b[b["seed"].isin(seeds)]


def _contrast(contrast: str, pairs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    records = []
    for name, (a, b) in pairs.items():
        both = a.merge(b, on=[*_KEYS, "tokens"], suffixes=("_a", "_b"))
        if not len(both) == len(a) == len(b):
            raise ValueError(
                f"{contrast} of {name}: of {len(a)} and {len(b)} scored clips {len(both)} are in both; run it again"
            )
        d_SU = likelihood_differences(a, b)
        effect = difference_effect(d_SU, one_model=contrast in WITHIN)
        records.append(
            {
                "contrast": contrast,
                "architecture": name,
                "difference": effect.value,
                "lo": effect.lo,
                "hi": effect.hi,
                "p": effect.p,
                "n_units": d_SU.shape[1],
                "n_seeds": d_SU.shape[0],
                "needs": effect.needs,
            }
        )
    frame = pd.DataFrame(records)
    return frame.assign(p_holm=holm_list(frame["p"].tolist()))


def verdict(effects: pd.DataFrame) -> str:
    """In words: which architectures the transcript helps, hurts, or makes no difference to, and which of them read it.

    By Holm-adjusted p < 0.05 and the sign of the difference. A transcript helps where the model with text is better
    than the one without, and better with the text than without it; a gain that appears without a text, too, is called
    that. What was not tested is named with what it needs; what was tested on one seed is said of that trained model.
    """
    worth, kept, read, rest = (
        _sorted_out(effects[effects["contrast"] == name]) for name in (WORTH, NO_TEXT, SHUFFLED, REST)
    )
    helped = [name for name in worth["helps"] if name in kept["helps"]]
    said = {
        "the transcript helps {}": helped,
        "{}: better with text conditioning, not shown to be by the text": [
            n for n in worth["helps"] if n not in helped
        ],
        "the model of the same size without text is better for {}": worth["hurts"],
        "the transcript does not help measurably: {}": worth["neither"],
        "the right text is better than another clip's for {}": read["helps"],
        "another clip's text is better than the right one for {}": read["hurts"],
        "it makes no measurable difference which text is given to {}": read["neither"],
        f"part of the gain is not the text's ({REST}) for {{}}": [n for n in helped if n in rest["helps"]],
    }
    parts = [text.format(", ".join(names)) for text, names in said.items() if names]
    return "; ".join([*parts, *_limits(effects)])


def _limits(effects: pd.DataFrame) -> list[str]:
    """What the verdict does not say: contrasts that were not tested, and those of one trained model."""
    out = []
    for contrast, what in ((WORTH, "whether the transcript helps"), (SHUFFLED, "whether the text is read")):
        rows = effects[(effects["contrast"] == contrast) & (effects["needs"] != "")]
        for needs, some in rows.groupby("needs", sort=False):
            out.append(f"{what} is not tested for {', '.join(some['architecture'])} ({needs})")
    rows = effects[(effects["contrast"] == SHUFFLED) & (effects["needs"] == "") & (effects["n_seeds"] == 1)]
    if len(rows):
        out.append(
            f"one seed: which text is better is said of this trained model alone ({', '.join(rows['architecture'])})"
        )
    return out


def _sorted_out(rows: pd.DataFrame) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"helps": [], "hurts": [], "neither": []}
    for r in rows[rows["p_holm"].notna()].to_dict("records"):
        sure = r["p_holm"] < ALPHA
        found[("helps" if r["difference"] < 0 else "hurts") if sure else "neither"].append(str(r["architecture"]))
    return found


def text_section(effects: pd.DataFrame, facts: Sequence[str], figure: str) -> list[str]:
    """Lines of the report: verdict, table, figure."""
    names = list(dict.fromkeys(effects["architecture"]))
    found = {(r["contrast"], r["architecture"]): r for r in effects.to_dict("records")}
    contrasts = [c for c in (WORTH, SHUFFLED, NO_TEXT, REST) if c in set(effects["contrast"])]
    rows = [[name, *(_cell(found.get((contrast, name))) for contrast in contrasts)] for name in names]
    seeds = "/".join(map(str, sorted(set(effects["n_seeds"]))))
    note = (
        f"val_nll of EMA weights (nats per token), paired by recording and seed ({effects['n_units'].iloc[0]} held-out "
        f"recordings, {seeds} seeds); \\*: p < 0.05 after Holm's correction over the architectures that were tested; "
        f"below 0 is better. {WORTH}: at the same number of parameters, each model at its own best learning rate. "
        f"{SHUFFLED}, {NO_TEXT}: one model, its input text changed. {REST}: what {WORTH} holds besides the text, "
        "narrower MLPs and another draw of training. 95% intervals hold for other seeds and recordings; with one seed "
        f"{SHUFFLED} and {NO_TEXT} speak of that trained model, for other recordings, and the others are not tested "
        "([–])."
    )
    head = ["architecture", *contrasts]
    return [
        "## Does the transcript help?",
        "",
        f"**{verdict(effects)}.**",
        "",
        *[f"- {fact}" for fact in facts],
        "",
        note,
        "",
        table(head, rows),
        "",
        f"![what the text is worth]({figure})",
        "",
    ]


def _cell(r: Mapping[Any, Any] | None) -> str:
    if r is None:
        return "–"
    if np.isnan(r["lo"]):
        return f"{r['difference']:.4f} [–: {r['needs']}]"
    return f"{r['difference']:.4f} [{r['lo']:.4f}, {r['hi']:.4f}]" + ("\\*" if r["p_holm"] < ALPHA else "")


def text_figure(effects: pd.DataFrame, path: Path) -> None:
    """Each contrast's difference with its 95% interval, one line per architecture; filled if Holm leaves p < 0.05."""
    names = list(dict.fromkeys(effects["architecture"]))
    contrasts = list(dict.fromkeys(effects["contrast"]))
    with plots.style():
        figure, axes = plots.panels(1, len(contrasts), width=3.4, height=0.4 * len(names) + 0.9, sharex=False)
        for axis, contrast in zip(axes[0], contrasts, strict=True):
            for r in effects[effects["contrast"] == contrast].to_dict("records"):
                axis.errorbar(
                    r["difference"],
                    len(names) - 1 - names.index(r["architecture"]),
                    xerr=plots.error_lengths([r["difference"]], [r["lo"]], [r["hi"]]),
                    fmt="o",
                    color=plots.PALETTE[0],
                    mfc=plots.PALETTE[0] if r["p_holm"] < ALPHA else "white",
                )
            axis.axvline(0, color=plots.GREY, linewidth=1)
            axis.xaxis.set_major_locator(MaxNLocator(3))  # small differences have long labels
            axis.set_yticks(np.arange(len(names)), names[::-1])
            axis.set_ylim(-0.6, len(names) - 0.4)
            axis.set_title(contrast)
        plots.outer_labels(axes, "difference (nats per token)", "")
        plots.save(figure, path)
