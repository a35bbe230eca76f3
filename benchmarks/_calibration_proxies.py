"""Statements of the proxy leaderboard and how their error rates are simulated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from analysis.bootstrap import Floats
from analysis.sae.cells import SequenceTables
from analysis.sae.leaderboard import demean_within, leaderboard
from benchmarks._calibration import Setting, Statement, Tally, covers, grid
from benchmarks._calibration_sae import lengths, losses, sequence_table

_BUDGETS, _SAME_TRAJECTORY = 2, 0.7  # share of a cell's deviation that its trajectory's budgets have in common
_PROXIES = ("r2", "cosine")


@dataclass(frozen=True)
class Design:
    """A fixed grid of places (model and layer), k and budgets; cells deviate from its trends, by trajectory.

    trend: size of the places' and the k's common effects on CE_rec and both proxies, in standard deviations of a
    trajectory. strong, weak: correlation of R² and of the cosine with CE_rec among deviations.
    """

    places: int
    ks: int
    trend: float
    strong: float
    weak: float

    def index(self) -> npt.NDArray[np.int64]:
        """(C, 3): place, k and budget of each cell."""
        return np.array(list(itertools.product(range(self.places), range(self.ks), range(_BUDGETS))))

    def draw(self, rng: np.random.Generator, n: int) -> Floats:
        """(3, n, C): CE_rec, R² and cosine of n grids."""
        place_C, k_C, _ = self.index().T
        place, k = (np.linspace(-1, 1, count) if count > 1 else np.zeros(1) for count in (self.places, self.ks))
        common = [place[place_C] + 1.5 * k[k_C], -0.5 * place[place_C] + 1.2 * k[k_C], place[place_C] + k[k_C]]
        shape = (n, self.places * self.ks)
        noise = [
            math.sqrt(_SAME_TRAJECTORY) * np.repeat(rng.normal(size=shape), _BUDGETS, axis=1)
            + math.sqrt(1 - _SAME_TRAJECTORY) * rng.normal(size=(n, len(place_C)))
            for _ in range(4)
        ]
        values = [noise[0]]
        for r, own in ((self.strong, noise[2]), (self.weak, noise[3])):
            values.append(r * noise[0] + math.sqrt(1 - r * r) * (noise[1] + own) / math.sqrt(2))
        return np.stack([value + self.trend * c for value, c in zip(values, common, strict=True)])

    def truth(self, relation: str) -> Floats:
        """Rank correlations of CE_rec with both proxies over many such grids together."""
        values = self.draw(np.random.default_rng(0), 4_000)
        if relation == "within k":
            ones = np.ones_like(values[0])
            values = np.stack([demean_within(x, ones, self.index()[:, 1]) for x in values])
        target, *proxies = values.reshape(3, -1)
        return np.array([stats.spearmanr(target, x).statistic for x in proxies])


def _cells(design: Design, values_3C: Floats) -> pd.DataFrame:
    place_C, k_C, budget_C = design.index().T
    frame = pd.DataFrame({"model": "m", "layer": place_C, "depth": "mid", "k": k_C, "tokens": budget_C, "seed": 0})
    frame["cell_key"] = [str(i) for i in range(len(frame))]
    return frame.assign(ce_rec=values_3C[0], r2=values_3C[1], cosine=values_3C[2], d_model=8)


def measured_cells(
    rng: np.random.Generator, design: Design, values_3C: Floats, sequences: int
) -> tuple[pd.DataFrame, SequenceTables]:
    """The cells as some sequences measure them; each sequence shifts all cells, and every cell on its own.

    Half of what shifts all cells is the document's.
    """
    cells = _cells(design, values_3C)
    if not sequences:
        return cells, SequenceTables(cells, None)
    scale = 0.01  # a deviation of one in a metric's own unit
    orig_U, tables = losses(rng, sequences), {}
    share_D = lengths(rng)
    document_U = rng.choice(len(share_D), sequences, p=share_D)
    shift_3U = (rng.normal(0, 1, (3, sequences)) + rng.normal(0, 1, (3, len(share_D)))[:, document_U]) / math.sqrt(2)
    for key, value_3 in zip(cells["cell_key"], values_3C.T, strict=True):
        seen_3U = scale * (value_3[:, None] + shift_3U + rng.normal(0, 1, (3, sequences)))
        sst_U = np.ones(sequences)
        table = sequence_table(orig_U, orig_U * (1.5 - seen_3U[0]), 0.2 - seen_3U[1], sst_U, 0.8 + seen_3U[2])
        tables[key] = table.assign(document=document_U)
    sums = {key: table.sum() for key, table in tables.items()}
    cells["ce_rec"] = [2 - s["loss_recon"] / s["loss_orig"] for s in sums.values()]
    cells["r2"] = [1 - s["sse"] / s["sst"] for s in sums.values()]
    cells["cosine"] = [s["cos_sum"] / s["n_tokens"] for s in sums.values()]
    return cells, SequenceTables(cells, tables)


def _board(rng: np.random.Generator, trials: int, design: Design, relation: str, sequences: int) -> list[pd.DataFrame]:
    """The leaderboard's rows of rank correlations, one table per trial, by proxy."""
    found = []
    for values_3C in np.moveaxis(design.draw(rng, trials), 1, 0):
        cells, tables = measured_cells(rng, design, values_3C, sequences)
        table = leaderboard(cells, tables, n_resamples=100).table
        rows = table[(table["relation"] == relation) & (table["statistic"] == "spearman")]
        found.append(rows.set_index("proxy"))
    return found


def correlation_coverage(
    rng: np.random.Generator, trials: int, *, relation: str, sequences: int = 0, **design: float
) -> Tally:
    chosen = Design(**design)  # type: ignore[arg-type]
    truth = dict(zip(_PROXIES, chosen.truth(relation), strict=True))
    boards = _board(rng, trials // 2, chosen, relation, sequences)
    return _tally(boards, "lo", "hi", truth)


def difference_coverage(
    rng: np.random.Generator, trials: int, *, relation: str, sequences: int = 0, **design: float
) -> Tally:
    chosen = Design(**design)  # type: ignore[arg-type]
    strong, weak = chosen.truth(relation)
    boards = _board(rng, trials, chosen, relation, sequences)
    return _tally(boards, "minus_r2_lo", "minus_r2_hi", {"cosine": float(weak - strong)})


def _tally(boards: Sequence[pd.DataFrame], lo: str, hi: str, truth: Mapping[str, float]) -> Tally:
    limits = [(*b.loc[p, [lo, hi]].to_numpy(float), value) for b in boards for p, value in truth.items()]
    there = [each for each in limits if not math.isnan(each[0])]
    return Tally(sum(covers(*each) for each in there), len(there))


_CORRELATIONS = ({"strong": 0.0, "weak": 0.0}, {"strong": 0.7, "weak": 0.5}, {"strong": 0.95, "weak": 0.8})


def _settings(relation: str, places: Sequence[int]) -> list[Setting]:
    plain = [
        *grid(relation=(relation,), places=places, ks=(6,), trend=(0.0,)),
        *grid(relation=(relation,), places=(3,), ks=(6,), trend=(1.0,)),
    ]
    measured = {"relation": relation, "places": 3, "ks": 6, "trend": 0.0, "sequences": 48}
    return [*(setting | r for setting in plain for r in _CORRELATIONS), measured | _CORRELATIONS[-1]]


_SETTINGS: Sequence[Setting] = [
    *_settings("pooled", (1, 3, 6)),
    *_settings("within k", (3, 6)),
    {"relation": "within k", "places": 6, "ks": 5, "trend": 0.0, **_CORRELATIONS[1]},
]
_HARD = {"places": 1, "ks": 6, "trend": 0.0, "strong": 0.95, "weak": 0.8}
_NOTE = (
    "Where the grid's trends (trend 1) carry the correlation, trajectories differ for reasons that the jackknife takes "
    "for chance: the interval is too wide, never too narrow. Fewer than six clusters: no interval."
)

STATEMENTS: Sequence[Statement] = (
    Statement(
        name="95% interval of a proxy's rank correlation with CE_rec",
        printed="proxy_gap report: leaderboard, correlations per depth",
        kind="coverage",
        simulate=correlation_coverage,
        settings=_SETTINGS,
        quick=({"relation": "pooled", **_HARD, "places": 3},),
        trials=250,
        quick_trials=200,
        note=_NOTE,
    ),
    Statement(
        name="95% interval of a paired difference of two proxies",
        printed="proxy_gap report: leaderboard, minus R²",
        kind="coverage",
        simulate=difference_coverage,
        settings=_SETTINGS,
        quick=({"relation": "within k", **_HARD, "places": 3},),
        trials=150,
        quick_trials=150,
        note=_NOTE,
    ),
)
