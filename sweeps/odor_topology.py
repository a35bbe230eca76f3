"""Topology audit: does persistent H1 survive metric choice, subsampling, matched nulls and ordinary baselines?

python sweeps/odor_topology.py                                  embedded odorants and known shapes, minutes
python sweeps/odor_topology.py --set table=curated              the 4,983-molecule table (downloaded, or table=PATH)
python sweeps/odor_topology.py --preset paper --set table=curated   the published protocol
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell, UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings

OBSERVED = "observed"
NULL_STREAMS = ("fast", "published", "joint")
SPLITS = ("neighbourhood", "random", "grouped")
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
    clouds: tuple[str, ...] = ()  # point clouds with known loops, audited beside the table
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


PRESETS: Mapping[str, Audit] = {
    "audit": Audit(
        study="audit",
        clouds=("circle", "figure_eight", "torus", "gaussian_blob"),
        draws=1000,
        null_stream="joint",
        full_table=True,
        full_draws=199,
        representations=("bits_r4", "bits_r2", "counts_r4", "physchem", "pom_0", "pom_1"),
    ),
    "paper": Audit(
        study="paper",
        routes=("direct", "landmark"),
        null_stream="published",
        representations=("bits_r4", "bits_r2", "counts_r4", "physchem", "pom_0"),
    ),
    "bottleneck": Audit(
        study="bottleneck",
        draws=1600,
        null_stream="joint",
        representations=("bits_r4", "pca256", "rp256_0", "rp256_1", "rp256_2", "ae256_0", "ae256_1", "ae256_2"),
    ),
    "ensemble": Audit(study="ensemble", draws=4, representations=tuple(f"pom_{m}" for m in range(10))),
    "utility": Audit(study="utility", representations=("bits_r4", "counts_r4", "physchem", "pom_0")),
}


class OdorTopology:
    """The sweep behind the command line; the work is in `_topology_run`, sources in `_topology_sources`."""

    name = TopologyCell.SWEEP
    version = TopologyCell.VERSION
    question = "does persistent H1 survive metric choice, subsampling, matched nulls and ordinary baselines?"
    headline = "top H1"
    named = ("representation", "table", "metric", "route", "run", "null", "first_draw", "split", "member")
    tracked = ("target", "family")
    default_preset = "audit"
    presets = PRESETS

    def plan(self, preset: Audit) -> Sequence[TopologyCell]:
        from sweeps._topology_plan import plan

        return plan(preset)

    def pack(self, cells: Sequence[Cell], preset: Audit, machine: Machine, run: RunSettings) -> list[Pack]:
        from sweeps._topology_plan import make_packs

        return make_packs([c for c in cells if isinstance(c, TopologyCell)], preset, machine, run)

    def run(self, pack: Pack, preset: Audit, context: Any) -> None:
        from sweeps._topology_run import run_pack

        run_pack([c for c in pack.cells if isinstance(c, TopologyCell)], preset, context)

    def fingerprint(self, cell: Cell, preset: Audit, run: RunSettings) -> str:
        from sweeps._topology_sources import fingerprint

        assert isinstance(cell, TopologyCell)
        return fingerprint(cell, preset)

    def estimate(self, cells: Sequence[Cell], preset: Audit, machine: Machine, run: RunSettings) -> Estimate:
        from sweeps._topology_probe import estimate

        return estimate([c for c in cells if isinstance(c, TopologyCell)], preset, machine, run)

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Audit, out: Path) -> list[str]:
        from sweeps._topology_report import write

        return write(cells, preset_name, preset, out)

    def banner(self, preset_name: str, preset: Audit) -> list[str]:
        from sweeps._topology_sources import banner

        return banner(preset)


SWEEP = OdorTopology()

if __name__ == "__main__":
    from sweeps.launch.command import main

    sys.exit(main("sweeps.odor_topology"))
