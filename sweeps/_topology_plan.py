"""Cells and packs of the topology audit, and what finishing them takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sweeps._topology_sources import (
    METRICS,
    check_blanks,
    given_embeddings,
    kind_of,
    member_of,
    metrics_of,
    n_rows,
    open_table,
    place_of,
    table_name,
    trained_on,
)
from sweeps.core.cells import Pack, UserError, nearest
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.odor_topology import NULLS, OBSERVED, STUDIES, Audit, DiagramCell, MemberCell, TopologyCell, UtilityCell

FULL_TABLE = -1
GROWTH = 2.3  # log-log slope of the H1 time in the number of rows, docs/benchmarks/topology.md
_H1_SECONDS = 0.03  # of one diagram of 1,000 rows on one core
_MEMBER_SECONDS = 60.0
_UTILITY_SECONDS = 120.0
_PROCESS_BYTES = 5 * 2**28  # an interpreter with Ray, RDKit, numba and torch loaded, and the features of a table
_USABLE = 0.75  # share of free memory that a pack may plan with


def plan(preset: Audit) -> list[TopologyCell]:
    """All cells of a preset; raises UserError."""
    if preset.study not in STUDIES:
        raise UserError(
            f"study={preset.study!r} is not known{nearest(preset.study, STUDIES)}; choose from {', '.join(STUDIES)}"
        )
    for field in ("rows", "runs", "draws", "draws_per_cell", "neighbours", "pom_epochs"):
        if getattr(preset, field) < 1:
            raise UserError(f"{field}={getattr(preset, field)} leaves nothing to compute; choose 1 or more")
    for field in ("permutations", "null_runs", "full_draws"):
        if getattr(preset, field) < 0:
            raise UserError(f"{field}={getattr(preset, field)} counts nothing; choose 0 or more")
    if unknown := [m for m in preset.metrics if m not in METRICS]:
        raise UserError(
            f"metric {unknown[0]!r} is not known{nearest(unknown[0], METRICS)}; choose from {', '.join(METRICS)}"
        )
    if unnamed := [r for r in preset.representations if r == "points" or r.startswith("file:")]:
        raise UserError(
            f"representation {unnamed[0]!r} cannot be asked for by name: points come with a cloud (--set clouds=NAME), "
            "file:… with --set embedding=FILE; leave it out"
        )
    check_blanks(preset)
    name, embeddings = table_name(preset.table), given_embeddings(preset)
    cells: list[TopologyCell] = []
    if not name.startswith("cloud:"):
        for representation in (*preset.representations, *embeddings):
            cells += _of_representation(preset, name, representation)
    clouds = [f"cloud:{c}" for c in preset.clouds] + ([name] if name.startswith("cloud:") else [])
    for cloud in clouds:
        cells += _diagrams(preset, table_name(cloud), "points")
    return cells


def _of_representation(preset: Audit, table: str, representation: str) -> list[TopologyCell]:
    kind_of(representation)
    cells: list[TopologyCell] = []
    member = member_of(representation)
    if unlabelled := _without_labels(preset, table, member):
        needs = "the utility study" if preset.study == "utility" else representation
        raise UserError(
            f"table {unlabelled} has 0 label columns and {needs} needs them; choose a labelled table, or the audit "
            "without pom_M (--set representations=bits_r4,bits_r2,counts_r4,physchem)"
        )
    if member is not None:
        cells.append(MemberCell(table=table, representation=representation, member=member, epochs=preset.pom_epochs))
    if preset.study == "utility":
        total = n_rows(table, place_of(preset))
        if 5 * (preset.neighbours + 1) > total:
            raise UserError(
                f"neighbours={preset.neighbours} makes patches of {preset.neighbours + 1}, more than a fifth of the "
                f"table's {total} rows; choose neighbours <= {total // 5 - 1}"
            )
        return cells + [
            UtilityCell(
                table=table,
                representation=representation,
                metric=metric,
                neighbours=preset.neighbours,
                permutations=preset.permutations,
                split=split,
            )
            for metric in metrics_of(representation, preset.metrics)
            for split in preset.splits
        ]
    return cells + _diagrams(preset, table, representation)


def _without_labels(preset: Audit, table: str, member: int | None) -> str:
    """The table that labels are asked of and that has none, if any: a member's is the one it is trained on."""
    asked = [table] * (preset.study == "utility") + [trained_on(table)] * (member is not None)
    return next((name for name in asked if not open_table(name, place_of(preset)).labels), "")


def subsample_rows(preset: Audit, total: int) -> int:
    """Rows of a run: the published rule (all when the table is not larger), or a real subsample for the audit."""
    if preset.rows < total:
        return preset.rows
    return total if preset.study == "paper" else int(0.8 * total)


def _diagrams(preset: Audit, table: str, representation: str) -> list[TopologyCell]:
    total = n_rows(table, place_of(preset))
    rows = subsample_rows(preset, total)
    null_runs = min(preset.null_runs or preset.runs, preset.runs)
    cells: list[TopologyCell] = []
    for metric in metrics_of(representation, preset.metrics):
        for route in preset.routes:
            cell = partial(
                DiagramCell,
                table=table,
                representation=representation,
                metric=metric,
                route=route,
                landmarks=preset.landmarks if route == "landmark" else 0,
            )
            if preset.full_table and route == "direct":
                cells.append(cell(run=FULL_TABLE, rows=total))
                cells += _null_cells(preset, partial(cell, run=FULL_TABLE, rows=total), preset.full_draws)
            for run in range(preset.runs):
                cells.append(cell(run=run, rows=rows))
                if run < null_runs:
                    cells += _null_cells(preset, partial(cell, run=run, rows=rows), draws_of_run(preset, null_runs))
    return cells


def draws_of_run(preset: Audit, null_runs: int) -> int:
    """Null draws of each of `null_runs` runs: joint draws are counted over all of them, rounded up."""
    return -(-preset.draws // null_runs) if preset.null_stream == "joint" else preset.draws


def _null_cells(preset: Audit, cell: Callable[..., DiagramCell], draws: int) -> list[DiagramCell]:
    """The cells of every null of one run, `draws_per_cell` draws each; `cell` lacks their own fields."""
    own = cell()
    return [
        replace(
            own,
            null=null,
            first_draw=first,
            draws=min(preset.draws_per_cell, draws - first),
            null_stream=preset.null_stream,
        )
        for null in NULLS[kind_of(own.representation)]
        for first in range(0, draws, preset.draws_per_cell)
    ]


def _weight(cell: TopologyCell) -> float:
    """Rough CPU-seconds of a cell, for even packs; `--plan` measures instead (see `_topology_probe`)."""
    if isinstance(cell, DiagramCell):
        factor = 2.0 if cell.null != OBSERVED else 1.0
        return factor * cell.draws * _H1_SECONDS * (cell.rows / 1000) ** GROWTH
    return _MEMBER_SECONDS if isinstance(cell, MemberCell) else _UTILITY_SECONDS


def make_packs(cells: Sequence[TopologyCell], preset: Audit, machine: Machine, run: RunSettings) -> list[Pack]:
    """Packs of one (table, representation), split so that every core has work and none waits long for the last.

    A member of the odor model is a pack of its own, and the cells that need an unfinished member wait for the next
    round, so that no member is trained twice.

    Raises UserError when the largest distance matrix of a pack does not fit.
    """
    members = [c for c in cells if isinstance(c, MemberCell)]
    untrained = {(c.table, c.representation) for c in members}
    ready = [c for c in cells if (c.table, c.representation) not in untrained]
    budget = max(20.0, sum(map(_weight, members + ready)) / (3 * machine.cpus))
    groups: dict[tuple[str, str], list[list[TopologyCell]]] = {}
    spent: dict[tuple[str, str], float] = {}
    for cell in ready:
        place = (cell.table, cell.representation)
        parts = groups.setdefault(place, [[]])
        full = run.cells_per_pack and len(parts[-1]) >= run.cells_per_pack
        if parts[-1] and (full or spent[place] + _weight(cell) > budget):
            parts.append([])
            spent[place] = 0.0
        parts[-1].append(cell)
        spent[place] = spent.get(place, 0.0) + _weight(cell)
    pack = partial(_pack, preset=preset, room=machine.memory_bytes * _USABLE)
    out = [pack(f"{cell.table}-{cell.representation}-member", [cell]) for cell in members]
    diagrams = [
        pack(f"{table}-{representation}-{i:02d}", part)
        for (table, representation), parts in groups.items()
        for i, part in enumerate(parts)
    ]
    # the longest first, so that the cores end together; members before all, since the next round waits for them
    return out + sorted(diagrams, key=lambda p: -sum(_weight(c) for c in p.cells if isinstance(c, TopologyCell)))


def _pack(name: str, cells: Sequence[TopologyCell], *, preset: Audit, room: float) -> Pack:
    largest = max(cells, key=lambda c: cell_bytes(c, preset))
    needed = cell_bytes(largest, preset)
    if needed > room:
        raise UserError(
            f"{largest.table} {largest.representation}: the distances and H1 of {_rows(largest, preset)} rows need up "
            f"to {needed / 2**30:.1f} GiB and {room / 2**30:.1f} GiB may be used; choose fewer rows (--set rows=N, "
            "--set full_table=false) or a larger machine"
        )
    return Pack(name=name.replace(":", "-"), cells=tuple(cells), memory_bytes=needed)


def _rows(cell: TopologyCell, preset: Audit) -> int:
    return cell.rows if isinstance(cell, DiagramCell) else n_rows(cell.table, place_of(preset))


def cell_bytes(cell: TopologyCell, preset: Audit) -> int:
    """Peak memory of the process that computes a cell: for all but members, that of its largest distance matrix."""
    from analysis.persistence import predicted_bytes

    return _PROCESS_BYTES + (0 if isinstance(cell, MemberCell) else predicted_bytes(_rows(cell, preset)))
