"""What a memory-caching setting does to the gate and to the likelihood: paired differences, verdicts by rule.

Seeds and held-out recordings are crossed: every seed scores the same recordings. Intervals and p-values are those of
`analysis.crossed.crossed_mean`, for other seeds and other recordings. A difference between two trainings needs two
seeds or more: with one there is no interval, no p and no verdict.

Shape suffixes: S seeds, U recordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.crossed import Effect, crossed_mean
from analysis.multiplicity import ALPHA, holm_list
from analysis.recordings import difference_effect, likelihood_differences

NO_EVIDENCE = "no evidence"
GATE_WORDS = ("closes", "opens")
OWN_WORDS = ("shut", "opened")
WORTH_WORDS = ("helps", "hurts")  # a difference of negative log-likelihoods: below 0 is better
MORE_WORDS = ("worth more", "worth less")


_FAMILIES = (("worth", WORTH_WORDS), ("moved", OWN_WORDS), ("gate", GATE_WORDS), ("more", MORE_WORDS))


def layer_means(gates: pd.DataFrame) -> pd.DataFrame:
    """Step-weighted means over clips: weights, seed, layer, and every statistic of `models.codec.cache_health`."""
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


def verdicts(found: Sequence[Effect], words: tuple[str, str]) -> tuple[list[float], list[str]]:
    """(p adjusted by Holm over those that could be tested, in words) of a family of effects.

    The word for a value below or above 0 where adjusted p < ALPHA; what an effect needs where it could not be tested.
    """
    adjusted = holm_list([e.p for e in found])
    said = [
        e.needs or (words[int(e.value > 0)] if p < ALPHA else NO_EVIDENCE) for e, p in zip(found, adjusted, strict=True)
    ]
    return adjusted, said


@dataclass(frozen=True)
class ArmData:
    """One arm: its name, the variable it changes and to what, planted or not, and the measurements of its models.

    cached, control: see `analysis.recordings.likelihood_differences`. gates: one row per kind of weights (start, raw,
    ema), seed, layer and clip. facts: further numbers of the arm for the table (n_parameters, control_parameters,
    reach, spikes, ...).
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
    """One row per arm, in their order.

    worth: val_nll(MC) - val_nll(control). more: worth less the base setting's. moved: change of openness in training,
    averaged over the layers. gate: moved less the base setting's, over the layers that both cache. Each with _lo, _hi,
    _p, _holm and _verdict, adjusted over the arms of the audio and over those of the planted task apart; NaN, and in
    _verdict what is needed, where it could not be tested. n_units: held-out recordings.
    by_layer: openness of each layer after training, as text. openness, cache_mass, entropy_share, read_ratio,
    contribution: means over seeds and layers after training, and _start before it. contribution is openness times
    read_ratio: the size of what the caches add to the layer's read, relative to that read.
    """
    reference = next(arm for arm in arms if arm.name == base)
    base_worth, base_moved = _worth(reference), openness_movement(reference.gates)
    records, found = [], []
    for arm in arms:
        worth, moved = _worth(arm), openness_movement(arm.gates)
        record: dict[str, object] = {
            "arm": arm.name,
            "variable": arm.variable,
            "value": arm.value,
            "planted": arm.planted,
            "n_seeds": worth.shape[0],
            "n_units": worth.shape[1],
            **arm.facts,
            **_states(arm.gates),
        }
        some = {"worth": difference_effect(worth), "moved": crossed_mean(moved.mean(axis=1).to_numpy()[:, None])}
        if not arm.planted and arm.name != base:
            both = moved.columns.intersection(base_moved.columns)
            against = (moved[both] - base_moved[both]).mean(axis=1).to_numpy()
            some |= {"gate": crossed_mean(against[:, None]), "more": difference_effect(worth - base_worth)}
        for name, effect in some.items():
            record |= {name: effect.value, f"{name}_lo": effect.lo, f"{name}_hi": effect.hi, f"{name}_p": effect.p}
        records.append(record)
        found.append(some)
    table = pd.DataFrame(records)
    for planted in (False, True):
        for name, words in _FAMILIES:
            chosen = [i for i, arm in enumerate(arms) if arm.planted == planted and name in found[i]]
            if chosen:
                adjusted, said = verdicts([found[i][name] for i in chosen], words)
                table.loc[chosen, f"{name}_holm"] = adjusted
                table.loc[chosen, f"{name}_verdict"] = said
    return table


def _worth(arm: ArmData) -> npt.NDArray[np.float64]:
    return likelihood_differences(arm.cached, arm.control)


def _states(gates: pd.DataFrame) -> dict[str, object]:
    means = layer_means(gates)
    means["contribution"] = means["openness"] * means["read_ratio"]
    names = ("openness", "cache_mass", "entropy_share", "read_ratio", "contribution")
    by_weights = means.groupby("weights")[list(names)].mean()
    ends = {"ema": "", "start": "_start"}
    states: dict[str, object] = {f"{n}{end}": float(by_weights[n][w]) for n in names for w, end in ends.items()}
    after = means[means["weights"] == "ema"].groupby("layer")["openness"].mean()
    return states | {"by_layer": ", ".join(f"{layer}: {x:.3f}" for layer, x in after.items())}
