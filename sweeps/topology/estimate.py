"""What finishing cells of the topology audit takes, from a probe of a few seconds at small size.

Seconds are CPU-seconds of one core: what a pack needs when nothing else uses its core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from sweeps.core.cells import Estimate
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.topology.cells import OBSERVED, DiagramCell, MemberCell, TopologyCell, UtilityCell, kind_of
from sweeps.topology.packs import GROWTH, cell_bytes, make_packs
from sweeps.topology.sources import CLOUD_ROWS, Sources

_ROWS = 400  # of the probe's distance matrices
_MEMBER_ROWS = 512
_EMBEDDING = 256  # dimensions that stand in for an embedding not computed yet
_NOMINAL = {"diagram": 0.03, "member": 60.0, "utility": 120.0}  # CPU-seconds, one core, 1,000 rows; when not measured


def estimate(cells: Sequence[TopologyCell], sources: Sources, machine: Machine, run: RunSettings) -> Estimate:
    """Shared work, memory and time to finish `cells` on this machine."""
    if not cells:
        return Estimate(seconds=0.0, basis="nothing to do")
    probe = _Probe(sources) if run.probe else None
    busy = sum(probe.seconds(cell) if probe else _nominal(cell) for cell in cells)
    measured = "CPU time of a short probe at small size, so without other load"
    abreast = max(1, min(machine.cpus, len(make_packs(cells, sources, machine, run))))
    return Estimate(
        shared=_shared(cells),
        memory_bytes=max(cell_bytes(cell, sources) for cell in cells),
        seconds=busy / abreast,
        basis=f"{abreast} packs at once; {measured if probe else 'nominal times of one core, not measured'}",
    )


def _shared(cells: Sequence[TopologyCell]) -> tuple[str, ...]:
    members = sum(isinstance(c, MemberCell) for c in cells)
    diagrams = [c for c in cells if isinstance(c, DiagramCell)]
    places = {(c.table, c.representation) for c in cells}
    lines = [f"{len(places)} representations, each computed once a process for all its cells"]
    if members:
        lines.append(f"{members} members of the odor model to train, each once, kept for every other preset")
    if diagrams:
        nulls = sum(c.draws for c in diagrams if c.null != OBSERVED)
        observed = sum(c.null == OBSERVED for c in diagrams)
        lines.append(f"{observed} observed diagrams and {nulls} null draws")
    return tuple(lines)


def _nominal(cell: TopologyCell) -> float:
    if isinstance(cell, DiagramCell):
        return _NOMINAL["diagram"] * cell.draws * (1 + (cell.null != OBSERVED)) * (cell.rows / 1000) ** GROWTH
    return _NOMINAL[cell.kind]


class _Probe:
    """Seconds of each kind of work, measured once at small size and scaled to the cell's."""

    def __init__(self, sources: Sources) -> None:
        self.sources, self.known = sources, dict[tuple[object, ...], float]()

    def seconds(self, cell: TopologyCell) -> float:
        if isinstance(cell, DiagramCell):
            rows = min(cell.rows, _ROWS)
            kind = (
                cell.table,
                kind_of(cell.representation),
                cell.metric,
                cell.null,
                cell.null_stream,
                bool(cell.landmarks),
            )
            one = self._once((*kind, rows), lambda: self._diagram(cell, rows))
            return one * cell.draws * (cell.rows / rows) ** GROWTH
        if isinstance(cell, MemberCell):
            return self._once(("member", cell.table, cell.epochs), lambda: self._member(cell))
        assert isinstance(cell, UtilityCell)
        rows = self.sources.n_rows(cell.table)
        patch = self._once(("patches", cell.metric), lambda: self._patches(cell)) * rows
        from sweeps.topology.utility import families, fold_count

        for family, draws in families(cell.permutations):
            fit = self._once((family, rows), lambda: _regression(family, rows))  # noqa: B023 - called at once
            patch += fold_count(cell, rows, family) * (3 + draws) * fit
        return patch

    def _once(self, name: tuple[object, ...], measure: Callable[[], float]) -> float:
        if name not in self.known:
            self.known[name] = measure()
        return self.known[name]

    def _diagram(self, cell: DiagramCell, rows: int) -> float:
        from sweeps.topology.run import filtration, finite_h1, null_rows

        x_nD, every_n = self._sample(cell, rows), np.arange(rows)

        def draw() -> None:
            drawn_nD = x_nD if cell.null == OBSERVED else null_rows(cell, 0, x_nD, every_n)
            finite_h1(filtration(drawn_nD, cell.metric, min(cell.landmarks, rows), 0))

        return _best(draw)

    def _sample(self, cell: TopologyCell, rows: int) -> np.ndarray:
        """`rows` rows of the representation itself, or Gaussian ones where it is trained or projected first."""
        from data import molecules

        if cell.representation in molecules.FEATURES:
            smiles = self.sources.table(cell.table).smiles
            step = max(1, len(smiles) // rows)
            return np.asarray(molecules.featurise(smiles[::step][:rows], cell.representation))
        if cell.representation == "points":
            return self.sources.matrix(cell.table, "points")[: min(rows, CLOUD_ROWS)]
        return np.random.default_rng(0).normal(size=(rows, _EMBEDDING))

    def _member(self, cell: MemberCell) -> float:
        """Seconds of a member: its start and each epoch, measured on a part of the table and scaled to the whole."""
        from models.odor.member import default_batch_size, train_member

        rows = self.sources.training_table(cell.table)
        step = max(1, len(rows) // _MEMBER_ROWS)
        smiles, labels_NL = rows.smiles[::step], rows.labels_NL[::step]
        both_L = labels_NL.min(axis=0) < labels_NL.max(axis=0)
        size = default_batch_size(len(rows))

        def train(epochs: int) -> float:
            began = time.process_time()
            train_member(smiles, labels_NL[:, both_L], 0, epochs=epochs, batch_size=size, threads=1)
            return time.process_time() - began

        train(1)
        start, longer = train(1), train(3)
        return (start + (cell.epochs - 1) * max(0.0, longer - start) / 2) * len(rows) / len(smiles)

    def _patches(self, cell: UtilityCell) -> float:
        """Seconds per row: its patch and both blocks of features."""
        from analysis.topology import utility
        from analysis.topology.distances import distance_matrix
        from analysis.topology.persistence import h1

        x_ND = np.asarray(self._sample(cell, _ROWS))
        distance_NN = distance_matrix(x_ND, cell.metric)
        k = min(cell.neighbours, len(x_ND) - 1)

        def blocks() -> None:
            patches_NP = utility.patches(distance_NN, k)
            utility.geometry_block(distance_NN, np.asarray(x_ND, np.float64), patches_NP)
            utility.topology_block(distance_NN, patches_NP, h1=h1)

        return _best(blocks, repeats=1) / len(x_ND)


def _regression(family: str, rows: int) -> float:
    """Seconds of one fit of the three targets on the features of both blocks."""
    from analysis.topology import utility
    from analysis.topology.utility_models import FAMILIES

    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, len(utility.GEOMETRY) + len(utility.TOPOLOGY)))
    y = x[:, : len(utility.TARGETS)] + rng.normal(size=(rows, len(utility.TARGETS)))
    return _best(lambda: FAMILIES[family](x[None], y, x[None]), repeats=1)


def _best(work: Callable[[], object], repeats: int = 3) -> float:
    """Least CPU-seconds of `work`, after one call that compiles or loads what it needs."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])
