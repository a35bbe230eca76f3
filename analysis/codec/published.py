"""Published numbers of the source studies, printed with ours and with the reason where they do not compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.codec.results import Results, at
from analysis.markdown import table

# step → label-smoothed validation loss of the speech study's hybrid, and its exponential (published as perplexity)
SPEECH = {1_800: (4.2847, 72.58), 12_000: (3.8207, 45.63)}
SPEECH_LR, SPEECH_CLIPS = 3e-4, 666
# architecture → (size, nats per token over 9 codebooks) of the earlier post's music baselines
MUSIC = {"transformer": ("162M", 5.294), "hybrid_1_3": ("116M", 5.284)}
REFERENCE = "olmo_hybrid"


@dataclass(frozen=True)
class Published:
    """Which study's numbers to print, why they do not compare with ours ("" where they do), and on how many held-out
    clips ours are measured during training (0: all)."""

    study: Literal["speech", "music"]
    caveat: str = ""
    curve_clips: int = 0


def published_section(results: Results, chosen: pd.DataFrame, published: Published) -> list[str]:
    """Lines of the report; none without a model that has a published counterpart."""
    lines = _music(results, chosen) if published.study == "music" else _speech(results, chosen, published.curve_clips)
    if not lines:
        return []
    note, *rest = lines
    note += f" **Not comparable: {published.caveat}.**" if published.caveat else ""
    return ["## Compared with the published run", "", note, "", *rest, ""]


def _music(results: Results, chosen: pd.DataFrame) -> list[str]:
    """The baselines of the earlier post, each with our model of the same architecture at its best learning rate."""
    columns = ["val_nll_ema", "val_nll_raw", "n_parameters"]
    means = at(results.models, chosen).groupby("architecture")[columns].mean()
    models = {str(name): values for name, *values in means.itertuples()}
    rows = []
    for name, (size, nll) in MUSIC.items():
        if name in models:
            ema, raw, parameters = models[name]
            rows.append([name, f"{nll:.3f} ({size})", f"{ema:.3f} / {raw:.3f}", f"{parameters / 1e6:.0f}M"])
    if not rows:
        return []
    note = (
        "Validation loss in nats per token over 9 codebooks of the earlier post's music baselines, of other sizes than "
        "ours, and val_nll of the same architectures here."
    )
    return [note, table(["architecture", "published", "here, EMA / raw", "parameters here"], rows)]


def _speech(results: Results, chosen: pd.DataFrame, curve_clips: int) -> list[str]:
    """The reference at the published learning rate where it was trained with it, otherwise at its own best one."""
    models = results.models[results.models["architecture"] == REFERENCE]
    if models.empty:
        return []
    lr = SPEECH_LR if (models["lr"] == SPEECH_LR).any() else at(models, chosen)["lr"].iloc[0]

    def of(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[(frame["architecture"] == REFERENCE) & (frame["lr"] == lr)]

    curve = of(results.curves[results.curves["metric"] == "val_loss_smoothed"])
    n_final, last = of(results.clips)["clip_id"].nunique(), curve["step"].max()
    n_curve = min(curve_clips or n_final, n_final)
    rows = []
    for step, (loss, exponential) in SPEECH.items():
        here = curve[curve["step"] == step].groupby("weights")["value"].mean().to_dict()
        if step == last:  # measured once more after training, on every clip
            here = {w: of(models)[f"val_loss_smoothed_{w}"].mean() for w in ("raw", "ema")}
        mine = [f"{here[w]:.4f} / {np.exp(here[w]):.2f}" if w in here else "–" for w in ("raw", "ema")]
        clips = str(n_final if step == last else n_curve) if here else "–"
        rows.append([f"{step:,}", f"{loss:.4f} / {exponential:.2f}", *mine, clips])
    note = (
        f"Label-smoothed validation loss and its exponential (published as perplexity, which it is not), "
        f"{REFERENCE} at lr {lr:g} (published: {SPEECH_LR:g}), on as many held-out clips as the last column says "
        f"(published: {SPEECH_CLIPS})."
    )
    return [note, table(["step", "published", "here, raw", "here, EMA", "clips"], rows)]
