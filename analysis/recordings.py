"""Held-out likelihoods by recording, the unit over which statements about other audio are made.

Clips cut from one recording share its room, voice and text: their sums of nll and tokens are added up before anything
else. The tables are then seeds by recordings for `analysis.crossed`.

Shape suffixes: S seeds, U units (recordings).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.crossed import Effect, crossed_mean, ratio_influence, units_mean

CLIP, RECORDING = "clip_id", "recording_id"
NEEDS_RECORDINGS = "needs ≥ 2 held-out recordings"


def unit_of(clips: pd.DataFrame) -> str:
    """The column whose values are the units: recording_id, or clip_id where a row has no recording."""
    return RECORDING if RECORDING in clips and not clips[RECORDING].isna().any() else CLIP


def unit_words(clips: pd.DataFrame) -> str:
    """What a report calls the units, with a note where clips have to stand for recordings."""
    return "recordings" if unit_of(clips) == RECORDING else "clips (their recordings are not known)"


def wide_sums(clips: pd.DataFrame, model: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(nll, tokens): one row per model, one column per unit, sums over the unit's clips; NaN where a model lacks one.

    clips: a row per model and held-out clip, with the columns `model`, clip_id, nll (sum over tokens, nats), tokens,
    and recording_id where it is known.
    Raises ValueError without a row.
    """
    if clips.empty:
        raise ValueError("no held-out clip was scored; hold out a larger share, or give more audio")
    unit = unit_of(clips)
    sums = clips.groupby([*model, unit], sort=True)[["nll", "tokens"]].sum()
    return sums["nll"].unstack(unit), sums["tokens"].unstack(unit)


def likelihood_differences(a: pd.DataFrame, b: pd.DataFrame) -> npt.NDArray[np.float64]:
    """d_SU whose mean is the difference of val_nll (nats per token), a less b, averaged over seeds.

    val_nll is a ratio of sums, so each unit enters by its influence on it (`crossed.ratio_influence`).

    Both tables: see `wide_sums`, with the column seed for the model.
    Raises ValueError when the two do not share seeds, units and tokens.
    """
    (nll_a, tokens_a), (nll_b, tokens_b) = (wide_sums(t, ["seed"]) for t in (a, b))
    same = nll_a.index.equals(nll_b.index) and nll_a.columns.equals(nll_b.columns)
    if not same or not (tokens_a.to_numpy() == tokens_b.to_numpy()).all():
        raise ValueError("the two models of a comparison have other seeds, clips or tokens; run both again")
    return ratio_influence(nll_a.to_numpy(float) - nll_b.to_numpy(float), tokens_a.to_numpy(float))


def difference_effect(d_SU: npt.NDArray[np.float64], *, one_model: bool = False) -> Effect:
    """Mean of differences paired by seed and recording, for other seeds and recordings.

    one_model: both scores of a pair are of one trained model, so that one seed allows a statement about that model.
    """
    if d_SU.shape[1] < 2:
        return replace(units_mean(d_SU.mean(axis=0)), needs=NEEDS_RECORDINGS)
    return units_mean(d_SU[0]) if one_model and len(d_SU) == 1 else crossed_mean(d_SU)
