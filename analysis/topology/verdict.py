"""Verdicts by rule: five criteria per representation, and from them the sentence the report prints.

A criterion is True, False, or None where it was not measured; None is never counted as passed. What rests on p-values
(above_null, metrics, compression) says a wrong thing about any of the table's representations with probability ALPHA at
most, each; the other two describe the runs at hand and can only take a verdict away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from analysis.multiplicity import ALPHA

RECURS_SHARE = 0.75
METRICS = 2
COMPRESSED_SHARE = 0.5
STABLE_SPREAD = 0.25

WORDS = {
    "above_null": "above the 95th percentile of its matched nulls",
    "recurs": f"in at least {RECURS_SHARE:.0%} of the subsamples",
    "metrics": f"under {METRICS} or more metrics or filtrations",
    "compression": "after mild compression",
    "stable": "at a stable birth and death",
}


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """The five criteria of the study for one representation."""

    above_null: bool | None = None
    recurs: bool | None = None
    metrics: bool | None = None
    compression: bool | None = None
    stable: bool | None = None

    def by_answer(self, answer: bool | None) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is answer]

    @property
    def detected(self) -> bool:
        """Above the nulls, and again in other subsamples: enough for a baseline to count as having the signal."""
        return bool(self.above_null and self.recurs)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`label` is one of LABELS; `sentence` says which criteria decided it."""

    label: str
    sentence: str


LABELS = (
    "real, not found in baselines",
    "real but not unique",
    "real, uniqueness not tested",
    "fragile",
    "not distinguishable",
    "undecided",
)


def criteria(
    *,
    p_adjusted: float | None = None,
    share_above: float | None = None,
    p_by_metric: Mapping[str, float] | None = None,
    p_by_compression: Mapping[str, float] | None = None,
    spread: float | None = None,
    metric_family: int = 1,
    compression_family: int = 1,
) -> Criteria:
    """Criteria from measurements; a measurement that is None leaves its criterion None.

    above_null: the Holm-adjusted largest p over nulls is below ALPHA. recurs: at least RECURS_SHARE of the runs lie
    above the null threshold. metrics: at least METRICS metrics or routes, of at least that many tried, are above their
    nulls. compression: so are more than COMPRESSED_SHARE of the compressed versions. Both by `partial_conjunction_p`
    times the number of representations that this is asked of (its family). stable: the largest loop's birth and
    death vary by at most STABLE_SPREAD of its persistence.
    """
    several = p_by_metric if p_by_metric is not None and len(p_by_metric) >= METRICS else None
    most = math.floor(COMPRESSED_SHARE * len(p_by_compression or ())) + 1
    return Criteria(
        above_null=None if p_adjusted is None else p_adjusted < ALPHA,
        recurs=None if share_above is None else share_above >= RECURS_SHARE,
        metrics=None if several is None else metric_family * partial_conjunction_p(several.values(), METRICS) < ALPHA,
        compression=None
        if not p_by_compression
        else compression_family * partial_conjunction_p(p_by_compression.values(), most) < ALPHA,
        stable=None if spread is None else bool(spread <= STABLE_SPREAD),
    )


def partial_conjunction_p(p_values: Iterable[float], least: int) -> float:
    """p of "fewer than `least` of these hold": (m − least + 1) · p_(least), valid under any dependence.

    Benjamini & Heller 2008. Counting p-values below ALPHA instead would find a second one among three that do not hold
    in 14% of all cases.

    Raises:
        ValueError: fewer than `least` p-values.
    """
    ordered = sorted(p_values)
    if len(ordered) < least:
        raise ValueError(f"{len(ordered)} p-values for least={least}; give as many, or ask for fewer")
    return min(1.0, (len(ordered) - least + 1) * ordered[least - 1])


def judge(name: str, found: Mapping[str, Criteria], baselines: Sequence[str], needs: str = "") -> Verdict:
    """The verdict on representation `name`, given everyone's criteria and which of them are ordinary baselines.

    Not above its nulls: not distinguishable. Above, but failing a measured criterion: fragile. Otherwise real; not
    unique if a baseline is detected, too. That none is does not make it unique: a baseline may have the signal and be
    missed, and how often is not known. A baseline is never compared with itself. `needs`: what a test that could not be
    made lacks.

    Raises:
        KeyError: `name` has no criteria.
    """
    if name not in found:
        raise KeyError(f"no criteria for {name!r}; known are {sorted(found)}")
    mine = found[name]
    if mine.above_null is None:
        lacks = needs or "not tested against its matched nulls"
        return Verdict(label="undecided", sentence=f"{name}: {lacks}")
    if not mine.above_null:
        return Verdict(
            label="not distinguishable", sentence=f"{name}: its largest loop is not distinguishable from matched nulls"
        )
    failed, open_ = mine.by_answer(False), mine.by_answer(None)
    passed = [c for c in mine.by_answer(True) if c != "above_null"]
    notes = f"; not measured: {', '.join(open_)}" if open_ else ""
    if failed:
        lacks = ", ".join(f"not {WORDS[c]}" for c in failed)
        return Verdict(label="fragile", sentence=f"{name}: {WORDS['above_null']}, but {lacks}{notes}")
    if not passed:
        return Verdict(label="undecided", sentence=f"{name}: {WORDS['above_null']}{notes}")
    real = f"{name}: {WORDS['above_null']}, {', '.join(WORDS[c] for c in passed)}{notes}"
    tested = [b for b in baselines if b != name and b in found and found[b].above_null is not None]
    if not tested:
        return Verdict(label="real, uniqueness not tested", sentence=f"{real}; no baseline was tested")
    rivals = [b for b in tested if found[b].detected]
    if rivals:
        return Verdict(label="real but not unique", sentence=f"{real}; so are the baselines {', '.join(rivals)}")
    missed = f"{real}; not found in the baselines {', '.join(tested)}, which does not show that they lack it"
    return Verdict(label="real, not found in baselines", sentence=missed)
