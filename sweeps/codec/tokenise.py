"""`codec_lm.py --tokenise`: the tokens of a preset made beforehand by Ray Data actors, resumable shard by shard."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sweeps.codec.presets import OPTIONS, PRESETS
from sweeps.core.cells import UserError, nearest
from sweeps.core.machine import prepare_process
from sweeps.core.settings import RunSettings, add_settings, apply_settings
from sweeps.launch.ray_session import connect

if TYPE_CHECKING:
    from sweeps.codec.cells import Study


def parser() -> argparse.ArgumentParser:
    """The command line of tokenising."""
    p = argparse.ArgumentParser(
        prog="python sweeps/codec_lm.py",
        description="Code a preset's audio with Ray Data actors. A stopped run continues at the shard where it was; "
        "the sweep finds the tokens by itself ($PLUMBLINE_CACHE, a folder that all nodes share on a cluster).",
    )
    p.add_argument("--tokenise", action="store_true", required=True)
    p.add_argument("--preset", default="speech_a100", metavar="P")
    add_settings(p, OPTIONS)
    p.add_argument("--actors", type=int, default=1, help="actors that code at the same time")
    p.add_argument("--gpus-per-actor", type=float, default=0.0, help="share of a GPU that an actor holds; 0: CPU")
    p.add_argument("--address", default=None, metavar="ADDR", help="Ray cluster to join (auto, HOST:PORT)")
    return p


def main(argv: list[str]) -> int:
    """Make the tokens; returns the exit code (2 for bad input)."""
    import sys

    try:
        prepare_process()
        for line in tokenise(parser().parse_args(argv)):
            print(line)
    except UserError as error:
        print(f"codec_lm: {error}", file=sys.stderr)
        return 2
    return 0


def tokenise(arguments: argparse.Namespace) -> list[str]:
    """Code what is missing; returns what to print. Raises UserError for bad input."""
    import ray

    from data.audio_io import first_of_each
    from sweeps.codec.tokens import banner, check, open_source, tokens_folder

    if arguments.preset not in PRESETS:
        hint = nearest(arguments.preset, PRESETS)
        raise UserError(f"preset {arguments.preset!r} is not known{hint}; presets: {', '.join(PRESETS)}")
    if arguments.actors < 1:
        raise UserError(f"actors={arguments.actors} code nothing; choose actors >= 1")
    study: Study = apply_settings(arguments.set, PRESETS[arguments.preset], RunSettings())[0]
    check(study)
    machine = connect(arguments.address, str(tokens_folder(study)))
    try:
        if arguments.actors + 1 > machine.cpus:
            raise UserError(
                f"actors={arguments.actors} need {arguments.actors + 1} CPUs, one for reading, and there are "
                f"{machine.cpus}; choose fewer"
            )
        device = "cuda" if arguments.gpus_per_actor else "cpu"
        source = open_source(study, device, print, actors=arguments.actors, gpus_per_actor=arguments.gpus_per_actor)
    finally:
        ray.shutdown()
    m = source.tokens.manifest
    return [
        *banner(study),
        f"{len(m['shards'])} shards, {source.tokens.computed} of them made now: {m['n_clips']} clips, "
        f"{m['audio_s']:.0f} s, {m['n_tokens']:,} tokens",
        f"odd recordings: {first_of_each(source.tokens.oddities, 3)}",
        f"tokens       {source.tokens.folder}",
    ]
