"""Architectures at their own best learning rate, and paired differences of their held-out likelihood.

All models of a study score the same held-out clips. A resample draws clips once for all models and, within every
architecture, its seeds; a difference of two architectures is taken inside each resample, so that what the clips have in
common cancels. An architecture of one seed has the clips' variation only.

Shape suffixes: R resamples, C clips, S seeds, A architectures, M models (architecture and seed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.bootstrap import Floats, count_blocks, percentile_interval
from analysis.multiplicity import holm

_N_RESAMPLES = 10_000


def choose_lr(
    models: pd.DataFrame, column: str = "val_nll_ema", tried: Mapping[str, Sequence[float]] | None = None
) -> pd.DataFrame:
    """One row an architecture: architecture, lr (its best), lr_tried (tuple), edge, n_seeds, and the mean `column`.

    The best learning rate is the one of lowest mean over seeds, among those that the most seeds finished with. `edge`
    is "" inside the grid, "lowest" or "highest" at its edge (a better one may lie outside), "only one" without a
    choice. Every architecture is judged on the clips it was chosen on, so each mean is a little too low, and more so
    for larger grids. Input columns: architecture, lr, seed and `column`. `tried` gives the rates of each architecture
    where some left no row (stopped early, or failed).
    """
    records = []
    for architecture, some in models.groupby("architecture", sort=False):
        by_lr = some.groupby("lr")[column].agg(["mean", "size"]).sort_index()
        whole = by_lr[by_lr["size"] == by_lr["size"].max()]
        best = float(whole["mean"].idxmin())
        grid = tuple(sorted({*(float(x) for x in by_lr.index), *(tried or {}).get(str(architecture), ())}))
        edge = "only one" if len(grid) == 1 else {0: "lowest", len(grid) - 1: "highest"}.get(grid.index(best), "")
        records.append(
            {
                "architecture": architecture,
                "lr": best,
                "lr_tried": grid,
                "edge": edge,
                "n_seeds": int(whole["size"].iloc[0]),
                column: float(whole["mean"].min()),
            }
        )
    return pd.DataFrame(records)


@dataclass(frozen=True)
class ArmResamples:
    """Mean val_nll of each architecture: names, the estimate value_A, its resamples value_RA, what was resampled."""

    names: tuple[str, ...]
    value_A: Floats
    value_RA: Floats
    n_clips: int
    n_seeds_A: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """One row an architecture, best first: architecture, val_nll, lo, hi (95%), n_seeds."""
        intervals = [percentile_interval(column) for column in self.value_RA.T]
        table = pd.DataFrame(
            {
                "architecture": self.names,
                "val_nll": self.value_A,
                "lo": [i.lo for i in intervals],
                "hi": [i.hi for i in intervals],
                "n_seeds": self.n_seeds_A,
            }
        )
        return table.sort_values("val_nll", ignore_index=True)

    def differences(self) -> pd.DataFrame:
        """One row a pair (a, b), a the better: difference val_nll(b) - val_nll(a), lo, hi (95%), p, p_holm.

        p is the bootstrap's two-sided one; p_holm controls the error of all pairs together (Holm 1979).
        """
        order = np.argsort(self.value_A, kind="stable")
        records = []
        for a, b in combinations(order.tolist(), 2):
            d_R = self.value_RA[:, b] - self.value_RA[:, a]
            interval = percentile_interval(d_R)
            records.append(
                {
                    "a": self.names[a],
                    "b": self.names[b],
                    "difference": float(self.value_A[b] - self.value_A[a]),
                    "lo": interval.lo,
                    "hi": interval.hi,
                    "p": two_sided_p(d_R),
                }
            )
        table = pd.DataFrame(records, columns=["a", "b", "difference", "lo", "hi", "p"])
        table["p_holm"] = list(holm(dict(enumerate(table["p"]))).values())
        return table


def two_sided_p(value_R: Floats) -> float:
    """Twice the smaller share of resamples on a side of 0 (Davison & Hinkley 1997, sec. 4.4, one added to counts)."""
    tail = min(int((value_R <= 0).sum()), int((value_R >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(value_R) + 1))


def arm_resamples(clips: pd.DataFrame, *, n_resamples: int = _N_RESAMPLES, seed: int = 0) -> ArmResamples:
    """Two-level bootstrap of each architecture's val_nll (nats a token), over the clips and over its seeds.

    Drawing S seeds from S would understate their variance by (S - 1) / S; deviations from the mean over seeds are
    therefore stretched by sqrt(S / (S - 1)) (Rao & Wu 1988).

    Args:
        clips: a row a model and held-out clip, columns architecture, seed, clip_id, nll (sum over tokens), tokens.
    Raises:
        ValueError: fewer than two clips, or models that were scored on other clips or tokens.
    """
    wide = clips.pivot_table(index="clip_id", columns=["architecture", "seed"], values="nll", aggfunc="first")
    tokens = clips.pivot_table(index="clip_id", columns=["architecture", "seed"], values="tokens", aggfunc="first")
    if wide.isna().to_numpy().any() or (tokens.nunique(axis=1) != 1).any():
        counts = clips.groupby(["architecture", "seed"])["tokens"].agg(["size", "sum"])
        raise ValueError(f"models were scored on different clips (clips and tokens of each: {counts.to_dict('index')})")
    if len(wide) < 2:
        raise ValueError(f"{len(wide)} held-out clip gives no interval; evaluate 2 or more")
    nll_CM, tokens_C = wide.to_numpy(float), tokens.iloc[:, 0].to_numpy(float)
    of = wide.columns.get_level_values("architecture")
    names = tuple(dict.fromkeys(clips["architecture"]))
    members = [np.flatnonzero(of == name) for name in names]
    rng = np.random.default_rng([seed, 1])
    blocks = []
    for count_RC in count_blocks(len(wide), n_resamples, seed):
        value_RM = count_RC @ nll_CM / (count_RC @ tokens_C)[:, None]
        blocks.append(np.stack([_drawn_mean(value_RM[:, m], rng) for m in members], axis=1))
    whole_M = nll_CM.sum(0) / tokens_C.sum()
    return ArmResamples(
        names,
        np.array([whole_M[m].mean() for m in members]),
        np.concatenate(blocks),
        len(wide),
        tuple(len(m) for m in members),
    )


def _drawn_mean(value_RS: Floats, rng: np.random.Generator) -> Floats:
    """Mean over S seeds drawn with replacement in each resample, with the variance of a mean of S."""
    size, n = value_RS.shape
    mean_R = value_RS.mean(1)
    if n == 1:
        return mean_R
    deviation_RS = (value_RS - mean_R[:, None]) * np.sqrt(n / (n - 1))
    draw_RS = rng.integers(n, size=(size, n))
    return mean_R + np.take_along_axis(deviation_RS, draw_RS, axis=1).mean(1)
