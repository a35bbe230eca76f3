"""The audio tokens of a study: what they stand on, what identifies them, and the set made once per machine."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from data.codec_shards import Actors
from sweeps.codec.cells import LMCell, Study
from sweeps.codec.codec_choice import codec_lines
from sweeps.codec.corpora import Making, TokenSource, corpus_of
from sweeps.core.cells import UserError, digest
from sweeps.core.machine import user_cache
from sweeps.ledger.storage import Store


def banner(study: Study) -> list[str]:
    """What the numbers stand on."""
    corpus = corpus_of(study)
    lines = [corpus.banner(), *codec_lines(study)]
    if study.text:
        lines.append(f"texts: {corpus.texts}")
    if study.needs_gpu:
        lines.append("this preset is sized for a GPU and was not run where it was written")
    return lines


def check(study: Study) -> None:
    """Raise UserError where the audio, the texts of a text study or the codec's weights are unreachable."""
    corpus_of(study).check()


def fingerprint(cell: LMCell, study: Study) -> str:
    """Digest of the cell and of all that makes its tokens, and its texts where it is given some."""
    corpus = corpus_of(study)
    parts = [cell.identity(), corpus.origin()]
    if study.text and (texts := corpus.texts_origin()):
        parts.append(texts)
    return digest(parts)


def check_same_audio(cell: LMCell, study: Study, expected: str) -> None:
    """Raise UserError where recorded audio gives another fingerprint here than `expected`, that of the launch."""
    place = corpus_of(study).recorded_at()
    if place is not None and fingerprint(cell, study) != expected:
        raise UserError(
            f"the audio at {place} on {platform.node()} is not what the launch read (its recordings have "
            "other bytes, ids or texts); give every node the same files and run the same command again"
        )


def tokens_folder(study: Study) -> Path:
    """Where the tokens of a study are kept on this machine."""
    parts = [*corpus_of(study).origin(), study.holdout, study.chunk_s, study.min_s]
    return user_cache() / "codec_tokens" / digest(parts)[:16]


def open_source(
    study: Study,
    device: str,
    say: Callable[[str], None],
    ledger: Store | None = None,
    *,
    actors: int = 0,
    gpus_per_actor: float = 0,
) -> TokenSource:
    """The tokens of a study, made on first use in the user's cache; other processes of the machine wait for them.

    See `Making`; actors: their number, 0 to code in this process. Raises UserError for unreachable audio or weights.
    """
    folder = tokens_folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    say("waiting for the tokens")
    making = Making(device, say, ledger, Actors(actors, gpus=gpus_per_actor) if actors else None)
    with FileLock(folder / ".lock"):
        return corpus_of(study).source(folder, making)
