"""Successive halving over the learning rates of an architecture, synchronous, inside one pack.

All rates train to the first rung; the best 1/eta of them, by the held-out NLL of averaged weights, its mean over the
seeds, go on to the next (Jamieson & Talwalkar 2016, AISTATS, Algorithm 1 with fixed rungs). The rest are published as
they stand, with the row `stopped_at`. Unlike asynchronous halving (ASHA) no decision depends on which trial was faster,
so a run that is killed and continued, or repeated, makes the same decision.

A search's early stopping (search/halving.py) decides by the same rule between packs, each rung a cell of its own. Here
rivals and rungs are part of a cell's key and a stopped rival is published as that cell: the two share the rule alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sweeps.codec.loop import AnomalyError
from sweeps.launch.context import PackContext
from sweeps.launch.stop import PackStopped
from sweeps.search.halving import survivors

if TYPE_CHECKING:
    from sweeps.codec.cells import HalvedCell


def compete(
    cells: Sequence[HalvedCell],
    open_run: Callable[[HalvedCell], Any],
    give_up: Callable[[HalvedCell, AnomalyError], None],
    context: PackContext,
) -> None:
    """Train the learning rates of one architecture against each other and publish `cells`, those that are missing.

    Rivals outside `cells` (published before, or of another launch) take part: their score is read from the ledger, or
    they are trained as far as a decision needs it and not published.
    """
    first, ours = cells[0], {cell.key for cell in cells}
    alive = list(first.rivals)
    for rung in (*first.rungs, first.steps):
        running = [replace(first, lr=lr, seed=seed) for lr in alive for seed in first.rival_seeds]
        last = rung == first.steps
        for cell in running:
            if last and cell.key not in ours:
                continue
            if context.world.sum([float(context.stopping())])[0]:
                raise PackStopped("stopped between two cells")
            if not context.world.share(_over(cell, context)):
                _train(cell, rung, last, open_run, give_up, context)
        if last:
            return
        found = context.world.share([_score(cell, rung, context) for cell in running])
        means = {lr: fmean(s for cell, s in zip(running, found, strict=True) if cell.lr == lr) for lr in alive}
        alive = survivors(means, first.eta)
        for cell in running:
            if cell.lr not in alive and cell.key in ours and not context.world.share(_over(cell, context)):
                run = open_run(cell)
                run.train_to(rung)  # reads the checkpoint
                run.publish(math.nan)


def _train(
    cell: HalvedCell,
    rung: int,
    last: bool,
    open_run: Callable[[HalvedCell], Any],
    give_up: Callable[[HalvedCell, AnomalyError], None],
    context: PackContext,
) -> None:
    context.begin(cell, cell=cell.key)
    run = open_run(cell)
    try:
        rate = run.train_to(rung)
    except AnomalyError as error:
        if context.world.first:
            give_up(cell, error)
        return
    if last:
        run.publish(rate)


def _over(cell: HalvedCell, context: PackContext) -> bool:
    """Whether the cell is published or has failed."""
    return bool(context.ledger.done([cell.key]) or context.ledger.failures([cell.key]))


def _score(cell: HalvedCell, rung: int, context: PackContext) -> float:
    """Held-out NLL of the averaged weights at a rung, from the ledger or the checkpoint; infinite for a failed cell."""
    if context.ledger.done([cell.key]):
        rows = context.ledger.read(cell.key).rows
        at = (rows["metric"] == "val_nll") & (rows["weights"] == "ema") & (rows["step"] == rung)
        values = rows.loc[at, "value"].tolist()
    else:
        state = context.work.load(cell.key, origin=context.fingerprint(cell))
        curve = json.loads(state["watch"])["curve"] if state else []
        values = [value for metric, step, value in curve if metric == "val_nll/ema" and step == rung]
    return float(values[0]) if values else math.inf
