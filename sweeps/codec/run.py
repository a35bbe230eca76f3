"""Trains, evaluates, samples and publishes the language models of a pack.

Shapes: B clips, K codebooks, T steps.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from data.audio_io import first_of_each
from data.split import Side
from data.token_batches import TokenClips
from sweeps.codec.cell_run import CellRun
from sweeps.codec.evaluate import unigram_nll
from sweeps.codec.halving import compete
from sweeps.codec.loop import AnomalyError
from sweeps.codec.tokens import check_same_audio, open_source
from sweeps.core.cells import UserError
from sweeps.launch.context import PackContext
from sweeps.launch.stop import PackStopped

if TYPE_CHECKING:
    from sweeps.codec.cells import HalvedCell, LMCell, Study
_NAMED = 3  # odd recordings of each kind that are named on the screen


def run_pack(cells: Sequence[LMCell], study: Study, context: PackContext) -> None:
    """Every cell of the pack, one after the other, on the same tokens, in each of the processes that share the work.

    Raises UserError where a GPU is needed and there is none, PackStopped when the work was asked to stop.
    """
    if study.needs_gpu and context.device == "cpu":
        raise UserError(
            "this preset is sized for a GPU and this machine has none; run it where there is one, or try it here with "
            "--set needs_gpu=false"
        )
    torch.set_num_threads(context.threads)
    check_same_audio(cells[0], study, context.fingerprint(cells[0]))
    ledger = context.ledger.store
    source = open_source(study, context.device, lambda line: context.progress(force=True, phase=line), ledger)
    if source.tokens.computed and source.tokens.oddities and context.world.first:
        context.note(f"odd recordings: {first_of_each(source.tokens.oddities, _NAMED)}")

    @functools.cache
    def split(part: int) -> tuple[TokenClips, TokenClips, float, dict[str, int]]:
        """Training and held-out clips, the unigram model's score on the latter, and how many clips are left out."""
        both: tuple[Side, Side] = ("train", "validation")
        try:
            sides = [TokenClips(source.tokens, side, holdout=study.holdout, part=part) for side in both]
        except ValueError as error:
            raise UserError(f"{error}; choose another holdout or more audio") from error
        (training, held_out), left_out = _usable(cells[0], sides, context)
        return training, held_out, unigram_nll(training, held_out), left_out

    def open_run(cell: LMCell) -> CellRun:
        training, held_out, baseline, left_out = split(cell.eval_part)
        return CellRun(cell, study, source, cell.training_clips(training), held_out, context, baseline, left_out)

    halved: dict[str, list[HalvedCell]] = {}
    for cell in cells:
        if cell.rival_seeds:
            rival = cast("HalvedCell", cell)
            halved.setdefault(rival.contest, []).append(rival)
            continue
        if context.world.sum([float(context.stopping())])[0]:
            raise PackStopped("stopped between two cells")
        context.begin(cell, cell=cell.key)
        try:
            open_run(cell).go()
        except AnomalyError as error:
            if context.world.first:
                _give_up(cell, error, context)
    for rivals in halved.values():
        compete(rivals, open_run, lambda cell, error: _give_up(cell, error, context), context)


def _usable(cell: LMCell, sides: Sequence[TokenClips], context: PackContext) -> tuple[list[TokenClips], dict[str, int]]:
    """(clips of each side that the study uses, how many others there are by reason); a note names the others."""
    kept, left_out = [], Counter[str]()
    for side in sides:
        clips, others = cell.usable_clips(side)
        kept.append(clips)
        left_out.update(others)
    if left_out and context.world.first:
        why = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        context.note(f"text: {left_out.total()} of {sum(map(len, sides))} clips are left out for all models: {why}")
    return kept, dict(left_out)


def _give_up(cell: LMCell, error: AnomalyError, context: PackContext) -> None:
    name = f"{cell.key}-anomaly"
    batch = {"inputs": error.batch.inputs_BKT.cpu(), "targets": error.batch.targets_BKT.cpu()}
    context.work.save(name, error.step, batch)
    context.fail(cell, f"{error}; the batch is kept in _work/{name}")
    context.work.drop(cell.whole().key)
