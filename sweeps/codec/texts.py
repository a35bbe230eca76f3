"""Text conditioning in the sweep: which clips have a text of their own, and which texts a model is given.

A transcript belongs to a whole recording. Clips that are pieces of one are left out, for the models without text too,
so that all models of a study see the same clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.core.cells import UserError

if TYPE_CHECKING:
    import torch

    from data.token_batches import TokenClips
    from models.codec.model import CodecLMConfig
    from models.codec.text import Texts

NONE, BYTES = "none", "bytes"
KINDS = (NONE, BYTES)
RIGHT, SHUFFLED, NO_TEXT = "right", "shuffled", "no_text"
_DROPS = 0x7E87  # keeps the draws of dropped texts independent of the other draws of a seed and step


def arm_name(identity: Mapping[str, Any]) -> str:
    """What a cell's model is called in reports: its architecture, followed by `_text` with text conditioning."""
    name = str(identity["architecture"])
    return name if identity.get("text", NONE) == NONE else text_arm(name)


def text_arm(architecture: str) -> str:
    """The name of an architecture with text conditioning."""
    return f"{architecture}_text"


def with_own_text(
    clips: TokenClips, *, chunk_s: float, max_frames: int, max_bytes: int
) -> tuple[TokenClips, dict[str, int]]:
    """(clips that are whole recordings with a text of at most `max_bytes`, how many others there are by reason).

    Raises UserError when fewer than two are left: one cannot be given the text of another.
    """
    from models.codec.text import text_bytes

    size = np.array([len(text_bytes(text.strip())) for text in clips.texts])
    reasons = {
        "pieces of longer recordings": clips.n_chunks_C > 1,
        "of a chunk's full length, perhaps cut": clips.duration_s_C >= chunk_s,
        "longer than the context": clips.n_frames_C > max_frames,
        "without a text": size == 0,
        f"with a text of more than {max_bytes} bytes": size > max_bytes,
    }
    kept, counts = np.ones(len(clips), dtype=bool), {}
    for reason, wrong in reasons.items():
        if found := int((kept & wrong).sum()):
            counts[reason] = found
        kept &= ~wrong
    if kept.sum() < 2:
        why = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        raise UserError(
            f"{int(kept.sum())} of {len(clips)} clips of a side have a text of their own ({why}), and a text study "
            f"needs two on each; choose recordings with transcripts, a chunk_s (now {chunk_s:g}) above their length, "
            "or another holdout"
        )
    return clips.subset(np.flatnonzero(kept)), counts


def after_dropout(texts: Sequence[str], share: float, seed: int, step: int) -> list[str]:
    """The texts of a step's clips, each left empty with probability `share`; a function of seed and step."""
    draws = np.random.default_rng([seed, step, _DROPS]).random(len(texts))
    return ["" if draw < share else text for text, draw in zip(texts, draws, strict=True)]


def shuffled_texts(clips: TokenClips) -> list[str]:
    """For each clip another clip's text: in the order of their hashes, the text a few places further on.

    That number of places is the smallest that gives as few clips as possible a text equal to their own.
    """
    from data.split import identity_hash

    order = sorted(range(len(clips)), key=lambda c: identity_hash(clips.clip_ids[c], salt="text"))
    texts = [clips.texts[c] for c in order]

    def equal(places: int) -> int:
        return sum(a == b for a, b in zip(texts, texts[places:] + texts[:places], strict=True))

    places = min(range(1, len(texts)), key=equal)
    given = dict(zip(order, texts[places:] + texts[:places], strict=True))
    return [given[c] for c in range(len(clips))]


def given_texts(config: CodecLMConfig, texts: Sequence[str], device: torch.device | str) -> Texts | None:
    """The texts that a model is given with a batch: None without text conditioning."""
    from models.codec.text import encode_texts

    return None if config.text is None else encode_texts(texts, config.text.max_bytes).to(device)
