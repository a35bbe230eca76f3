"""Cells of the topology audit, its presets' fields, and what follows from a cell alone: kind, metrics, rows, seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sweeps.core.cells import Cell, UserError, nearest

OBSERVED = "observed"
NULL_STREAMS = ("fast", "published", "joint")
SPLITS = ("neighbourhood", "random", "grouped")
UTILITY_SCORES = ("r2_geometry", "r2_topology", "r2_both", "gain", "control", "control_lo", "control_hi", "delta")
STUDIES = ("paper", "audit", "bottleneck", "ensemble", "utility")
NULLS: Mapping[str, tuple[str, ...]] = {  # in the published order; a null's position (from 1) enters its seed
    "bits": ("fixed_margin", "bernoulli", "permute_columns"),
    "counts": ("multinomial", "permute_columns"),
    "dense": ("permute_columns", "gaussian"),
}


@dataclass(frozen=True, kw_only=True)
class TopologyCell(Cell):
    """Identity shared by all cells of the audit."""

    SWEEP: ClassVar[str] = "odor_topology"
    VERSION: ClassVar[str] = "1"

    kind: str
    table: str
    representation: str


@dataclass(frozen=True, kw_only=True)
class DiagramCell(TopologyCell):
    """H1 of one subsample (`run`) of one representation, observed or for `draws` draws of one null.

    `null_stream`: "fast" and "published" draw the null from the run's own rows; "joint" draws it from the whole table,
    by a seed that does not depend on the run, and takes the run's rows of it, so draw b is one table for all runs.
    """

    kind: str = "diagram"
    metric: str
    route: str  # "direct", or "landmark": greedy farthest points of the subsample
    run: int  # subsample; -1 is the full table
    rows: int
    landmarks: int
    null: str = OBSERVED
    first_draw: int = 0
    draws: int = 1
    null_stream: str = "fast"  # one of NULL_STREAMS

    def __post_init__(self) -> None:
        if self.route not in ("direct", "landmark"):
            raise UserError(f"route={self.route!r} is not known; choose direct or landmark")
        if self.route == "landmark" and not 1 <= self.landmarks <= self.rows:
            raise UserError(
                f"landmarks={self.landmarks} of {self.table}'s rows={self.rows} a run; choose 1 <= landmarks <= rows "
                "(--set landmarks=N)"
            )
        if self.null_stream not in NULL_STREAMS:
            raise UserError(
                f"null_stream={self.null_stream!r} is not known; choose fast or published for draws of each run's own "
                "rows, joint for draws of the whole table that all runs share"
            )


@dataclass(frozen=True, kw_only=True)
class MemberCell(TopologyCell):
    """One trained member of the own odor model: its embedding and its held-out macro-AUROC."""

    kind: str = "member"
    member: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class UtilityCell(TopologyCell):
    """Whether local topology predicts neighbourhood labels beyond local geometry, and beyond what noise would.

    `control` names what the gain is compared with (cells of version 1 without it had nothing to compare it with).
    """

    kind: str = "utility"
    metric: str
    neighbours: int
    permutations: int
    split: str  # "neighbourhood": no molecule of a test patch in a training patch; "random"; "grouped": by skeleton
    control: str = "patch_noise"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"split={self.split!r} is not known; choose from {', '.join(SPLITS)}")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A preset. `table` is embedded, curated, broader, nonoverlap, cloud:NAME, or the path of a CSV."""

    study: str  # one of STUDIES
    table: str = "embedded"
    table_path: str = ""  # folder with the tables' source files, instead of downloading them
    blank_labels: str = "absent"  # what a blank cell of a label column is: 0 (absent), or a reason to refuse the table
    clouds: tuple[str, ...] = ()  # point clouds with known loops, audited along with the table
    representations: tuple[str, ...] = ("bits_r4", "counts_r4", "physchem", "pom_0")
    embedding: tuple[str, ...] = ()  # .npy/.npz/.parquet files with row ids, each a representation file:STEM-HASH
    metrics: tuple[str, ...] = ()  # () = each representation's own
    routes: tuple[str, ...] = ("direct",)
    rows: int = 1000
    runs: int = 8
    landmarks: int = 250
    draws: int = 1  # null draws of each run; with null_stream "joint" of all runs together, spread evenly
    null_runs: int = 0  # runs that get null draws; 0 = all
    draws_per_cell: int = 50
    full_table: bool = False  # also the observed diagram of every row
    full_draws: int = 0  # null draws of the full table, where full_table
    null_stream: str = "fast"  # one of NULL_STREAMS, see DiagramCell
    pom_epochs: int = 40
    neighbours: int = 40
    permutations: int = 399  # draws of the utility study's control: fifteen tests of a table need 300 for Holm
    splits: tuple[str, ...] = ("neighbourhood", "random")  # of the utility study, from SPLITS


FULL_TABLE = -1
Kind = Literal["bits", "counts", "dense"]
FILE_PREFIX = "file:"
_MODEL = re.compile(r"^(pom|rp256|ae256)_(\d+)$")
_METRICS: dict[str, tuple[str, ...]] = {
    "bits": ("jaccard",),
    "counts": ("tanimoto",),
    "dense": ("euclidean", "cosine"),
}
METRICS = tuple(metric for own in _METRICS.values() for metric in own)
_FIXED: dict[str, Kind] = {
    "bits_r4": "bits",
    "bits_r2": "bits",
    "counts_r4": "counts",
    "physchem": "dense",
    "pca256": "dense",
    "points": "dense",
}


def kind_of(representation: str) -> Kind:
    """bits, counts or dense; raises UserError for an unknown name."""
    if representation in _FIXED:
        return _FIXED[representation]
    if _MODEL.match(representation) or representation.startswith(FILE_PREFIX):
        return "dense"
    known = [*_FIXED, "pom_0", "rp256_0", "ae256_0"]
    raise UserError(
        f"representation {representation!r} is not known{nearest(representation, known)}; choose from "
        "bits_r4, bits_r2, counts_r4, physchem, pom_M, pca256, rp256_M, ae256_M"
    )


def metrics_of(representation: str, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Metrics a representation is audited under: its own, cut down to the asked ones where those apply."""
    own = _METRICS[kind_of(representation)]
    if representation in ("physchem", "points"):
        own = ("euclidean",)
    return tuple(m for m in own if not asked or m in asked)


def member_of(representation: str) -> int | None:
    """Number of the own odor model's member, for `pom_M`."""
    match = _MODEL.match(representation)
    return int(match[2]) if match and match[1] == "pom" else None


_NULL_SEED, _LANDMARK_SEED, _LANDMARK_NULL_SEED, _DRAW_SEED = 10_000, 500_000, 1_000, 1_000_000
_JOINT_SEED = 2**48  # above every seed of a run's own draws


def run_rows(total: int, run: int, rows: int) -> np.ndarray:
    """Row numbers of a run, sorted: `rows` drawn without replacement by default_rng(run), all for the full table."""
    if run == FULL_TABLE or rows >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(run).choice(total, rows, replace=False))


def null_seed(cell: DiagramCell, draw: int) -> int:
    """Seed of a null draw: draw 0 of a run is the published one, run + 10000 · position of the null.

    A joint draw has the same seed in every run, and in the full table.
    """
    position = NULLS[kind_of(cell.representation)].index(cell.null) + 1
    return (_JOINT_SEED if cell.null_stream == "joint" else cell.run) + _NULL_SEED * position + _DRAW_SEED * draw


def landmark_seed(cell: DiagramCell, draw: int) -> int:
    """Seed of the first landmark: run + 500000, and + 1000 · position for nulls."""
    position = 0 if cell.null == OBSERVED else NULLS[kind_of(cell.representation)].index(cell.null) + 1
    return cell.run + _LANDMARK_SEED + _LANDMARK_NULL_SEED * position + _DRAW_SEED * draw
