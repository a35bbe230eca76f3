"""The cells of a memory-caching pack, on their tokens: those of the audio, then those of the planted task."""

from __future__ import annotations

from collections.abc import Sequence

from sweeps.caching.cells import CacheCell, CacheStudy
from sweeps.codec.run import run_pack as run_codec_pack
from sweeps.launch.context import PackContext


def run_pack(cells: Sequence[CacheCell], study: CacheStudy, context: PackContext) -> None:
    """Train, evaluate and publish; raises what `run.run_pack` raises."""
    for planted in (False, True):
        some = [cell for cell in cells if (cell.corpus == "recall") is planted]
        if some:
            run_codec_pack(some, study.token_study(planted=planted), context)
