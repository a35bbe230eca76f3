"""The study's hypotheses by rule: H0 → H1 → H2 → H3, each with its inputs, its rule and a verdict.

Thresholds are fixed before the cells are computed; their hash is printed, and compared with the one recorded in the
cells. "undetermined" and "blocked" are answers: what these data cannot decide is not decided. docs/hypotheses.md has
the rules in words.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.crossed import Effect
from analysis.multiplicity import ALPHA, holm
from analysis.sae.asymptote import MIN_BUDGETS, Asymptote, asymptote, equal_alive
from analysis.sae.cells import compared_models, depths_of, family_of, tokens_label
from analysis.sae.contrasts import ConfigurationMeans, Measured, combination, difference_effects
from analysis.sae.leaderboard import BEYOND_R2, Leaderboard
from analysis.sae.task_dimension import at_ceiling

SUPPORTED, REJECTED, UNDETERMINED, BLOCKED = "supported", "rejected", "undetermined", "blocked"
_RATIOS = np.geomspace(1e-3, 1e3, 301)  # magnitude ratios that are tried, of either sign
_PERMUTATIONS = 9_999


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the rules compare with, registered before a launch.

    h0_margin: CE_rec that counts as no gap. h1_ratio: |ΔR²| / |ΔCE_rec| that counts as a distortion. min_seeds: of each
    model. min_places: (model, layer) places for H3.
    """

    h0_margin: float = 0.05
    h1_ratio: float = 3.0
    min_seeds: int = 3
    min_budgets: int = MIN_BUDGETS
    min_places: int = 6
    alpha: float = ALPHA

    @property
    def digest(self) -> str:
        """12 hex digits of the thresholds' SHA-256."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Verdict:
    """One hypothesis: what was asked, from which numbers, by which rule, and the answer with what it needs."""

    name: str
    statement: str
    inputs: str
    rule: str
    word: str
    reason: str = ""

    @property
    def decided(self) -> bool:
        return self.word in (SUPPORTED, REJECTED)

    def __str__(self) -> str:
        before = {UNDETERMINED: "needs: ", BLOCKED: "by: "}.get(self.word, "")
        return f"{self.word} ({before}{self.reason})" if self.reason else self.word


@dataclass(frozen=True)
class Reference:
    """Two models of one family at one depth and k, over the budgets that both have."""

    small: str
    large: str
    depth: str
    k: int
    budgets: tuple[int, ...]
    seeds: int  # the fewer of the two models'
    one_family: bool
    ce_rec: tuple[tuple[Measured, ...], tuple[Measured, ...]]  # (small, large), by budget
    r2: tuple[tuple[Measured, ...], tuple[Measured, ...]]
    alive: tuple[tuple[float, ...], tuple[float, ...]]

    def __str__(self) -> str:
        family = "" if self.one_family else "; two families, so their Δ is no question of scale alone"
        return f"{self.large} minus {self.small}, {self.depth}, k = {self.k}{family}"

    def delta(self, metric: str, budget: int) -> Effect:
        small, large = getattr(self, metric)
        return difference_effects([(large[budget], small[budget])])[0]


@dataclass(frozen=True)
class Adjudication:
    """The verdicts, the conclusion that follows from them, and the thresholds with what was recorded of them."""

    verdicts: tuple[Verdict, ...]
    conclusion: str
    thresholds: Thresholds
    notes: tuple[str, ...] = ()


def adjudicate(
    means: ConfigurationMeans,
    board: Leaderboard,
    geometry: pd.DataFrame,
    cells: pd.DataFrame,
    thresholds: Thresholds,
    recorded: Sequence[str] = (),
) -> Adjudication:
    """All verdicts.

    Args:
        means: configuration means with their seeds' and sequences' influences.
        board: the leaderboard over all cells.
        geometry: one row per model and layer; column `k_mi` where the task-relevant dimension was measured.
        cells: prepared cells.
        thresholds: in force now.
        recorded: hashes of the thresholds that were in force when the cells were computed, "" for none.
    """
    reference = choose_reference(means)
    h0 = judge_h0(reference, thresholds)
    h1 = judge_h1(reference, h0, thresholds)
    h2 = judge_h2(board, h0, thresholds)
    h3 = judge_h3(geometry, cells, h0, thresholds)
    notes = _notes(reference, thresholds, recorded)
    return Adjudication((h0, h1, h2, h3), _conclusion(h0, h1, h2, h3), thresholds, tuple(notes))


def choose_reference(means: ConfigurationMeans) -> Reference | None:
    """Narrowest and widest of the family with most configurations: mid depth (or the first), most budgets, smallest k.

    Without two models of one family the grid's narrowest and widest; None with one model.
    """
    table = means.table
    order = compared_models(table)
    if len(order) < 2:
        return None
    part = table[table["model"].isin(order)]
    depths = depths_of(part)
    part = part[part["depth"] == ("mid" if "mid" in depths else depths[0])]
    shared = {
        int(str(k)): sorted(set.intersection(*(set(g["tokens"]) for _, g in of_k.groupby("model"))))
        for k, of_k in part.groupby("k")
        if of_k["model"].nunique() == 2
    }
    if not any(shared.values()):
        return None
    k = max(sorted(shared), key=lambda k: len(shared[k]))
    part = part[part["k"] == k]
    rows = [
        [int(part.index[(part["model"] == m) & (part["tokens"] == b)][0]) for b in shared[k]]
        for m in (order[0], order[-1])
    ]
    return Reference(
        small=order[0],
        large=order[-1],
        depth=str(part["depth"].iloc[0]),
        k=k,
        budgets=tuple(int(b) for b in shared[k]),
        seeds=int(part["n_seeds"].min()),
        one_family=family_of(order[0]) == family_of(order[-1]),
        ce_rec=_by_model(means.measured["ce_rec"], rows),
        r2=_by_model(means.measured["r2"], rows),
        alive=tuple(tuple(table["alive"].to_numpy(float)[r].tolist()) for r in rows),  # type: ignore[arg-type]
    )


def _by_model(
    measured: Sequence[Measured], rows: Sequence[Sequence[int]]
) -> tuple[tuple[Measured, ...], tuple[Measured, ...]]:
    small, large = (tuple(measured[i] for i in model) for model in rows)
    return small, large


def _lacking(reference: Reference | None, thresholds: Thresholds) -> str:
    if reference is None:
        return "two models at one depth, k and budget"
    if reference.seeds < thresholds.min_seeds:
        return f"≥ {thresholds.min_seeds} seeds of both models, of {reference.seeds}"
    return ""


def judge_h0(reference: Reference | None, thresholds: Thresholds) -> Verdict:
    """H0: the gap in CE_rec is one of optimisation and goes to 0 with the budget."""
    statement = "optimisation only: the gap in CE_rec between the models goes to 0 as the budget grows"
    rule = (
        f"Δ(b) = Δ∞ + c·b^(−α) over ≥ {thresholds.min_budgets} budgets; supported: Δ∞'s 95% interval holds 0 and lies "
        f"within ±{thresholds.h0_margin:g}; rejected: it leaves 0 out"
    )
    needs = _lacking(reference, thresholds)
    if reference is None or needs:
        return Verdict("H0", statement, "–" if reference is None else str(reference), rule, UNDETERMINED, needs)
    small, large = reference.ce_rec
    found = asymptote(reference.budgets, large, small)
    inputs = f"{reference}; {_gaps(reference)}; {_limit(found)}; {_equal_alive(reference)}"
    if len(reference.budgets) < thresholds.min_budgets:
        needs = f"≥ {thresholds.min_budgets} budgets of both models, of {len(reference.budgets)}"
    elif found.needs:
        needs = found.needs
    elif found.lo > 0 or found.hi < 0:
        return Verdict("H0", statement, inputs, rule, REJECTED)
    elif max(abs(found.lo), abs(found.hi)) <= thresholds.h0_margin:
        return Verdict("H0", statement, inputs, rule, SUPPORTED)
    else:
        needs = f"an interval of Δ∞ within ±{thresholds.h0_margin:g}: more seeds, sequences or budgets further apart"
    return Verdict("H0", statement, inputs, rule, UNDETERMINED, needs)


def _gaps(reference: Reference) -> str:
    gaps = [f"{tokens_label(b)} {_effect(reference.delta('ce_rec', i))}" for i, b in enumerate(reference.budgets)]
    return f"ΔCE_rec by budget: {', '.join(gaps)} ({reference.seeds} seeds)"


def _limit(found: Asymptote) -> str:
    if found.needs:
        return "Δ∞ –"
    alphas = f"α from {found.alphas[0]:.2f} to {found.alphas[1]:.2f} fit"
    return f"Δ∞ {found.value:+.3f} [{found.lo:+.3f}, {found.hi:+.3f}], {alphas}"


def _equal_alive(reference: Reference) -> str:
    found = equal_alive(reference.budgets, reference.alive, reference.ce_rec)
    if found is None:
        return "at equal alive share: – (the budgets do not reach one alive share in both models)"
    share, (small, large) = found
    return f"at equal alive share ({share:.1%}): ΔCE_rec {_effect(difference_effects([(large, small)])[0])}"


def _effect(effect: Effect) -> str:
    limits = f"[{effect.lo:+.3f}, {effect.hi:+.3f}]" if math.isfinite(effect.lo) else "[–]"
    return f"{effect.value:+.3f} {limits}"


def judge_h1(reference: Reference | None, h0: Verdict, thresholds: Thresholds) -> Verdict:
    """H1: a gap, or a distortion of its size by R², stays after convergence."""
    statement = "a component stays: the gap does not vanish, or R² distorts its size at the largest budget"
    rule = (
        f"supported: H0 rejected, or the 95% interval of |ΔR²| / |ΔCE_rec| at the largest budget lies above "
        f"{thresholds.h1_ratio:g}; rejected: H0 supported and the interval below it"
    )
    needs = _lacking(reference, thresholds)
    if reference is None or needs:
        return Verdict("H1", statement, "–" if reference is None else str(reference), rule, UNDETERMINED, needs)
    (small_ce, large_ce), (small_r2, large_r2) = reference.ce_rec, reference.r2
    ratio = magnitude_ratio((large_r2[-1], small_r2[-1]), (large_ce[-1], small_ce[-1]))
    last = len(reference.budgets) - 1
    inputs = (
        f"at {tokens_label(reference.budgets[-1])} tokens ΔR² {_effect(reference.delta('r2', last))}, ΔCE_rec "
        f"{_effect(reference.delta('ce_rec', last))}, ratio {ratio}; opposite signs in "
        f"{mismatch_rate(reference, last):.0%} of the seed pairs; H0 {h0.word}"
    )
    if h0.word == REJECTED or ratio.lo > thresholds.h1_ratio:
        return Verdict("H1", statement, inputs, rule, SUPPORTED)
    if h0.word == SUPPORTED and ratio.hi < thresholds.h1_ratio:
        return Verdict("H1", statement, inputs, rule, REJECTED)
    needs = f"a decision on H0, or a ratio whose interval leaves {thresholds.h1_ratio:g} out"
    return Verdict("H1", statement, inputs, rule, UNDETERMINED, needs)


@dataclass(frozen=True)
class Ratio:
    """|ΔR²| / |ΔCE_rec| with its 95% limits; `hi` is infinite where ΔCE_rec may be 0 (unbounded)."""

    value: float
    lo: float
    hi: float

    def __str__(self) -> str:
        if math.isnan(self.lo):
            return f"{self.value:.2f} [–]"
        high = "unbounded" if math.isinf(self.hi) else f"{self.hi:.2f}"
        return f"{self.value:.2f} [{self.lo:.2f}, {high}]"


def magnitude_ratio(r2: tuple[Measured, Measured], ce_rec: tuple[Measured, Measured]) -> Ratio:
    """Fieller's interval: the ratios ρ for which ΔR² − ρ·ΔCE_rec is not told from 0, by size.

    Fieller 1954, "Some problems in interval estimation", JRSS B 16. Each side is (large, small) of the same SAEs.
    """
    top, bottom = (float(a.table_SU.mean() - b.table_SU.mean()) for a, b in (r2, ce_rec))
    value = abs(top / bottom) if bottom else math.inf
    signed = np.concatenate([-_RATIOS[::-1], [0.0], _RATIOS])
    pairs = [(combination((1, -rho), (r2[0], ce_rec[0])), combination((1, -rho), (r2[1], ce_rec[1]))) for rho in signed]
    *found, alone = difference_effects([*pairs, ce_rec])
    if found[0].needs or alone.needs:
        return Ratio(value, math.nan, math.nan)
    inside = np.abs(signed[[e.lo <= 0 <= e.hi for e in found]])
    unbounded = alone.lo <= 0 <= alone.hi
    low = float(inside.min()) if len(inside) else value
    high = math.inf if unbounded else float(inside.max()) if len(inside) else value
    return Ratio(value, min(low, value), max(high, value))


def mismatch_rate(reference: Reference, budget: int) -> float:
    """Share of pairs of equal seed number in which ΔR² and ΔCE_rec have opposite signs."""
    (small_ce, large_ce), (small_r2, large_r2) = reference.ce_rec, reference.r2
    deltas = []
    for small, large in ((small_ce, large_ce), (small_r2, large_r2)):
        ends = [m[budget].table_SU.mean(axis=1)[: reference.seeds] for m in (large, small)]
        deltas.append(ends[0] - ends[1])
    return float((np.sign(deltas[0]) * np.sign(deltas[1]) < 0).mean())


def judge_h2(board: Leaderboard, h0: Verdict, thresholds: Thresholds) -> Verdict:
    """H2: proxies that look at the language model rank SAEs better than R²."""
    statement = "proxies that look at the model (rung ≥ 1) rank SAEs by CE_rec better than R² does"
    rule = (
        "paired difference of Spearman's correlation with CE_rec, rung ≥ 1 minus R², pooled and within k, Holm over "
        f"all; supported: one is above 0 at {thresholds.alpha:g}; rejected: none is and one is below 0"
    )
    if not h0.decided:
        return Verdict("H2", statement, "not read", rule, BLOCKED, f"H0 {h0.word}")
    table = board.table
    part = table[(table["scope"] == "all cells") & (table["statistic"] == "spearman") & table["proxy"].isin(BEYOND_R2)]
    if part.empty:
        return Verdict("H2", statement, "–", rule, UNDETERMINED, "three cells with proxies of rung ≥ 1")
    rows = {(str(r["relation"]), str(r["label"])): r for _, r in part.iterrows()}
    adjusted = holm({key: float(row["minus_r2_p"]) for key, row in rows.items()})
    told = {key: float(rows[key]["minus_r2"]) for key, p in adjusted.items() if p < thresholds.alpha}
    listed = [
        f"{label} {relation} {row['minus_r2']:+.2f} (p {adjusted[relation, label]:.3g})"
        for (relation, label), row in rows.items()
        if not math.isnan(adjusted[relation, label])
    ]
    inputs = "; ".join(listed) or "no difference has an interval"
    if any(d > 0 for d in told.values()):
        return Verdict("H2", statement, inputs, rule, SUPPORTED)
    if told:
        return Verdict("H2", statement, inputs, rule, REJECTED)
    needs = "; ".join(sorted({str(n).removeprefix("needs ") for n in part["needs"] if n})) or "more trajectories or k"
    return Verdict("H2", statement, inputs, rule, UNDETERMINED, needs)


def judge_h3(geometry: pd.DataFrame, cells: pd.DataFrame, h0: Verdict, thresholds: Thresholds) -> Verdict:
    """H3: the task-relevant dimension departs from PR where R² fails worst."""
    statement = "the task-relevant dimension k_MI* departs from the participation ratio where R² fails worst"
    rule = (
        "Spearman's correlation over (model, layer) of |k_MI* − PR| / PR with the mean |rank by R² − rank by CE_rec|, "
        "within models where one has several places (each model's layers turned and mirrored as a ring); "
        f"supported: above 0, permutation p < {thresholds.alpha:g}; rejected: below 0 at that p"
    )
    if "k_mi" not in geometry or geometry["k_mi"].isna().all():
        lacks = "k_MI* not measured; --set information=on measures it"
        return Verdict("H3", statement, "not read", rule, BLOCKED, lacks)
    if not h0.decided:
        return Verdict("H3", statement, "not read", rule, BLOCKED, f"H0 {h0.word}")
    gap_C = (cells["r2"].rank() - cells["ce_rec"].rank()).abs() / len(cells)
    failure = gap_C.groupby([cells["model"], cells["layer"]]).mean().rename("failure")
    places = geometry.dropna(subset=["k_mi"]).set_index(["model", "layer"]).join(failure, how="inner").sort_index()
    if len(places) < thresholds.min_places:
        needs = f"≥ {thresholds.min_places} (model, layer) with k_MI*, of {len(places)}"
        return Verdict("H3", statement, "–", rule, UNDETERMINED, needs)
    departure = ((places["k_mi"] - places["pr"]).abs() / places["pr"]).to_numpy(float)
    models = places.index.get_level_values("model").tolist()
    r, p = permutation_rank_test(departure, places["failure"].to_numpy(float), models)
    inputs = f"{len(places)} places{_bounded(places)}, Spearman {r:+.2f}, permutation p {p:.3g}"
    if p < thresholds.alpha:
        return Verdict("H3", statement, inputs, rule, SUPPORTED if r > 0 else REJECTED)
    return Verdict("H3", statement, inputs, rule, UNDETERMINED, "more (model, layer) places")


def _bounded(places: pd.DataFrame) -> str:
    """How many places know k_MI* as a lower bound alone."""
    if "mi_ceiling" not in places:
        return ""
    n = sum(at_ceiling(*row) for row in places[["mi_nats", "mi_ceiling"]].to_numpy(float))
    return f" (k_MI* a lower bound in {n}: the ceiling of InfoNCE)" if n else ""


def permutation_rank_test(
    x: np.ndarray, y: np.ndarray, models: Sequence[object] | None = None, seed: int = 0
) -> tuple[float, float]:
    """(Spearman's correlation, two-sided permutation p); the observed order counts as one of the permutations.

    `models`: each place's model, the places of a model by layer. Layers of a model are alike, and neighbours more so:
    where a model has several places, ranks count less their mean in the model, and each model's series is turned and
    mirrored as a ring (its own order stays) instead of shuffled, which rejects far too often.
    """
    rank_x, rank_y = (stats.rankdata(v) - (len(v) + 1) / 2 for v in (x, y))
    names = np.asarray(range(len(x)) if models is None else models)
    places = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    within = max(map(len, places)) > 1
    for of_model in places if within else ():
        for ranks in (rank_x, rank_y):
            ranks[of_model] -= ranks[of_model].mean()
    scale = math.sqrt(float((rank_x**2).sum() * (rank_y**2).sum()))
    if not scale:
        return math.nan, 1.0
    rng = np.random.default_rng(seed)
    if within:
        shuffled = sum(_turned(rank_y[p], rng) @ rank_x[p] for p in places)
    else:
        shuffled = rng.permuted(np.broadcast_to(rank_y, (_PERMUTATIONS, len(y))), axis=1) @ rank_x
    observed = float(rank_x @ rank_y)
    return observed / scale, float((np.abs(shuffled) >= abs(observed) - 1e-9).sum() + 1) / (_PERMUTATIONS + 1)


def _turned(series: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """_PERMUTATIONS draws of the series turned as a ring, mirrored or not."""
    rings = np.stack([np.roll(way, i) for way in (series, series[::-1]) for i in range(len(series))])
    return rings[rng.integers(0, len(rings), _PERMUTATIONS)]


def _conclusion(h0: Verdict, h1: Verdict, h2: Verdict, h3: Verdict) -> str:
    first: Mapping[str, str] = {
        SUPPORTED: "The gap in CE_rec between the scales is one of optimisation: it closes with the budget.",
        REJECTED: "The gap in CE_rec between the scales stays after endless training.",
    }
    if not h0.decided:
        text = "Whether the gap in CE_rec between the scales closes with the budget is not decided by these data"
        return f"{text}, so nothing about proxies across scale is read. H1: {h1.word}."
    parts = [first[h0.word]]
    if h1.word == SUPPORTED and h0.word == SUPPORTED:
        parts.append("R² still distorts its size.")
    if h2.word == SUPPORTED:
        parts.append("Proxies that look at the model rank SAEs better than R².")
    if h2.word == REJECTED:
        parts.append("No proxy that looks at the model ranks SAEs better than R².")
    parts += [f"{v.name} is {v.word}." for v in (h1, h2, h3) if not v.decided]
    return " ".join(parts)


def _notes(reference: Reference | None, thresholds: Thresholds, recorded: Sequence[str]) -> list[str]:
    notes = []
    changed = sorted({h for h in recorded if h and h != thresholds.digest})
    if changed:
        notes.append(
            f"The thresholds were changed after the run: the cells record {', '.join(changed)}, in force is "
            f"{thresholds.digest}. These verdicts are not those that were registered."
        )
    if "" in recorded:
        notes.append(f"{list(recorded).count('')} cells were published without a record of the thresholds.")
    if reference is not None and not reference.one_family:
        notes.append(f"{reference.small} and {reference.large} are of two families.")
    return notes
