"""The stand-in codec that all cells of a ledger are coded with: trained once, kept in the ledger, loaded by every node.

Processors that round differently train different codecs from the same audio, and architectures compared on different
tokens are not comparable. The first codec that a launch publishes under `_codecs/` stays; every node loads that one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data._atomic import write_whole
from sweeps.core.cells import UserError
from sweeps.ledger.storage import Facts, Store, facts_of

if TYPE_CHECKING:
    from data.melvq import MelVQ

_FOLDER = "_codecs"
_DIGITS = 16  # of a SHA-256 in file names


def codec_file(ledger: Store | None, name: str, own: Path, train: Callable[[], MelVQ]) -> Path:
    """Local file of the codec called `name` in a ledger: `own` if that is the ledger's, else a copy next to `own`.

    ledger: None keeps the codec on this machine alone. own: where this machine keeps the one that `train` gives, which
    is called if neither the ledger nor this machine has one. Raises UserError for a damaged codec in the ledger.
    """
    if ledger is None or (known := _known(ledger, name)) is None:
        if not own.is_file():
            train().save(own)
        if ledger is None:
            return own
        _publish(ledger, name, own)
        if (known := _known(ledger, name)) is None:
            raise FileNotFoundError(2, "a codec that was published is gone", f"{ledger.uri}/{_pointer(name)}")
    if own.is_file() and facts_of(own) == known:
        return own
    copy = own.with_name(f"{own.stem}-{known.sha256[:_DIGITS]}{own.suffix}")
    if not copy.is_file() or facts_of(copy) != known:
        write_whole(copy, _read(ledger, name, known))
    return copy


def _pointer(name: str) -> str:
    return f"{_FOLDER}/{name}.json"


def _place(name: str, known: Facts) -> str:
    return f"{_FOLDER}/{name}-{known.sha256[:_DIGITS]}.npz"


def _known(ledger: Store, name: str) -> Facts | None:
    """Size and SHA-256 of the ledger's codec, None where it has none yet."""
    found = ledger.read_json(_pointer(name))
    if found is None:
        return None
    sha256, size = (found.get("sha256"), found.get("size")) if isinstance(found, dict) else (None, None)
    if not isinstance(size, int) or not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise _damaged(ledger, _pointer(name), "is not what a launch writes")
    return Facts(size, sha256)


def _publish(ledger: Store, name: str, own: Path) -> None:
    """Offer this machine's codec; the file goes first, and the pointer is made by one launch alone."""
    known = facts_of(own)
    ledger.replace(_place(name, known), own.read_bytes())
    ledger.create(_pointer(name), json.dumps(asdict(known)).encode())


def _read(ledger: Store, name: str, known: Facts) -> bytes:
    place = _place(name, known)
    return ledger.read_sound(place, known, lambda fault: _damaged(ledger, place, fault))


def _damaged(ledger: Store, place: str, fault: str) -> UserError:
    return UserError(
        f"the stand-in codec of this ledger is damaged: {ledger.uri}/{place} {fault}; bring it back from a copy, or "
        "choose another --storage, where it is trained again"
    )
