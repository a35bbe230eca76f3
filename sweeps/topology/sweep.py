"""The topology audit as a sweep: which module does what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sweeps.core.cells import Estimate, Pack, PublishedCell
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.first_view import Chart, View
from sweeps.launch.sweep import Sweep
from sweeps.search.halving import Extent
from sweeps.topology.cells import FULL_TABLE, Audit, DiagramCell, TopologyCell
from sweeps.topology.presets import PRESETS
from sweeps.topology.sources import Sources


class OdorTopology(Sweep[TopologyCell, Audit]):
    """The sweep behind the command line; the work is in `run`, sources in `sources`."""

    name = TopologyCell.SWEEP
    version = TopologyCell.VERSION
    question = "does persistent H1 survive metric choice, subsampling, matched nulls and ordinary baselines?"
    headline = "top H1"
    named = ("representation", "table", "metric", "route", "run", "null", "first_draw", "split", "member")
    tracked = ("target", "family")
    fixed = dict.fromkeys(
        ("study", "table", "table_path", "blank_labels", "clouds", "embedding", "runs", "draws", "splits"),
        "its trials would answer another question",
    )
    view = View(
        params=("kind", "table", "representation", "metric", "null", "run"),
        metrics=("h1_top1_mean", "auroc_test", "utility_gain/label_jaccard/ridge", "utility_delta/label_jaccard/ridge"),
        charts=(
            Chart(
                "Largest H1 persistence by representation", "scatter", "h1_top1_mean", "representation", x_param=True
            ),
            Chart("Largest H1 persistence, observed and nulls", "scatter", "h1_top1_mean", "null", x_param=True),
            Chart(
                "What topology adds to geometry, by representation",
                "scatter",
                "utility_gain/label_jaccard/ridge",
                "representation",
                x_param=True,
            ),
            Chart("Held-out AUROC of the odor models", "bar", "auroc_test"),
            Chart("Validation AUROC, as it is trained", "line", "live/auroc_val"),
        ),
    )
    default_preset = "audit"
    presets = PRESETS

    def plan(self, preset: Audit) -> Sequence[TopologyCell]:
        from sweeps.topology.plan import plan

        return plan(Sources(preset))

    def extent(self, preset: Audit) -> Extent | None:
        """The subsamples of each representation; the utility study has none."""
        return None if preset.study == "utility" or preset.runs < 2 else Extent("runs", preset.runs)

    def plan_until(self, preset: Audit, amount: int) -> Sequence[TopologyCell]:
        """Those of the first subsamples, and what has none; the full table once all of them are there."""
        return [c for c in self.plan(preset) if not isinstance(c, DiagramCell) or _within(c, amount, preset.runs)]

    def pack(
        self, cells: Sequence[TopologyCell], preset: Audit, machine: Machine, run: RunSettings
    ) -> list[Pack[TopologyCell]]:
        from sweeps.topology.packs import make_packs

        return make_packs(cells, Sources(preset), machine, run)

    def run(self, pack: Pack[TopologyCell], preset: Audit, context: PackContext) -> None:
        from sweeps.topology.run import run_pack

        run_pack(pack.cells, preset, context)

    def fingerprint(self, cell: TopologyCell, preset: Audit, run: RunSettings) -> str:
        return Sources(preset).fingerprint(cell)

    def estimate(self, cells: Sequence[TopologyCell], preset: Audit, machine: Machine, run: RunSettings) -> Estimate:
        from sweeps.topology.estimate import estimate

        return estimate(cells, Sources(preset), machine, run)

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Audit, out: Path) -> list[str]:
        from sweeps.topology.report import write

        return write(cells, preset_name, preset, out)

    def banner(self, preset_name: str, preset: Audit) -> list[str]:
        return Sources(preset).banner()


def _within(cell: DiagramCell, amount: int, runs: int) -> bool:
    return amount == runs if cell.run == FULL_TABLE else cell.run < amount


SWEEP = OdorTopology()
