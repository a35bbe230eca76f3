"""Verdicts by rule: five criteria a representation, and from them the sentence the report prints.

A criterion is True, False, or None where it was not measured; None is never counted as passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

ALPHA = 0.05
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
    "real and unique",
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
) -> Criteria:
    """Criteria from measurements; a measurement that is None leaves its criterion None.

    above_null: the Holm-adjusted largest p over nulls is below ALPHA. recurs: at least RECURS_SHARE of the runs lie
    above the null threshold. metrics: p < ALPHA under at least METRICS metrics or routes, of at least that many
    tried. compression: p < ALPHA in more than COMPRESSED_SHARE of the compressed versions. stable: the largest
    loop's birth and death vary by at most STABLE_SPREAD of its persistence.
    """
    several = p_by_metric if p_by_metric is not None and len(p_by_metric) >= METRICS else None
    return Criteria(
        above_null=None if p_adjusted is None else p_adjusted < ALPHA,
        recurs=None if share_above is None else share_above >= RECURS_SHARE,
        metrics=None if several is None else sum(p < ALPHA for p in several.values()) >= METRICS,
        compression=None
        if not p_by_compression
        else bool(np.mean([p < ALPHA for p in p_by_compression.values()]) > COMPRESSED_SHARE),
        stable=None if spread is None else bool(spread <= STABLE_SPREAD),
    )


def judge(name: str, found: Mapping[str, Criteria], baselines: Sequence[str]) -> Verdict:
    """The verdict on representation `name`, given everyone's criteria and which of them are ordinary baselines.

    Not above its nulls: not distinguishable. Above, but failing a measured criterion: fragile. Otherwise real; and
    unique only if no baseline is detected. A baseline is never compared with itself.

    Raises:
        KeyError: `name` has no criteria.
    """
    if name not in found:
        raise KeyError(f"no criteria for {name!r}; known are {sorted(found)}")
    mine = found[name]
    if mine.above_null is None:
        return Verdict(label="undecided", sentence=f"{name}: not tested against its matched nulls")
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
    return Verdict(label="real and unique", sentence=f"{real}; none of the baselines {', '.join(tested)} is")
