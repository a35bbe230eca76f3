"""Packs in their order, claimed a few at a time as there is room for them: launches on one ledger share a grid."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sweeps.core.cells import Pack
from sweeps.ledger.claims import Claims

_AGAIN_SECONDS = 2.0  # a claim that lasted for less is followed by one of twice as many packs
_MOST = 64


class Queue:
    """What is left of a round's packs. `next` gives the next one with those of its cells that are free, now ours.

    Claims cost a few requests each: while packs are used up faster than one claim in _AGAIN_SECONDS, more are claimed
    at a time; long packs are claimed one by one, and whoever is free first takes the next.
    """

    def __init__(self, packs: Sequence[Pack], claims: Claims, fingerprints: Mapping[str, str]) -> None:
        self.packs = tuple(packs)
        self.taken: list[Pack] = []
        self._claims, self._fingerprints = claims, fingerprints
        self._waiting, self._ready = deque(packs), deque[Pack]()
        self._size, self._claimed = 1, -float("inf")

    def next(self) -> Pack | None:
        """The next pack; None when nothing is left that no other launch holds."""
        while self._waiting and not self._ready:
            self._claim()
        if not self._ready:
            return None
        self.taken.append(self._ready.popleft())
        return self.taken[-1]

    def _claim(self) -> None:
        now = time.monotonic()
        self._size = min(_MOST, 2 * self._size) if now - self._claimed < _AGAIN_SECONDS else 1
        self._claimed = now
        some = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
        keys = [cell.key for pack in some for cell in pack.cells]
        ours = set(self._claims.claim(keys, fingerprints=self._fingerprints)[0])
        for pack in some:
            if cells := tuple(cell for cell in pack.cells if cell.key in ours):
                self._ready.append(replace(pack, cells=cells))
