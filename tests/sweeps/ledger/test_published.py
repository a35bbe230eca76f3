"""Reports read one file per cell by many requests at once, in order, and hold few more than they use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pandas as pd
import pytest

from benchmarks import scale
from benchmarks._object_store import ModelStore
from sweeps.core.cells import Row
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.published import files_of, in_order, parquet_bytes, tables_of

LATENCY = 0.1  # seconds


class Slow(ModelStore):
    """An object store whose answers take their time; knows how many requests waited together."""

    protocol = "slow-model"
    now = most = 0
    lock = threading.Lock()

    def cat_file(self, path: str, *arguments: object, **named: object) -> bytes:
        with Slow.lock:
            Slow.now += 1
            Slow.most = max(Slow.most, Slow.now)
        try:
            time.sleep(LATENCY)
            return super().cat_file(path, *arguments, **named)
        finally:
            with Slow.lock:
                Slow.now -= 1


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    import fsspec

    fsspec.register_implementation("slow-model", Slow, clobber=True)
    ModelStore.clear()
    Slow.now = Slow.most = 0
    yield Ledger("slow-model://bucket", "scale", "1")
    ModelStore.clear()


def test_requests_for_the_files_of_cells_overlap_and_keep_their_order(ledger: Ledger) -> None:
    cells = scale.cells_of(40)
    for cell in cells:
        files = {"n.txt": str(cell.x).encode(), "n.parquet": parquet_bytes(pd.DataFrame({"x": [cell.x]}))}
        ledger.publish(cell, [Row("x", cell.x)], files, {})
    published = ledger.read_many([c.key for c in cells])
    Slow.most = 0
    began = time.monotonic()
    assert [int(data) for data in files_of(published, "n.txt")] == list(range(40))
    assert time.monotonic() - began < 0.5 * 40 * LATENCY
    assert Slow.most > 8
    assert [int(table["x"][0]) for table in tables_of(published, "n.parquet")] == list(range(40))


def test_reading_stays_a_bounded_number_ahead() -> None:
    begun: list[int] = []

    def call(n: int) -> int:
        begun.append(n)
        return n

    answers = in_order(call, range(1000))
    assert [next(answers) for _ in range(10)] == list(range(10))
    time.sleep(0.2)
    assert len(begun) <= 10 + 64
    answers.close()  # type: ignore[attr-defined]
    time.sleep(0.2)
    assert len(begun) <= 10 + 64


def test_a_failed_request_is_raised_in_its_turn() -> None:
    answers = in_order(lambda n: 1 // (3 - n), range(1000))
    assert [next(answers) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(answers)
