"""Packs of the topology audit: cells of about equal work within the memory of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sweeps.core.cells import Pack, UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.topology.cells import OBSERVED, DiagramCell, MemberCell, TopologyCell
from sweeps.topology.sources import Sources

GROWTH = 2.3  # log-log slope of the H1 time in the number of rows, docs/benchmarks/topology.md
_H1_SECONDS = 0.03  # of one diagram of 1,000 rows on one core
_MEMBER_SECONDS = 60.0
_UTILITY_SECONDS = 120.0
_PROCESS_BYTES = 5 * 2**28  # an interpreter with Ray, RDKit, numba and torch loaded, and the features of a table
_USABLE = 0.75  # share of free memory that a pack may plan with


def _weight(cell: TopologyCell) -> float:
    """Rough CPU-seconds of a cell, for even packs; `--plan` measures instead (see `estimate`)."""
    if isinstance(cell, DiagramCell):
        factor = 2.0 if cell.null != OBSERVED else 1.0
        return factor * cell.draws * _H1_SECONDS * (cell.rows / 1000) ** GROWTH
    return _MEMBER_SECONDS if isinstance(cell, MemberCell) else _UTILITY_SECONDS


def make_packs(
    cells: Sequence[TopologyCell], sources: Sources, machine: Machine, run: RunSettings
) -> list[Pack[TopologyCell]]:
    """Packs of one (table, representation), split so that every core has work and none waits long at the end.

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
    pack = partial(_pack, sources=sources, room=machine.memory_bytes * _USABLE)
    out = [pack(f"{cell.table}-{cell.representation}-member", [cell]) for cell in members]
    diagrams = [
        pack(f"{table}-{representation}-{i:02d}", part)
        for (table, representation), parts in groups.items()
        for i, part in enumerate(parts)
    ]
    # the longest first, so that the cores end together; members before all, since the next round waits for them
    return out + sorted(diagrams, key=lambda p: -sum(_weight(c) for c in p.cells))


def _pack(name: str, cells: Sequence[TopologyCell], *, sources: Sources, room: float) -> Pack[TopologyCell]:
    largest = max(cells, key=lambda c: cell_bytes(c, sources))
    needed = cell_bytes(largest, sources)
    if needed > room:
        raise UserError(
            f"{largest.table} {largest.representation}: the distances and H1 of {_rows(largest, sources)} rows need up "
            f"to {needed / 2**30:.1f} GiB and {room / 2**30:.1f} GiB may be used; choose fewer rows (--set rows=N, "
            "--set full_table=false) or a larger machine"
        )
    return Pack(name=name.replace(":", "-"), cells=tuple(cells), memory_bytes=needed)


def _rows(cell: TopologyCell, sources: Sources) -> int:
    return cell.rows if isinstance(cell, DiagramCell) else sources.n_rows(cell.table)


def cell_bytes(cell: TopologyCell, sources: Sources) -> int:
    """Peak memory of the process that computes a cell: for all but members, that of its largest distance matrix."""
    from analysis.topology.persistence import predicted_bytes

    return _PROCESS_BYTES + (0 if isinstance(cell, MemberCell) else predicted_bytes(_rows(cell, sources)))
