"""Launches that share one grid: each takes the next packs when it has room, and no cell is taken twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from sweeps.core.cells import Cell, Pack
from sweeps.launch.pack_queue import Queue
from sweeps.ledger.claims import Claims
from sweeps.ledger.storage import Store


@dataclass(frozen=True, kw_only=True)
class Point(Cell):
    SWEEP: ClassVar[str] = "points"
    VERSION: ClassVar[str] = "1"
    x: int


def packs(n: int, size: int = 1) -> list[Pack]:
    cells = [Point(x=x) for x in range(n * size)]
    return [Pack(name=f"pack{i}", cells=tuple(cells[i * size : (i + 1) * size])) for i in range(n)]


def work(queue: Queue, seconds: float) -> None:
    while queue.next() is not None:
        time.sleep(seconds)


def test_two_launches_share_a_grid_of_equal_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each does its half: with room for one pack at a time, neither holds more than what it works on."""
    launches = [Claims(Store(str(tmp_path))) for _ in range(2)]
    monkeypatch.setattr("sweeps.launch.pack_queue._AGAIN_SECONDS", 0.0)  # these packs stand for long ones
    queues = [Queue(packs(30), claims, {}) for claims in launches]
    threads = [threading.Thread(target=work, args=(queue, 0.05)) for queue in queues]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = [[cell.x for pack in queue.taken for cell in pack.cells] for queue in queues]
        assert sorted(taken[0] + taken[1]) == list(range(30))
        assert min(len(some) for some in taken) >= 12  # of 15: 0.6 of the grid's time at most
    finally:
        for claims in launches:
            claims.release()


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    made = Claims(Store(str(tmp_path)))
    yield made
    made.release()


def requests(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The keys of each claim that follows."""
    asked: list[Sequence[str]] = []
    claim = claims.claim

    def counted(keys: Sequence[str], **options: object) -> object:
        asked.append(list(keys))
        return claim(keys, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(claims, "claim", counted)
    return asked


def test_short_packs_are_claimed_many_at_a_time(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(claims, monkeypatch)
    queue = Queue(packs(500), claims, {})
    work(queue, 0.0)
    assert len(queue.taken) == 500
    assert len(asked) <= 16
    assert len(asked[0]) == 1


def test_long_packs_are_claimed_one_by_one(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(claims, monkeypatch)
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr("sweeps.launch.pack_queue.time.monotonic", lambda: float(next(clock)))
    work(Queue(packs(5), claims, {}), 0.0)
    assert [len(keys) for keys in asked] == [1] * 5


def test_a_pack_comes_with_those_of_its_cells_that_are_free(tmp_path: Path) -> None:
    first, second = Claims(Store(str(tmp_path))), Claims(Store(str(tmp_path)))
    try:
        first.claim([Point(x=x).key for x in (0, 1, 2)])
        queue = Queue(packs(2, size=2), second, {})
        pack = queue.next()
        assert pack is not None
        assert (pack.name, [cell.x for cell in pack.cells]) == ("pack1", [3])
        assert queue.next() is None
        assert [p.name for p in queue.taken] == ["pack1"]
    finally:
        first.release()
        second.release()
