"""`proxy_gap.py --tokenise`: the documents of `--set text=…` as tokens of every model, beforehand and resumable."""

from __future__ import annotations

import argparse
import sys

from data.token_stream import CorruptShard
from sweeps.core.cells import UserError, nearest
from sweeps.core.machine import prepare_process
from sweeps.core.settings import RunSettings, add_settings, apply_settings
from sweeps.sae.presets import PRESETS
from sweeps.sae.sources import longest_reads, open_stream
from sweeps.sae.sweep import SWEEP


def parser() -> argparse.ArgumentParser:
    """The command line of tokenising."""
    p = argparse.ArgumentParser(
        prog="python sweeps/proxy_gap.py",
        description="Tokenise the documents of --set text=… for every model of a preset, as far as its largest budget "
        "needs them. A stopped run continues after the last whole shard; the sweep finds the tokens by itself "
        "($PLUMBLINE_CACHE, a folder that all nodes share on a cluster).",
    )
    p.add_argument("--tokenise", action="store_true", required=True)
    p.add_argument("--preset", default=SWEEP.default_preset, metavar="P")
    add_settings(p, SWEEP.options)
    return p


def main(argv: list[str]) -> int:
    """Make the tokens; returns the exit code (2 for bad input)."""
    arguments = parser().parse_args(argv)
    try:
        prepare_process()
        if arguments.preset not in PRESETS:
            hint = nearest(arguments.preset, PRESETS)
            raise UserError(f"preset {arguments.preset!r} is not known{hint}; presets: {', '.join(PRESETS)}")
        preset, run = apply_settings(arguments.set, PRESETS[arguments.preset], RunSettings())
        if not preset.text:
            raise UserError("there is nothing to tokenise; name documents with --set text=OWNER/NAME|DIR|FILE")
        cells = SWEEP.plan(preset)
        run = SWEEP.pin(cells, run)
        for cell in longest_reads(cells):
            print(f"{cell.model}:")
            stream = open_stream(cell, run, say=lambda line: print(f"  {line}", flush=True))
            stream.require(cell.tokens, cell.held_out_end)
            print(f"  {stream.n_train():,} training sequences of {cell.context} tokens in {stream.source}")
    except (CorruptShard, ValueError) as error:
        print(f"proxy_gap: {error}", file=sys.stderr)
        return 2
    return 0
