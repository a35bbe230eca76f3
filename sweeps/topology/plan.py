"""Cells and packs of the topology audit, and what finishing them takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from sweeps.core.cells import UserError, nearest
from sweeps.topology.cells import (
    FULL_TABLE,
    METRICS,
    NULLS,
    STUDIES,
    Audit,
    DiagramCell,
    MemberCell,
    TopologyCell,
    UtilityCell,
    kind_of,
    member_of,
    metrics_of,
)
from sweeps.topology.sources import Sources, table_name, trained_on


def plan(sources: Sources) -> list[TopologyCell]:
    """All cells of a preset; raises UserError."""
    preset = sources.preset
    _check(preset)
    sources.check_blanks()
    representations = (*preset.representations, *sources.embeddings)
    cells: list[TopologyCell] = []
    for representation in () if sources.is_cloud else representations:
        cells += _of_representation(sources, representation)
    clouds = [f"cloud:{c}" for c in preset.clouds] + ([sources.name] if sources.is_cloud else [])
    for cloud in clouds:
        cells += _diagrams(sources, table_name(cloud), "points")
    return cells


def _check(preset: Audit) -> None:
    """Raise UserError for values of the preset that make no sense whatever its table holds."""
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


def _of_representation(sources: Sources, representation: str) -> list[TopologyCell]:
    """The cells of a representation of the preset's table: its member's, and its diagrams or utility cells."""
    kind_of(representation)  # refuses an unknown name
    preset, table = sources.preset, sources.name
    cells: list[TopologyCell] = []
    member = member_of(representation)
    if unlabelled := _without_labels(sources, member):
        needs = "the utility study" if preset.study == "utility" else representation
        raise UserError(
            f"table {unlabelled} has 0 label columns and {needs} needs them; choose a labelled table, or the audit "
            "without pom_M (--set representations=bits_r4,bits_r2,counts_r4,physchem)"
        )
    if member is not None:
        cells.append(MemberCell(table=table, representation=representation, member=member, epochs=preset.pom_epochs))
    if preset.study == "utility":
        return cells + _utility(sources, representation)
    return cells + _diagrams(sources, table, representation)


def _without_labels(sources: Sources, member: int | None) -> str:
    """The table that labels are asked of and that has none, if any: a member's is the one it is trained on."""
    asked = [sources.name] if sources.preset.study == "utility" else []
    if member is not None:
        asked.append(trained_on(sources.name))
    return next((name for name in asked if not sources.table(name).labels), "")


def _utility(sources: Sources, representation: str) -> list[TopologyCell]:
    preset, table = sources.preset, sources.name
    total = sources.n_rows(table)
    if 5 * (preset.neighbours + 1) > total:
        raise UserError(
            f"neighbours={preset.neighbours} makes patches of {preset.neighbours + 1}, more than a fifth of the "
            f"table's {total} rows; choose neighbours <= {total // 5 - 1}"
        )
    return [
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


def subsample_rows(preset: Audit, total: int) -> int:
    """Rows of a run: the published rule (all when the table is not larger), or a real subsample for the audit."""
    if preset.rows < total:
        return preset.rows
    return total if preset.study == "paper" else int(0.8 * total)


def _diagrams(sources: Sources, table: str, representation: str) -> list[TopologyCell]:
    """Every run of a representation with its null draws, and the full table where the preset asks for it."""
    preset, total = sources.preset, sources.n_rows(table)
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
