"""What a memory-caching setting does to the gate and to the likelihood: paired differences, verdicts by rule.

Seeds and held-out clips are crossed: every seed scores the same clips. An interval for the mean of the differences d_SC
must hold both kinds of variation, and with two or three seeds a bootstrap of seeds is far too narrow. The mean of a
two-way table of crossed random effects has variance (MS_S + MS_C - MS_R) / (S C); Satterthwaite's (1946) degrees of
freedom make a t interval of it. One seed leaves the clips' variation alone, and the tables say so.

Shape suffixes: S seeds, C held-out clips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from analysis.multiplicity import holm

ALPHA = 0.05
NO_EVIDENCE = "no evidence"
GATE_WORDS = ("closes", "opens")
OWN_WORDS = ("shut", "opened")
WORTH_WORDS = ("helps", "hurts")  # a difference of negative log-likelihoods: below 0 is better
MORE_WORDS = ("worth more", "worth less")


_FAMILIES = (("worth", WORTH_WORDS), ("moved", OWN_WORDS), ("gate", GATE_WORDS), ("more", MORE_WORDS))


@dataclass(frozen=True)
class Effect:
    """A mean difference, its 95% limits, two-sided p and degrees of freedom; NaN where nothing was repeated."""

    value: float
    lo: float
    hi: float
    p: float
    df: float


def crossed_mean(d_SC: npt.ArrayLike) -> Effect:
    """Mean of a table of seeds by clips with its t interval (see the head of this file).

    The variance is never taken below that of the seeds' means alone or of the clips' means alone. A table of one row or
    one column gives the ordinary t interval of the other; a single number none.
    Raises ValueError for another rank or for values that are not finite.
    """
    d = np.asarray(d_SC, dtype=np.float64)
    if d.ndim != 2 or d.size == 0 or not np.isfinite(d).all():
        raise ValueError(f"differences of shape {d.shape}; give a finite table of seeds by clips")
    S, C = d.shape
    mean, seeds_S, clips_C = float(d.mean()), d.mean(1), d.mean(0)
    squares: list[tuple[float, int]] = []
    if S > 1:
        squares.append((C * float(seeds_S.var(ddof=1)), S - 1))
    if C > 1:
        squares.append((S * float(clips_C.var(ddof=1)), C - 1))
    if not squares:
        return Effect(mean, math.nan, math.nan, math.nan, math.nan)
    if len(squares) == 2:
        rest = float(((d - seeds_S[:, None] - clips_C + mean) ** 2).sum()) / ((S - 1) * (C - 1))
        total = squares[0][0] + squares[1][0] - rest
        if total > max(squares)[0]:
            spread = sum(ms**2 / n for ms, n in squares) + rest**2 / ((S - 1) * (C - 1))
            return _t_effect(mean, total / d.size, total**2 / spread)
    largest, n = max(squares)
    return _t_effect(mean, largest / d.size, n)


def _t_effect(mean: float, variance: float, df: float) -> Effect:
    error = math.sqrt(variance)
    if error == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, df)
    half = float(stats.t.ppf(0.975, df)) * error
    return Effect(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, df)), df)


def likelihood_differences(cached: pd.DataFrame, control: pd.DataFrame) -> npt.NDArray[np.float64]:
    """d_SC whose mean is the difference of val_nll (nats a token), cached less control, averaged over seeds.

    val_nll is a ratio of sums over clips, so each clip enters by its linearised influence on that ratio (Cochran 1977,
    sec. 6): long clips weigh more, and a difference that is the same for every token varies with no clip.

    Both tables: a row a seed and held-out clip, columns seed, clip_id, nll (sum over tokens), tokens.
    Raises ValueError when the two do not share seeds, clips and tokens.
    """
    nll, tokens = ([t.pivot(index="seed", columns="clip_id", values=v) for t in (cached, control)] for v in _SUMS)
    same = nll[0].index.equals(nll[1].index) and nll[0].columns.equals(nll[1].columns)
    if not same or not (tokens[0].to_numpy() == tokens[1].to_numpy()).all():
        raise ValueError("the model and its control have other seeds, clips or tokens; run both again")
    tokens_SC, sums_SC = tokens[0].to_numpy(float), nll[0].to_numpy(float) - nll[1].to_numpy(float)
    total_S1 = tokens_SC.sum(1, keepdims=True)
    value_S1 = sums_SC.sum(1, keepdims=True) / total_S1
    return value_S1 + (sums_SC - value_S1 * tokens_SC) * tokens_SC.shape[1] / total_S1


_SUMS = ("nll", "tokens")


def layer_means(gates: pd.DataFrame) -> pd.DataFrame:
    """Step-weighted means over clips: weights, seed, layer, and every statistic of `models.cache_health`."""
    gates = gates[gates["steps"] > 0]
    names = ("weights", "seed", "layer", "clip_id", "recording_id", "steps")
    facts = [c for c in gates.columns if c not in names]
    weighted = (
        gates[facts]
        .mul(gates["steps"], axis=0)
        .assign(weights=gates["weights"], seed=gates["seed"], layer=gates["layer"], steps=gates["steps"])
    )
    sums = weighted.groupby(["weights", "seed", "layer"]).sum()
    return sums[facts].div(sums["steps"], axis=0).reset_index()


def openness_movement(gates: pd.DataFrame) -> pd.DataFrame:
    """Seeds by layers: sigmoid(b) of the averaged weights after training less that before it."""
    means = layer_means(gates).pivot(index=["seed", "layer"], columns="weights", values="openness")
    return (means["ema"] - means["start"]).unstack("layer")


def verdicts(p: Sequence[float], value: Sequence[float], words: tuple[str, str]) -> tuple[list[float], list[str]]:
    """(p adjusted by Holm over the family, the word for a value below or above 0 where adjusted p < ALPHA).

    A p that is NaN (nothing was repeated) counts as 1.
    """
    adjusted = list(holm(dict(enumerate(1.0 if math.isnan(x) else x for x in p))).values())
    chosen = [words[int(v > 0)] if a < ALPHA else NO_EVIDENCE for a, v in zip(adjusted, value, strict=True)]
    return adjusted, chosen


@dataclass(frozen=True)
class ArmData:
    """One arm: its name, the variable it changes and to what, planted or not, and the measurements of its models.

    cached, control: see `likelihood_differences`. gates: a row a kind of weights (start, raw, ema), seed, layer and
    clip. facts: further numbers of the arm for the table (n_parameters, control_parameters, reach, spikes, ...).
    """

    name: str
    variable: str
    value: str
    planted: bool
    cached: pd.DataFrame
    control: pd.DataFrame
    gates: pd.DataFrame
    facts: Mapping[str, float]


def effects(arms: Sequence[ArmData], base: str = "base") -> pd.DataFrame:
    """One row an arm, in their order.

    worth: val_nll(MC) - val_nll(control). more: worth less the base setting's. moved: change of openness in training,
    averaged over the layers. gate: moved less the base setting's, over the layers that both cache. Each with _lo, _hi,
    _p, _holm and _verdict, adjusted over the arms of the audio and over those of the planted task apart.
    by_layer: openness of each layer after training, as text. openness, cache_mass, entropy_share, read_ratio,
    contribution: means over seeds and layers after training, and _start before it. contribution is openness times
    read_ratio: the size of what the caches add to the layer's read, relative to that read.
    """
    reference = next(arm for arm in arms if arm.name == base)
    base_worth, base_moved = _worth(reference), openness_movement(reference.gates)
    records = []
    for arm in arms:
        worth, moved = _worth(arm), openness_movement(arm.gates)
        record: dict[str, object] = {
            "arm": arm.name,
            "variable": arm.variable,
            "value": arm.value,
            "planted": arm.planted,
            "n_seeds": worth.shape[0],
            "n_clips": worth.shape[1],
            **arm.facts,
            **_columns("worth", crossed_mean(worth)),
            **_columns("moved", crossed_mean(moved.mean(axis=1).to_numpy()[:, None])),
            **_states(arm.gates),
        }
        if not arm.planted and arm.name != base:
            both = moved.columns.intersection(base_moved.columns)
            against = (moved[both] - base_moved[both]).mean(axis=1).to_numpy()
            record |= _columns("gate", crossed_mean(against[:, None]))
            record |= _columns("more", crossed_mean(worth - base_worth))
        records.append(record)
    table = pd.DataFrame(records)
    for planted in (False, True):
        rows = table["planted"] == planted
        for name, words in _FAMILIES:
            chosen = table.index[rows & table[name].notna()] if name in table else table.index[:0]
            adjusted, said = verdicts(table.loc[chosen, f"{name}_p"], table.loc[chosen, name], words)
            table.loc[chosen, f"{name}_holm"] = adjusted
            table.loc[chosen, f"{name}_verdict"] = said
    return table


def _worth(arm: ArmData) -> npt.NDArray[np.float64]:
    return likelihood_differences(arm.cached, arm.control)


def _columns(name: str, effect: Effect) -> dict[str, float]:
    return {name: effect.value, f"{name}_lo": effect.lo, f"{name}_hi": effect.hi, f"{name}_p": effect.p}


def _states(gates: pd.DataFrame) -> dict[str, object]:
    means = layer_means(gates)
    means["contribution"] = means["openness"] * means["read_ratio"]
    names = ("openness", "cache_mass", "entropy_share", "read_ratio", "contribution")
    by_weights = means.groupby("weights")[list(names)].mean()
    ends = {"ema": "", "start": "_start"}
    states: dict[str, object] = {f"{n}{end}": float(by_weights[n][w]) for n in names for w, end in ends.items()}
    after = means[means["weights"] == "ema"].groupby("layer")["openness"].mean()
    return states | {"by_layer": ", ".join(f"{layer}: {x:.3f}" for layer, x in after.items())}
