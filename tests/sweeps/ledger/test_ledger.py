"""Storage, ledger and claims: atomic, exactly once, first result stays; on local disk, memory and S3."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from sweeps.core.cells import Cell, Row, UserError, canonical_json
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.storage import Store, with_errno

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Point(Cell):
    SWEEP: ClassVar[str] = "points"
    VERSION: ClassVar[str] = "1"
    x: int
    y: float = 0.5


def test_published_cell_reads_back_as_written(storage: str) -> None:
    ledger = Ledger(storage, "points", "1")
    cell = Point(x=3)
    rows = [Row("area", 1.5, "m²"), Row("loss", 2.0, "nats", {"step": 10}), Row("pr", 7.0, "", {"layer": 2})]
    assert ledger.publish(cell, rows, {"sub/file.bin": b"abc"}, {"fingerprint": "f"})
    back = ledger.read(cell.key)
    assert back.identity == {"x": 3, "y": 0.5}
    assert back.rows["metric"].tolist() == ["area", "loss", "pr"]
    assert back.rows["value"].tolist() == [1.5, 2.0, 7.0]
    assert back.rows["step"].tolist()[1] == 10
    assert set(back.files) == {"cell.json", "rows.parquet", "sub/file.bin"}
    assert ledger.file(cell.key, "sub/file.bin") == b"abc"
    assert ledger.done() == {cell.key}
    assert ledger.done([cell.key, "other"]) == {cell.key}


def test_first_result_stays(storage: str) -> None:
    ledger = Ledger(storage, "points", "1")
    cell = Point(x=1)
    assert ledger.publish(cell, [Row("v", 1.0)], {}, {})
    assert not ledger.publish(cell, [Row("v", 2.0)], {}, {})
    assert ledger.read(cell.key).rows["value"].tolist() == [1.0]


def test_unmarked_folder_is_not_a_cell(storage: str) -> None:
    ledger = Ledger(storage, "points", "1")
    ledger.store.replace("half/rows.parquet", b"torn")
    assert ledger.done() == set()


def test_key_depends_on_every_field_and_on_nothing_else() -> None:
    assert Point(x=1).key == Point(x=1, y=0.5).key
    assert len({Point(x=1).key, Point(x=2).key, Point(x=1, y=0.25).key}) == 3

    @dataclass(frozen=True, kw_only=True)
    class Later(Point):
        VERSION: ClassVar[str] = "2"

    assert Later(x=1).key != Point(x=1).key
    assert canonical_json({"b": (1, 2), "a": None}) == '{"a":null,"b":[1,2]}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_fingerprint_of_other_code_is_refused(storage: str) -> None:
    ledger = Ledger(storage, "points", "1")
    ledger.publish(Point(x=1), [], {}, {"fingerprint": "aaaa"})
    ledger.verify({Point(x=1).key: "aaaa"})
    with pytest.raises(UserError, match=r"fingerprint aaaa .* give bbbb.*--storage"):
        ledger.verify({Point(x=1).key: "bbbb"})


def test_failure_is_recorded_until_published_or_forgotten(storage: str) -> None:
    ledger = Ledger(storage, "points", "1")
    cell = Point(x=1)
    ledger.record_failure(cell, "x=1 is bad", attempts=1)
    assert ledger.failures([cell.key])[cell.key]["error"] == "x=1 is bad"
    ledger.publish(cell, [], {}, {})
    assert ledger.failures([cell.key]) == {}


def test_create_has_one_winner(storage: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = Store(storage)
    with ThreadPoolExecutor(8) as pool:
        if store.local:  # memory:// checks before it writes; object stores need a conditional PUT of the server
            won = list(pool.map(lambda i: store.create("once", str(i).encode()), range(8)))
        else:
            won = [store.create("once", str(i).encode()) for i in range(8)]
    assert sum(won) == 1
    assert store.read("once") == str(won.index(True)).encode()


def test_unwritable_storage_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"is not writable .*--storage"):
        Store(str(tmp_path / "file" / "below")).check_writable()


def test_full_disk_is_not_retried_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.replace("state", b"old")
    calls = []

    def full(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.replace("state", b"new")
    assert len(calls) == 1
    assert store.read("state") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_transient_error_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    real, calls = os.fsync, []

    def flaky(fd: int) -> None:
        if threading.current_thread() is not threading.main_thread():  # a lease that an earlier test left
            return real(fd)
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, "try again")
        return real(fd)

    monkeypatch.setattr(os, "fsync", flaky)
    store.replace("state", b"new")
    assert store.read("state") == b"new"
    assert len(calls) == 2


@pytest.fixture
def lost_s3(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A bucket whose server is unreachable: nothing listens at its port. Tries follow each other without a wait."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s.getsockname()[1]}")
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    import s3fs

    store = Store("s3://bucket/prefix")
    store.fs = s3fs.S3FileSystem(skip_instance_cache=True)  # the others keep the server they know
    return store


def test_a_server_that_is_away_is_the_storages_fault_not_the_cells(
    lost_s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.launch.failure import SYSTEM_ERROR, one_line

    requests = []
    get = lost_s3.fs.cat_file
    monkeypatch.setattr(lost_s3.fs, "cat_file", lambda path, **how: requests.append(path) or get(path, **how))
    with pytest.raises(OSError, match="Could not connect to the endpoint") as away:
        lost_s3.read("a")
    assert len(requests) == 5
    assert away.value.errno == errno.EIO
    assert SYSTEM_ERROR.search(one_line(away.value))
    for request in (
        lambda: lost_s3.exists("a"),
        lambda: lost_s3.create("a", b""),
        lambda: Claims(lost_s3),
    ):
        with pytest.raises(OSError, match="Could not connect to the endpoint"):
            request()


def test_the_lease_is_renewed_once_the_server_is_back(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import EndpointConnectionError

    claims = Claims(Store(f"{s3_bucket}/{uuid.uuid4().hex}"), lease_seconds=0.4)
    try:
        with monkeypatch.context() as away:
            away.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
            away.setattr(
                claims.store.fs,
                "pipe_file",
                lambda *a, **k: (_ for _ in ()).throw(EndpointConnectionError(endpoint_url="x")),
            )
            time.sleep(0.6)
            assert claims.lapses() == 1
        renewed = claims._renewed
        deadline = time.monotonic() + 10
        while claims._renewed == renewed and time.monotonic() < deadline:
            time.sleep(0.02)
        assert claims._renewed > renewed
    finally:
        claims.release()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (PermissionError("The provided token has expired."), errno.EACCES),
        (TimeoutError(), errno.EIO),
        (RuntimeError("Session is closed"), errno.EIO),
        (OSError(errno.EBUSY, "Slow down"), errno.EBUSY),
    ],
)
def test_errors_of_object_stores_get_a_number(error: Exception, number: int) -> None:
    told = with_errno(error)
    assert isinstance(told, OSError)
    assert told.errno == number
    assert isinstance(told, PermissionError) == (number == errno.EACCES)
    assert str(error.args[-1] if error.args else "TimeoutError") in str(told)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("a"), FileExistsError("a"), NotImplementedError(), ValueError("x")]
)
def test_answers_about_a_file_and_mistakes_stay_what_they_are(error: Exception) -> None:
    assert with_errno(error) is error


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("s4://bucket/x", r"storage s4://bucket/x cannot be opened \(Protocol not known: s4\); choose a folder, s3://"),
        ("gs://bucket/x", r"storage gs://bucket/x needs a package .*gcsfs.*; `pip install` it on every node"),
    ],
)
def test_an_address_that_names_no_storage_is_one_line(uri: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # also where somebody has installed it
    with pytest.raises(UserError, match=line):
        Store(uri)


def test_what_a_killed_publication_left_is_removed_a_day_later(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name, hours in ((".tmp-a-1", 25), (".tmp-b-2", 1), ("published", 25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(b"x")
        os.utime(tmp_path / name, times=(time.time() - 3600 * hours,) * 2)
    store.remove_leftovers()
    assert {p.name for p in tmp_path.iterdir()} == {".tmp-b-2", "published"}


PUBLISH_LOOP = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
from sweeps.ledger.ledger import Ledger
from sweeps.core.cells import Row
from test_ledger import Point
ledger = Ledger(sys.argv[1], "points", "1")
print("ready", flush=True)
for x in range(10_000):
    ledger.publish(Point(x=x), [Row("x", x)] * 50, {{"blob": b"x" * 300_000}}, {{}})
"""


def test_kill_9_while_publishing_leaves_whole_cells_only(tmp_path: Path) -> None:
    code = PUBLISH_LOOP.format(root=str(ROOT), here=str(Path(__file__).parent))
    for round_ in range(3):  # each goes on where the one before was killed
        run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert run.stdout is not None
        run.stdout.readline()
        ledger = Ledger(str(tmp_path), "points", "1")
        before = len(ledger.done())
        deadline = time.monotonic() + 60
        while len(ledger.done()) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.07 * round_)
        run.send_signal(signal.SIGKILL)
        run.wait()
        done = ledger.done()
        assert done
        for key in done:
            cell = ledger.read(key)
            assert len(cell.rows) == 50
            assert len(ledger.file(key, "blob")) == 300_000


def test_claims_exclude_each_other_and_survive_a_release(storage: str) -> None:
    store = Store(storage)
    first, second = Claims(store), Claims(store)
    try:
        assert first.claim(["a", "b"]) == (["a", "b"], {})
        ours, others = second.claim(["a", "b", "c"])
        assert ours == ["c"]
        assert others == {"a": first.launch_id, "b": first.launch_id}
        assert first.claim(["a", "c"]) == (["a"], {"c": second.launch_id})
    finally:
        first.release()
    assert second.claim(["a", "b"]) == (["a", "b"], {})
    second.release()
    assert store.names("_claims/launches") == []


def test_claim_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from sweeps.ledger.claims import Claims\nfrom sweeps.ledger.storage import Store\nimport os, time\n"
        "c = Claims(Store(sys.argv[1])); c.claim(['a']); print(c.launch_id, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    holder = other.stdout.readline().strip()
    claims = Claims(Store(str(tmp_path)))
    try:
        assert claims.claim(["a"]) == ([], {"a": holder})
        other.kill()
        other.wait()
        assert claims.claim(["a"]) == (["a"], {})
    finally:
        other.kill()
        claims.release()


def test_claim_of_another_machine_ends_with_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    monkeypatch.setattr("sweeps.ledger.claims._boot_id", lambda: "elsewhere@1")
    far = Claims(store, lease_seconds=1.0)
    far.claim(["a"])
    far._stop.set()  # its machine died: nobody renews
    far._thread.join()
    monkeypatch.undo()
    near = Claims(store)
    try:
        assert near.claim(["a"])[0] == []
        time.sleep(1.1)
        assert near.claim(["a"])[0] == ["a"]
    finally:
        near.release()


def test_a_pid_of_another_container_with_the_same_host_name_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stat = Store(str(tmp_path)), os.stat
    far = Claims(store)
    lease = store.read_json(f"_claims/launches/{far.launch_id}.json")
    far._stop.set()
    far._thread.join()
    store.replace(f"_claims/launches/{far.launch_id}.json", json.dumps(lease | {"pid": 2**22 + 1}).encode())
    near = Claims(store)
    try:
        assert not near.alive(far.launch_id)  # the same machine knows that there is no such process
        other = os.stat_result((0, stat("/proc/self/ns/pid").st_ino + 1, *[0] * 8))
        monkeypatch.setattr(os, "stat", lambda path, **k: other if path == "/proc/self/ns/pid" else stat(path, **k))
        assert near.alive(far.launch_id)
    finally:
        monkeypatch.undo()
        near.release()


def test_a_released_launch_makes_no_lease_again_and_takes_nobody_for_dead(tmp_path: Path) -> None:
    """Its thread for MLflow may still ask about others when SIGTERM has ended the lease."""
    store = Store(str(tmp_path))
    other, gone = Claims(store), Claims(store)
    gone.release()
    gone._renewed -= 10  # long ago enough for a look at the clock
    assert gone.alive(other.launch_id)
    other.release()
    assert store.names("_claims/launches") == []


def test_a_lease_is_judged_by_the_clock_of_the_storage(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, true_time = Store(storage), time.time
    monkeypatch.setattr("sweeps.ledger.claims._boot_id", lambda: "elsewhere@1")
    far = Claims(store)
    far.claim(["a"])
    monkeypatch.undo()
    for hours in (1, -1):
        monkeypatch.setattr(time, "time", lambda hours=hours: true_time() + 3600 * hours)
        near = Claims(store)
        assert near.claim(["a"]) == ([], {"a": far.launch_id})
        near.release()
    far.release()


def test_a_launch_knows_that_its_lease_may_have_ended(tmp_path: Path) -> None:
    claims = Claims(Store(str(tmp_path)), lease_seconds=0.2)
    try:
        claims._stop.set()  # as if the process were paused: nothing renews
        claims._thread.join()
        claims._renew()
        before = claims.lapses()
        time.sleep(0.3)
        assert claims.lapses() == before + 1
        claims._renew()
        assert claims.lapses() == before + 1
    finally:
        claims.release()
