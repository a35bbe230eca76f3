"""Cells and packs of the topology audit, and what finishing them takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sweeps._sweep import Estimate, Pack, UserError
from sweeps._topology_sources import kind_of, member_of, metrics_of, n_rows, place_of, table_name
from sweeps._where import Machine, RunSettings
from sweeps.odor_topology import NULLS, OBSERVED, Audit, DiagramCell, MemberCell, TopologyCell, UtilityCell

FULL_TABLE = -1
_H1_SECONDS = 0.1  # of one diagram and one null draw at 1,000 rows on one core, roughly
_MEMBER_SECONDS = 100.0
_UTILITY_SECONDS = 60.0


def plan(preset: Audit) -> list[TopologyCell]:
    """All cells of a preset; raises UserError."""
    if preset.draws_per_cell < 1:
        raise UserError(f"draws_per_cell={preset.draws_per_cell} cuts draws into nothing; choose 1 or more")
    name = table_name(preset.table)
    representations = list(preset.representations)
    if preset.embedding:
        representations.append("file")
    cells: list[TopologyCell] = []
    if not name.startswith("cloud:"):
        for representation in representations:
            cells += _of_representation(preset, name, representation)
    clouds = [f"cloud:{c}" for c in preset.clouds] + ([name] if name.startswith("cloud:") else [])
    for cloud in clouds:
        cells += _diagrams(preset, table_name(cloud), "points")
    return cells


def _of_representation(preset: Audit, table: str, representation: str) -> list[TopologyCell]:
    kind_of(representation)
    cells: list[TopologyCell] = []
    member = member_of(representation)
    if member is not None:
        cells.append(MemberCell(table=table, representation=representation, member=member, epochs=preset.pom_epochs))
    if preset.study == "utility":
        total = n_rows(table, place_of(preset))
        if 5 * (preset.neighbours + 1) > total:
            raise UserError(
                f"neighbours={preset.neighbours} makes patches of {preset.neighbours + 1}, more than a fifth of the "
                f"table's {total} rows; choose neighbours <= {total // 5 - 1}"
            )
        for metric in metrics_of(representation, preset.metrics):
            cells.append(
                UtilityCell(
                    table=table,
                    representation=representation,
                    metric=metric,
                    neighbours=preset.neighbours,
                    permutations=preset.permutations,
                )
            )
        return cells
    return cells + _diagrams(preset, table, representation)


def subsample_rows(preset: Audit, total: int) -> int:
    """Rows of a run: the published rule (all when the table is not larger), or a real subsample for the audit."""
    if preset.rows < total:
        return preset.rows
    return total if preset.study == "paper" else int(0.8 * total)


def _diagrams(preset: Audit, table: str, representation: str) -> list[TopologyCell]:
    total = n_rows(table, place_of(preset))
    rows = subsample_rows(preset, total)
    null_runs = preset.null_runs or preset.runs
    cells: list[TopologyCell] = []
    for metric in metrics_of(representation, preset.metrics):
        for route in preset.routes:
            cell = partial(
                DiagramCell,
                table=table,
                representation=representation,
                metric=metric,
                route=route,
                landmarks=min(preset.landmarks, rows) if route == "landmark" else 0,
            )
            if preset.full_table and route == "direct":
                cells.append(cell(run=FULL_TABLE, rows=total))
            for run in range(preset.runs):
                cells.append(cell(run=run, rows=rows))
                if run >= null_runs:
                    continue
                for null in NULLS[kind_of(representation)]:
                    for first in range(0, preset.draws, preset.draws_per_cell):
                        count = min(preset.draws_per_cell, preset.draws - first)
                        nulls: dict[str, Any] = {
                            "null": null,
                            "first_draw": first,
                            "draws": count,
                            "null_stream": preset.null_stream,
                        }
                        cells.append(cell(run=run, rows=rows, **nulls))
    return cells


def _seconds(cell: TopologyCell) -> float:
    if isinstance(cell, DiagramCell):
        factor = 2.0 if cell.null != OBSERVED else 1.0
        return factor * cell.draws * _H1_SECONDS * (cell.rows / 1000) ** 2.3
    return _MEMBER_SECONDS if isinstance(cell, MemberCell) else _UTILITY_SECONDS


def make_packs(cells: Sequence[TopologyCell], machine: Machine, run: RunSettings) -> list[Pack]:
    """Packs of one (table, representation), split so that every core has work and none waits long for the last."""
    budget = max(20.0, sum(map(_seconds, cells)) / (3 * machine.cpus))
    groups: dict[tuple[str, str], list[list[TopologyCell]]] = {}
    spent: dict[tuple[str, str], float] = {}
    for cell in cells:
        place = (cell.table, cell.representation)
        parts = groups.setdefault(place, [[]])
        full = run.cells_per_pack and len(parts[-1]) >= run.cells_per_pack
        if parts[-1] and (full or spent[place] + _seconds(cell) > budget):
            parts.append([])
            spent[place] = 0.0
        parts[-1].append(cell)
        spent[place] = spent.get(place, 0.0) + _seconds(cell)
    out = [
        Pack(name=f"{table}-{representation}-{i:02d}".replace(":", "-"), cells=tuple(part))
        for (table, representation), parts in groups.items()
        for i, part in enumerate(parts)
    ]
    # the longest first, so that the cores end together; members first, since diagrams of other packs need them
    return sorted(out, key=lambda p: (not any(isinstance(c, MemberCell) for c in p.cells), -_pack_seconds(p)))


def _pack_seconds(pack: Pack) -> float:
    return sum(_seconds(c) for c in pack.cells if isinstance(c, TopologyCell))


def estimate(cells: Sequence[TopologyCell], machine: Machine, run: RunSettings) -> Estimate:
    """Rough time to finish `cells`; memory is that of the largest distance matrix and its ranks."""
    from analysis.persistence import predicted_bytes

    rows = max((c.rows for c in cells if isinstance(c, DiagramCell)), default=0)
    return Estimate(
        memory_bytes=predicted_bytes(rows) if rows else 0,
        seconds=sum(map(_seconds, cells)) / machine.cpus,
        basis="0.1 s a diagram of 1,000 rows and one core, growing as rows^2.3; not measured here",
    )
