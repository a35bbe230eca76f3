"""Statements of the topology reports and how their error rates are simulated.

Top-1 values of runs and null draws follow a normal or skewed law; the shares of its variance that belong to a run, and
to a realisation of the null in all runs, are set (subsamples that overlap by 80% correlate by about as much). Tables of
points check the whole chain of sampling, H1 and test.

Shapes: R runs, B null draws per run (`null_RB`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from analysis.multiplicity import ALPHA
from analysis.thresholds import QUANTILE, threshold
from analysis.topology.distances import euclidean
from analysis.topology.null_tests import beats_nulls, mean_interval, pooled_ratio, top1_ratio
from analysis.topology.nulls import permute_columns
from analysis.topology.persistence import h1
from analysis.topology.tables import audit
from analysis.topology.unit import FULL_TABLE, Unit, top1
from analysis.topology.universal_null import universal_null
from benchmarks._calibration import Statement, Tally, covers, grid

NAMES = ("bits_r4", "bits_r2", "counts_r4", "physchem", "pom_0", "pom_1", "pom_2", "pom_3")
_Law = Callable[..., np.ndarray]  # of size=
_FAR = float(stats.norm.ppf(QUANTILE))


def _draws(rng: np.random.Generator, runs: int, draws: int, run: float, realisation: float) -> np.ndarray:
    """[R, B] of unit variance: shares `run` and `realisation` of it belong to the row and to the column."""
    rest = max(0.0, 1 - run - realisation)
    parts = rng.normal(size=(runs, 1)), rng.normal(size=(1, draws)), rng.normal(size=(runs, draws))
    return sum(np.sqrt(s) * x for s, x in zip((run, realisation, rest), parts, strict=True))


def threshold_coverage(rng: np.random.Generator, trials: int, runs: int, draws: int, run: float, same: float) -> Tally:
    """`same`: variance that a realisation brings to all runs alike; 0.05 at 20% overlap, 0.7 at 80%."""
    hits, widths = 0, []
    ideal = 2 * stats.norm.ppf(0.975) * np.sqrt(QUANTILE * (1 - QUANTILE) / (runs * draws)) / stats.norm.pdf(_FAR)
    for _ in range(trials):
        found = threshold(_draws(rng, runs, draws, run, same))
        hits += covers(found.lo, found.hi, _FAR)
        widths.append((found.hi - found.lo) / ideal)
    return Tally(hits, trials, float(np.mean([w for w in widths if np.isfinite(w)] or [np.nan])))


def ratio_coverage(
    rng: np.random.Generator, trials: int, runs: int, draws: int, run: float, same: float, skewed: bool
) -> Tally:
    """Three nulls with one true threshold; the observed runs vary by a tenth of their mean."""
    truth, hits = 2.0 / (1 + 0.1 * _FAR), 0
    for _ in range(trials):
        noise_R = rng.exponential(size=runs) - 1 if skewed else rng.normal(size=runs)
        nulls = {name: 1 + 0.1 * _draws(rng, runs, draws, run, same) for name in "abc"}
        found = top1_ratio(2 + 0.2 * noise_R, nulls)
        hits += covers(found.lo, found.hi, truth)
    return Tally(hits, trials)


def mean_coverage(rng: np.random.Generator, trials: int, runs: int, law: str) -> Tally:
    laws: dict[str, _Law] = {"normal": rng.normal, "exponential": rng.exponential}
    truth, ideal = 0.0 if law == "normal" else 1.0, 2 * stats.norm.ppf(0.975)  # both laws have variance 1
    found = [mean_interval(values) for values in laws[law](size=(trials, runs))]
    width = float(np.mean([hi - lo for lo, hi in found])) / (ideal / np.sqrt(runs))
    return Tally(sum(covers(lo, hi, truth) for lo, hi in found), trials, width)


def pooled_coverage(rng: np.random.Generator, trials: int, draws: int, same: float) -> Tally:
    """Loops of exponential life whose scale changes by run and realisation; the truth from 400,000 of them."""

    def lives(spread_RB: np.ndarray, loops: int) -> np.ndarray:
        return np.exp(0.3 * spread_RB)[..., None] * rng.exponential(size=(*spread_RB.shape, loops))

    truth, hits = 2.0 / float(np.quantile(lives(rng.normal(size=(20_000, 1)), 20), QUANTILE)), 0
    for _ in range(trials):
        drawn = lives(_draws(rng, 8, draws, 0.1, same), 15)
        diagrams = {run: [np.stack([0 * d, d], 1) for d in drawn[run]] for run in range(8)}
        found = pooled_ratio(2 + 0.1 * rng.normal(size=8), {"null": diagrams})
        hits += covers(found.lo, found.hi, truth)
    return Tally(hits, trials)


def test_size(rng: np.random.Generator, trials: int, draws: int, overlap: float, joint: bool) -> Tally:
    """8 runs of one table, one null. Subsamples that share `overlap` of their rows correlate by about as much."""
    rejected = 0
    for _ in range(trials):
        observed_R = _draws(rng, 8, 1, 0.0, overlap)[:, 0]
        null_RB = _draws(rng, 8, draws, 0.0, overlap if joint else 0.0)
        rejected += beats_nulls(observed_R, {"null": null_RB}, joint=joint).p <= ALPHA
    return Tally(rejected, trials)


def chain_size(rng: np.random.Generator, trials: int, overlap: float) -> Tally:
    """Tables that the null itself made, 4 subsamples, 19 joint draws: sampling, H1 and test as the sweep does them."""
    rejected, rows = 0, int(40 * overlap)
    for _ in range(trials):
        subsets = [np.sort(rng.choice(40, rows, replace=False)) for _ in range(4)]
        table = rng.normal(size=(40, 3)) * rng.uniform(0.5, 2, 3)
        tables = [table] + [permute_columns(table, int(rng.integers(2**40))) for _ in range(19)]
        tops = np.array([[top1(h1(euclidean(x[s]))) for x in tables] for s in subsets])
        rejected += beats_nulls(tops[:, 0], {"null": tops[:, 1:]}, joint=True).p <= ALPHA
    return Tally(rejected, trials)


def interval_of_p(rng: np.random.Generator, trials: int, draws: int, p: float) -> Tally:
    """Three nulls that endless draws would give the same p."""
    hits = 0
    for _ in range(trials):
        found = beats_nulls([1 - p], {name: rng.random((1, draws)) for name in "abc"})
        hits += covers(found.p_lo, found.p_hi, p)
    return Tally(hits, trials)


def _null_unit(rng: np.random.Generator, name: str, metric: str, draws: int, shift: float = 0.0) -> Unit:
    """A representation that differs from its nulls by `shift`: the full table, which is tested, and a subsample."""
    made = Unit(("t", name, metric, "direct"), joint=True)
    runs = (FULL_TABLE, 0)
    observed_R = 5 + shift + _draws(rng, 2, 1, 0.0, 0.5)[:, 0]
    made.observed = {run: np.array([[1.0, 1 + top]]) for run, top in zip(runs, observed_R, strict=True)}
    for null in ("permute_columns", "gaussian"):
        drawn = 5 + _draws(rng, 2, draws, 0.0, 0.5)
        made.nulls[null] = {run: row.tolist() for run, row in zip(runs, drawn, strict=True)}
    return made


def verdict_error(rng: np.random.Generator, trials: int, representations: int, draws: int) -> Tally:
    """No representation differs from its nulls: trials in which any is called real or fragile, so above its nulls."""
    wrong = 0
    for _ in range(trials):
        found = audit([_null_unit(rng, name, "euclidean", draws) for name in NAMES[:representations]])
        wrong += any(v.label.startswith(("real", "fragile")) for v in found.verdicts.values())
    return Tally(wrong, trials)


def metrics_error(rng: np.random.Generator, trials: int, representations: int, draws: int) -> Tally:
    """Every representation is above its nulls under its first metric alone: trials that state "2 or more" of any."""
    wrong = 0
    for _ in range(trials):
        units = [_null_unit(rng, name, "euclidean", draws, 20.0) for name in NAMES[:representations]]
        units += [_null_unit(rng, u.place[1], "cosine", draws) for u in units]
        found = audit(units)
        wrong += any("under 2 or more" in v.sentence and "not under" not in v.sentence for v in found.verdicts.values())
    return Tally(wrong, trials)


def verdict_power(rng: np.random.Generator, trials: int, draws: int, shift: float) -> Tally:
    """One of six representations lies `shift` standard deviations above its nulls."""
    found = 0
    for _ in range(trials):
        units = [_null_unit(rng, n, "euclidean", draws, shift if n == "pom_0" else 0.0) for n in NAMES[:6]]
        found += audit(units).verdicts["t", "pom_0"].label.startswith(("real", "fragile"))
    return Tally(found, trials)


def universal_error(rng: np.random.Generator, trials: int, law: str, rows: int, dimensions: int) -> Tally:
    """Clouds without a loop: trials with any loop below ALPHA after Bonferroni or Benjamini-Hochberg."""
    laws: dict[str, _Law] = {
        "uniform": rng.random,
        "normal": rng.normal,
        "t3": lambda size: np.asarray(rng.standard_t(3, size=size)),
    }
    wrong = 0
    for _ in range(trials):
        wrong += max(universal_null(h1(euclidean(laws[law](size=(rows, dimensions))))).significant(ALPHA)) > 0
    return Tally(wrong, trials)


_WIDE = (
    "Order statistics are discrete and few groups are allowed for by t quantiles, so the interval is wider than "
    "nominal; where the draws bound the threshold on one side alone, it misses on the other alone. Width: over that of "
    "as many independent draws, of the intervals that have both limits."
)
STATEMENTS = (
    Statement(
        name="95% interval of a null threshold (95th percentile)",
        printed="topology report, inside the ratio's interval",
        kind="coverage",
        simulate=threshold_coverage,
        settings=[
            *grid(runs=(1,), draws=(8, 50, 100, 199, 999), run=(0.0,), same=(0.0,)),
            *grid(runs=(8,), draws=(1, 25, 125), run=(0.0, 0.1, 0.4, 0.8), same=(0.05, 0.2)),
            *grid(runs=(8,), draws=(25, 125), run=(0.0, 0.2), same=(0.7,)),
            *grid(runs=(2, 4), draws=(100,), run=(0.0, 0.4, 0.8), same=(0.05,)),
        ],
        quick=(
            {"runs": 1, "draws": 8, "run": 0.0, "same": 0.0},
            {"runs": 8, "draws": 25, "run": 0.8, "same": 0.05},
        ),
        trials=500,
        quick_trials=150,
        note=_WIDE,
    ),
    Statement(
        name="95% interval of the top-1 ratio",
        printed="topology report, Ratios and tests",
        kind="coverage",
        simulate=ratio_coverage,
        settings=[
            *grid(runs=(8,), draws=(1, 25, 125), run=(0.0, 0.4), same=(0.05, 0.5), skewed=(False, True)),
            *grid(runs=(2, 4), draws=(100,), run=(0.0, 0.4), same=(0.05,), skewed=(True,)),
        ],
        quick=({"runs": 8, "draws": 125, "run": 0.0, "same": 0.5, "skewed": True},),
        trials=200,
        quick_trials=150,
        note="Joins two intervals of which each covers at least .95, and holds for the hardest of three nulls. "
        + _WIDE,
    ),
    Statement(
        name="95% interval of the pooled ratio",
        printed="topology report, cells.parquet",
        kind="coverage",
        simulate=pooled_coverage,
        settings=grid(draws=(4, 25), same=(0.05, 0.6)),
        quick=({"draws": 4, "same": 0.6},),
        trials=200,
        quick_trials=60,
        note=_WIDE,
    ),
    Statement(
        name="95% interval of the mean top 1 over subsamples",
        printed="topology report, cells.parquet",
        kind="coverage",
        simulate=mean_coverage,
        settings=grid(runs=(2, 3, 4, 5, 8, 16), law=("normal", "exponential")),
        quick=({"runs": 4, "law": "exponential"},),
        quick_trials=1000,
        note="A t interval of level .985: the top 1 of few subsamples is skewed, and the plain one covers .88 to .95.",
    ),
    Statement(
        name="interval of p over endless draws",
        printed="topology report, cells.parquet",
        kind="coverage",
        simulate=interval_of_p,
        settings=grid(draws=(25, 199, 999), p=(0.005, 0.05, 0.4)),
        quick=({"draws": 199, "p": 0.05},),
        trials=500,
        note="Clopper-Pearson limits, the lower one corrected for taking the largest of the nulls' p: wide by both.",
    ),
    Statement(
        name="p of the subsamples together",
        printed="topology report, p subsamples",
        kind="size",
        simulate=test_size,
        settings=grid(draws=(19, 99, 199), overlap=(0.2, 0.5, 0.8, 0.95), joint=(True, False)),
        quick=({"draws": 99, "overlap": 0.8, "joint": False}, {"draws": 99, "overlap": 0.8, "joint": True}),
        trials=2000,
        quick_trials=300,
        note="joint False: draws of each run's own, merged by twice their average p, valid under any dependence.",
    ),
    Statement(
        name="p of the subsamples together, from tables to H1",
        printed="topology report, p subsamples",
        kind="size",
        simulate=chain_size,
        settings=grid(overlap=(0.2, 0.5, 0.8)),
        quick=({"overlap": 0.8},),
        trials=200,
        quick_trials=50,
    ),
    Statement(
        name="any representation called real or fragile",
        printed="topology report, Verdicts",
        kind="family-wise error",
        simulate=verdict_error,
        settings=grid(representations=(2, 6, 8), draws=(199, 999)),
        quick=({"representations": 6, "draws": 199},),
        trials=200,
        quick_trials=40,
    ),
    Statement(
        name='any representation said to be above its nulls "under 2 or more metrics"',
        printed="topology report, Verdicts",
        kind="family-wise error",
        simulate=metrics_error,
        settings=grid(representations=(2, 6), draws=(199,)),
        quick=({"representations": 6, "draws": 199},),
        trials=200,
        quick_trials=25,
    ),
    Statement(
        name="a representation above its nulls is found",
        printed="topology report, Verdicts",
        kind="power",
        simulate=verdict_power,
        settings=grid(draws=(199, 999), shift=(2.0, 3.0, 4.0)),
        quick=({"draws": 199, "shift": 4.0},),
        trials=100,
        quick_trials=20,
    ),
    Statement(
        name="any loop significant by the universal null",
        printed="topology report, Universal null",
        kind="family-wise error",
        simulate=universal_error,
        settings=grid(law=("uniform", "normal", "t3"), rows=(60, 200), dimensions=(2, 3, 10)),
        quick=({"law": "normal", "rows": 60, "dimensions": 2},),
        trials=200,
        quick_trials=100,
    ),
)
