"""Runs a pack of the topology audit: diagrams of subsamples and null draws, model members, utility.

Shape suffixes: N rows of a table, n rows of a run, D columns, P diagram points.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Sequence

import numpy as np

from analysis.topology import nulls
from analysis.topology.distances import distance_matrix
from analysis.topology.null_tests import top1_quantile
from analysis.topology.persistence import h1, landmarks
from data import molecules
from models.odor.member import embed, split, train_member
from sweeps.core.cells import Row, UserError
from sweeps.launch.context import PackContext
from sweeps.topology.cells import (
    OBSERVED,
    Audit,
    DiagramCell,
    MemberCell,
    TopologyCell,
    UtilityCell,
    landmark_seed,
    member_of,
    null_seed,
    run_rows,
)
from sweeps.topology.sources import Sources, trained_on
from sweeps.topology.utility import utility_rows


def run_pack(cells: Sequence[TopologyCell], preset: Audit, context: PackContext) -> None:
    """Compute and publish every cell."""
    began = time.monotonic()
    own = _Representations(Sources(preset), context)
    for done, cell in enumerate(cells, start=1):
        context.check_stop()
        context.begin(cell, phase=f"{cell.table} {cell.representation}")
        try:
            if isinstance(cell, MemberCell):
                own.member(cell)
            elif isinstance(cell, DiagramCell):
                _diagrams(cell, own, context)
            elif isinstance(cell, UtilityCell):
                _utility(cell, own, context)
        except ValueError as error:
            raise UserError(str(error)) from error
        rate = done / (time.monotonic() - began)
        context.progress(done=done, total=len(cells), eta=(len(cells) - done) / rate)


class _Representations:
    """Representations of this pack; the own odor model's come from the ledger.

    A member is missing there only if its cell was not planned (`--only`) or another launch is still training it; then
    it is trained and published here, too, and the first result stays.
    """

    def __init__(self, sources: Sources, context: PackContext) -> None:
        self.sources, self.context = sources, context

    @functools.lru_cache(maxsize=4)  # noqa: B019 - one instance a process
    def matrix(self, table: str, representation: str) -> np.ndarray:
        member = member_of(representation)
        if member is None:
            x_ND = self.sources.matrix(table, representation)
            return molecules.zscore(x_ND) if representation == "physchem" else x_ND
        epochs = self.sources.preset.pom_epochs
        cell = MemberCell(table=table, representation=representation, member=member, epochs=epochs)
        if not self.context.ledger.done([cell.key]):
            self.member(cell)
        return np.load(io.BytesIO(self.context.ledger.file(cell.key, "embedding.npy")))

    def member(self, cell: MemberCell) -> None:
        """Train and publish a member; on a table without labels, one that was trained on the curated table."""
        rows, own = self.sources.training_table(cell.table), self.sources.table(cell.table)
        self.context.progress(force=True, phase=f"training {cell.representation}")

        def progress(epoch: int, auroc: float) -> None:
            self.context.curve(cell, epoch, {"auroc_val": auroc})
            self.context.progress(
                phase=f"training {cell.representation}, epoch {epoch}/{cell.epochs}, validation AUROC {auroc:.3f}"
            )

        result = train_member(
            rows.smiles,
            rows.labels_NL,
            cell.member,
            epochs=cell.epochs,
            threads=self.context.threads,
            progress=progress,
        )
        out = [
            Row("auroc_test", result.auroc_test),
            Row("auroc_val", result.auroc_val),
            Row("labels_scored", result.labels_scored, "labels"),
            Row("best_epoch", result.epoch, "epochs"),
        ]
        files = {"embedding.npy": _npy(result.embedding_NE)}
        if trained_on(cell.table) != cell.table:
            learnt_N = molecules.found_among(own.smiles, [rows.smiles[i] for i in split(rows.labels_NL).train])
            out.append(Row("rows_trained_on", int(learnt_N.sum()), "rows"))
            out.append(Row("rows_of_training_table", self.sources.borrowed_rows(cell.table), "rows"))
            embedding_NE = embed(result.net, own.smiles, self.context.threads)
            files = {"embedding.npy": _npy(embedding_NE), "trained_on.npy": _npy(learnt_N)}
        self.context.publish(cell, out, files)


def _diagrams(cell: DiagramCell, own: _Representations, context: PackContext) -> None:
    x_ND = own.matrix(cell.table, cell.representation)
    rows_n = run_rows(len(x_ND), cell.run, cell.rows)
    out: list[Row] = []
    diagrams = []
    for draw in range(cell.first_draw, cell.first_draw + cell.draws):
        drawn_nD = x_ND[rows_n] if cell.null == OBSERVED else null_rows(cell, draw, x_ND, rows_n)
        distance_nn = filtration(drawn_nD, cell.metric, cell.landmarks, landmark_seed(cell, draw))
        pairs_P2 = finite_h1(distance_nn)
        diagrams.append(pairs_P2)
        length_P = pairs_P2[:, 1].astype(np.float64) - pairs_P2[:, 0]
        at = {"run": cell.run, "draw": draw}
        out += [
            Row("h1_top1", float(length_P.max(initial=0.0)), "distance", at),
            Row("h1_total", float(length_P.sum()), "distance", at),
            Row("h1_count", len(pairs_P2), "features", at),
        ]
        if cell.null == OBSERVED:
            out.append(Row("h1_top1_quantile", top1_quantile(pairs_P2, distance_nn), "share of distances", at))
        context.curve(cell, draw + 1, {"h1_top1": float(length_P.max(initial=0.0))})
        context.progress(phase=f"{cell.representation} {cell.null} draw {draw + 1}")
    out.append(Row("h1_top1_mean", float(np.mean([r.value for r in out if r.metric == "h1_top1"])), "distance"))
    lengths = np.array([len(p) for p in diagrams])
    packed = io.BytesIO()
    np.savez_compressed(packed, pairs=np.concatenate(diagrams), lengths=lengths)
    context.publish(cell, out, {"diagrams.npz": packed.getvalue()})
    context.progress(best=max(r.value for r in out if r.metric == "h1_top1"))


def null_rows(cell: DiagramCell, draw: int, x_ND: np.ndarray, rows_n: np.ndarray) -> np.ndarray:
    """A run's rows [n, D] under its null: of a draw of the whole table (joint), or drawn from the run's rows alone.

    Subsamples of one table overlap, so their observed values are correlated. Null values are correlated in the same way
    only if draw b is one table for all runs, which a test of their mean needs; margins then hold in the whole table.
    """
    sample = getattr(nulls, cell.null)
    if cell.null_stream == "joint":
        return sample(x_ND, null_seed(cell, draw), stream="fast")[rows_n]
    return sample(x_ND[rows_n], null_seed(cell, draw), stream=cell.null_stream)


def filtration(x_nD: np.ndarray, metric: str, n_landmarks: int, seed: int) -> np.ndarray:
    """Distances of the rows [n, n], or of their greedy landmarks."""
    distance_nn = distance_matrix(x_nD, metric)
    if not n_landmarks:
        return distance_nn
    chosen = landmarks(distance_nn, n_landmarks, seed)
    return np.ascontiguousarray(distance_nn[np.ix_(chosen, chosen)])


def finite_h1(distance_nn: np.ndarray) -> np.ndarray:
    """Finite H1 pairs [P, 2] of the Rips filtration."""
    pairs = h1(distance_nn)
    return pairs[np.isfinite(pairs).all(axis=1)]


def _utility(cell: UtilityCell, own: _Representations, context: PackContext) -> None:
    rows = own.sources.table(cell.table)

    def progress(phase: str) -> None:
        context.progress(force=True, phase=f"{cell.representation}: {phase}")

    out = utility_rows(cell, own.matrix(cell.table, cell.representation), rows, progress)
    context.publish(cell, out, {})


def _npy(x: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()
