"""The first result stays, complete, on every store; damage is found and named; a moved ledger keeps its name."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from sweeps.core.cells import Cell, Row, UserError
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.published import DamagedCell, file_of, file_sizes
from sweeps.ledger.storage import MARKER, Facts, Store


@dataclass(frozen=True, kw_only=True)
class Point(Cell):
    SWEEP: ClassVar[str] = "points"
    VERSION: ClassVar[str] = "1"
    x: int


def ledger_of(storage: str, *values: int) -> Ledger:
    ledger = Ledger(storage, "points", "1")
    for x in values:
        ledger.publish(Point(x=x), [Row("v", float(x))], {"model.pt": bytes([x]) * 9}, {"fingerprint": "f"})
    return ledger


def test_a_writer_that_comes_second_changes_nothing_and_leaves_nothing(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B looks, A publishes, B uploads: every file of the cell is A's, and B's call returns False."""
    cell, first, second = Point(x=1), Ledger(storage, "points", "1"), Ledger(storage, "points", "1")
    look = Store.published

    def then_a_publishes(store: Store, folder: str) -> bool:
        seen = look(store, folder)
        if store is second.store and not first.done([cell.key]):
            first.publish(cell, [Row("v", 1.0)], {"model.pt": b"A"}, {"fingerprint": "f"})
        return seen

    monkeypatch.setattr(Store, "published", then_a_publishes)
    assert not second.publish(cell, [Row("v", 2.0)], {"model.pt": b"B", "more.txt": b"B"}, {"fingerprint": "f"})
    monkeypatch.undo()
    back = Ledger(storage, "points", "1").read(cell.key)
    assert back.rows["value"].tolist() == [1.0]
    assert file_of(back, "model.pt") == b"A"
    assert "more.txt" not in back.files
    assert not [name for name in first.store.files(cell.key) if name.endswith("more.txt")]


def test_a_writer_that_dies_half_way_leaves_no_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cell = f"memory://{uuid.uuid4().hex}", Point(x=1)
    dying, replace = Ledger(storage, "points", "1"), Store.replace
    uploads = 0

    def limited(store: Store, name: str, data: bytes | Path) -> None:
        nonlocal uploads
        uploads += 1
        if uploads > 1:
            raise KeyboardInterrupt
        replace(store, name, data)

    monkeypatch.setattr(Store, "replace", limited)
    with pytest.raises(KeyboardInterrupt):
        dying.publish(cell, [Row("v", 1.0)], {"model.pt": b"dead", "b": b"dead"}, {})
    monkeypatch.undo()
    ledger = Ledger(storage, "points", "1")
    assert ledger.done() == set()
    assert ledger.publish(cell, [Row("v", 2.0)], {"model.pt": b"alive"}, {})
    assert file_of(ledger.read(cell.key), "model.pt") == b"alive"


def test_a_repeated_request_that_met_its_own_marker_is_the_first_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, create = Ledger(f"memory://{uuid.uuid4().hex}", "points", "1"), Store.create

    def answer_lost(store: Store, name: str, data: bytes) -> bool:
        create(store, name, data)
        return create(store, name, data)

    monkeypatch.setattr(Store, "create", answer_lost)
    assert ledger.publish(Point(x=1), [Row("v", 1.0)], {}, {})


def test_a_store_without_conditional_creation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.check_writable()

    def careless(name: str, data: bytes) -> bool:
        store.replace(name, data)
        return True

    monkeypatch.setattr(store, "create", careless)
    with pytest.raises(UserError, match=r"ignores conditional creation.*Choose a storage"):
        store.check_writable()


class Plain(MemoryFileSystem):
    """Creates files as fsspec does for sftp, smb and hdfs: a look, then a write."""

    protocol = "plain"
    store: ClassVar[dict[str, Any]] = {}
    pipe_file = AbstractFileSystem.pipe_file


def test_a_store_that_looks_and_then_writes_is_refused_although_its_probe_would_pass(
    monkeypatch: pytest.MonkeyPatch, s3_bucket: str
) -> None:
    fsspec.register_implementation("plain", Plain, clobber=True)
    store = Store("plain://ledger")
    assert [store.create("x", b"1"), store.create("x", b"2")] == [True, False]
    with pytest.raises(UserError, match=r"looks and then writes.* Mount it .*--storage") as caught:
        store.check_writable()
    assert "\n" not in str(caught.value)
    Store(f"{s3_bucket}/probe").check_writable()


@pytest.mark.parametrize("data", [b"", b"\0\0\0", b'{"launch": "a"'])
def test_a_claim_that_lost_its_content_is_skipped_or_named(tmp_path: Path, data: bytes) -> None:
    store = Store(str(tmp_path))
    store.replace("_claims/cells/000000000.json", data)
    claims = Claims(store)
    try:
        if data:
            with pytest.raises(
                UserError, match=r"_claims/cells/000000000\.json is damaged .*; remove that file and run"
            ):
                claims.claim(["a"])
        else:
            assert claims.claim(["a"]) == (["a"], {})
    finally:
        claims.release()


def test_the_probe_of_a_good_store_survives_a_lost_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    store, create = Store(f"memory://{uuid.uuid4().hex}"), Store.create
    monkeypatch.setattr(Store, "create", lambda self, name, data: create(self, name, data) and False)
    store.check_writable()


def test_a_folder_that_lost_its_marker_does_not_block_the_cell(tmp_path: Path) -> None:
    ledger, cell = Ledger(str(tmp_path), "points", "1"), Point(x=1)
    stray = Path(ledger.store.path(cell.key), ".nfs0001")
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"held open by a reader")
    assert ledger.publish(cell, [Row("v", 1.0)], {}, {})
    assert ledger.done() == {cell.key}
    assert [p.read_bytes() for p in tmp_path.rglob(".nfs0001")] == [b"held open by a reader"]


def test_files_are_described_by_size_and_digest(storage: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * 3_000_000)
    ledger = Ledger(storage, "points", "1")
    ledger.publish(Point(x=1), [Row("v", 1.0)], {"deep/weights": weights}, {})
    meta = ledger.read(Point(x=1).key).meta
    assert file_sizes(meta)["deep/weights"] == 3_000_000
    assert Facts(**meta["files"]["deep/weights"]).fault(weights.read_bytes()) == ""
    assert "other bytes" in Facts(**meta["files"]["deep/weights"]).fault(b"x" * 3_000_000)


def damage(ledger: Ledger, key: str, name: str, data: bytes | None) -> None:
    """Change or remove a file of a published cell in place."""
    attempt = ledger.store.marker(key)["attempt"]
    place = f"{key}/{attempt}/{name}" if attempt and name != MARKER else f"{key}/{name}"
    if data is None:
        ledger.store.remove_file(place)
    else:
        ledger.store.replace(place, data)


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("rows.parquet", b"PAR1 cut", "rows.parquet has 8 bytes instead of"),
        ("rows.parquet", None, "rows.parquet is missing"),
        (MARKER, b'{"last": {"cell.json": "{"}}', "cell.json is no JSON object"),
        (MARKER, b'{"last": {"cell.', "_PUBLISHED is no JSON object"),
    ],
)
def test_a_damaged_cell_is_named_counted_as_failed_and_computed_again(
    storage: str, name: str, data: bytes | None, fault: str
) -> None:
    good, bad = Point(x=1), Point(x=2)
    damage(ledger_of(storage, 1, 2), bad.key, name, data)
    ledger = Ledger(storage, "points", "1")
    ledger.compact(ledger.done())
    assert ledger.done({good.key, bad.key}) == {good.key}
    error = ledger.failures([good.key, bad.key])[bad.key]["error"]
    assert bad.key in error
    assert fault in error
    assert "--retry-failed" in error
    ledger.forget_failures([bad.key])
    assert ledger.failures([bad.key]) == {}
    assert ledger.publish(bad, [Row("v", 2.0)], {}, {})
    assert Ledger(storage, "points", "1").done() == {good.key, bad.key}


def test_a_changed_file_is_found_on_read_and_by_the_check_although_the_index_knows_its_rows(storage: str) -> None:
    ledger = ledger_of(storage, *range(3))
    ledger.compact(ledger.done())
    bad = Point(x=1).key
    damage(ledger, bad, "model.pt", b"X" * 9)
    cell = Ledger(storage, "points", "1").read(bad)
    with pytest.raises(DamagedCell, match=rf"cell {bad} .*model.pt has other bytes.*--retry-failed"):
        file_of(cell, "model.pt")
    damage(ledger, Point(x=2).key, "cell.json", b"{}")
    ledger.check(ledger.done())
    assert set(ledger.damaged) == {bad, Point(x=2).key}


def test_a_damaged_cell_is_left_out_of_a_report(storage: str) -> None:
    ledger = ledger_of(storage, *range(3))
    bad = Point(x=1).key
    damage(ledger, bad, "rows.parquet", b"PAR1")
    keys = [Point(x=x).key for x in range(3)]
    assert [cell.key for cell in ledger.sound(keys)] == [keys[0], keys[2]]
    assert set(ledger.damaged) == {bad}


def test_an_index_file_of_a_cell_that_was_taken_away_alone(tmp_path: Path) -> None:
    ledger = ledger_of(str(tmp_path), 1)
    ledger.compact(ledger.done())
    shutil.rmtree(tmp_path / "points" / "1" / Point(x=1).key)
    ledger.compact((), [Point(x=1).key])
    assert not ledger.index.entries


def test_a_ledger_from_before_markers_had_a_content_is_read_and_continued(storage: str) -> None:
    ledger = ledger_of(storage, 1)
    key = Point(x=1).key
    files = {name: file_of(ledger.read(key), name) for name in ("rows.parquet", "model.pt")}
    meta: dict[str, Any] = {k: v for k, v in ledger.read(key).meta.items() if k != "attempt"}
    meta["files"] = file_sizes(meta)
    old = Ledger(f"{storage}/old", "points", "1")
    for name, data in {**files, "cell.json": json.dumps(meta).encode(), MARKER: b""}.items():
        old.store.replace(f"{key}/{name}", data)
    again = Ledger(f"{storage}/old", "points", "1")
    again.compact(again.done())
    assert not again.publish(Point(x=1), [Row("v", 5.0)], {}, {})
    back = again.read(key)
    assert back.rows["value"].tolist() == [1.0]
    assert file_of(back, "model.pt") == files["model.pt"]
    assert again.failures([key]) == {}


def test_a_moved_ledger_keeps_its_name(tmp_path: Path) -> None:
    here = ledger_of(str(tmp_path / "here"), 1)
    name = here.identifier()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert Ledger(str(tmp_path / "there"), "points", "1").identifier() == name
    assert ledger_of(str(tmp_path / "other"), 1).identifier() != name


def test_many_keys_and_an_index_do_not_stand_in_for_a_marker() -> None:
    """On object stores a listing of folders serves many keys; a planned cell without its marker is not done."""
    storage = f"memory://{uuid.uuid4().hex}"
    ledger = ledger_of(storage, *range(80))
    ledger.compact(ledger.done())
    keys = [Point(x=x).key for x in range(80)]
    ledger.store.remove_file(f"{keys[7]}/{MARKER}")
    again = Ledger(storage, "points", "1")
    assert again.done(keys) == set(keys) - {keys[7]}


def test_a_passing_error_does_not_cost_the_index_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_of(str(tmp_path), *range(3))
    ledger.compact(ledger.done())
    files = ledger.store.names("_index")
    again, read = Ledger(str(tmp_path), "points", "1"), Store.read

    def refusing(store: Store, name: str) -> bytes:
        if name.startswith("_index/"):
            raise PermissionError(13, "Permission denied")
        return read(store, name)

    monkeypatch.setattr(Store, "read", refusing)
    again.index.refresh()
    monkeypatch.undo()
    again.publish(Point(x=9), [Row("v", 9.0)], {}, {})
    again.compact(again.done())
    assert set(files) <= set(again.store.names("_index"))
