"""Holdout by hash of identity: an item's side depends on its own name and on nothing else.

Which other files the machine happens to have, and in what order they are listed, cannot move an item across.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Side = Literal["train", "validation"]


def identity_hash(identity: str, *, salt: str = "") -> int:
    """64-bit BLAKE2b hash of ``salt`` and ``identity``, the same on every machine and Python release."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8, key=salt.encode()[:64])
    return int.from_bytes(digest.digest(), "big")


def side_of(identity: str, *, holdout: float = 0.05, salt: str = "", part: int = 0) -> Side:
    """``"validation"`` for the ``holdout`` share of identities with the smallest hashes, else ``"train"``.

    ``part`` p holds out the next such share, from p times ``holdout`` on: parts have no identity in common.

    Growing ``holdout`` only ever moves items from train to validation. Pass what must not be shared between the
    sides: the recording and not its chunk, the molecule and not its row. Raises ValueError outside 0 <= holdout < 1,
    and for a part that is not whole.
    """
    if not 0.0 <= holdout < 1.0:
        raise ValueError(f"holdout={holdout} must lie in [0, 1); 0.05 holds out one item in twenty")
    if part < 0 or (part and (part + 1) * holdout > 1.0):
        raise ValueError(f"part={part} of holdout={holdout} must lie within the whole; choose a smaller one")
    place = identity_hash(identity, salt=salt)
    return "validation" if part * holdout * 2.0**64 <= place < (part + 1) * holdout * 2.0**64 else "train"
