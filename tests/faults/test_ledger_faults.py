"""Ledgers that are hostile or damaged, and launches that meet on one: of other data, late writers, woken machines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from fault_rig import Survived, wait_for
from fault_sweeps import results
from fault_warm import Bench, MakeBench, References
from faultpoints import Fault, hits

from sweeps.core.cells import UserError
from sweeps.ledger.storage import MARKER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PUBLISH = r"^rename .*/[0-9a-f]{16}$"
PUT_MARKER = rf"^put .*/{MARKER}$"
REQUESTS = r"^(get|head|ls|put|delete) "


def again(here: Bench, reference: References, *more: str) -> None:
    """The same command, to a good end."""
    assert here.launch(more=more) == 0, here.output()
    here.check(reference(here.tiny.name))


def fresh_mlflow(here: Bench, database: Path) -> None:
    """Nothing is copied yet, so that the next launch reads every file of every cell."""
    (here.folder / "runs" / "mlflow.db").write_bytes(database.read_bytes())
    shutil.rmtree(here.folder / "runs" / "artifacts", ignore_errors=True)


def rewrite(here: Bench, key: str, name: str) -> None:
    """As a ledger of an older program has it, which knew no checksums: one more name among a cell's files."""
    meta = json.loads(here.ledger.file(key, "cell.json"))
    sizes = {file: facts["size"] for file, facts in meta["files"].items()}
    here.ledger.store.replace(f"{key}/cell.json", json.dumps(meta | {"files": sizes | {name: 7}}).encode())
    here.ledger.store.replace(f"{key}/{MARKER}", b"")


@pytest.mark.parametrize("kind", ["absolute name", "name with ..", "link"])
def test_a_hostile_ledger(
    bench: MakeBench, reference: References, survived: Survived, database: Path, kind: str
) -> None:
    """Offered to the launch and its copy for MLflow, to --report, and to those who read results as data."""
    here = bench("toy")
    again(here, reference)
    key = min(here.ledger.done())
    victim = here.folder / "victim"
    name = {"absolute name": str(victim), "name with ..": "../../../../../victim", "link": "notes.txt"}[kind]
    rewrite(here, key, name)
    payload = Path(here.ledger.store.root, key, *Path(name).parts[kind == "absolute name" :])
    payload.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        victim.write_text("private")
        payload.symlink_to(victim)
    elif kind == "absolute name":
        payload.write_text("payload")
    fresh_mlflow(here, database)
    for more, if_link in (((), 0), (("--report",), 0), (("--retry-failed",), 2)):
        code = here.launch(more=more)
        told = here.output()
        assert "Traceback" not in told, told
        assert code == (if_link if kind == "link" else 2), told
        assert key in told or (kind, more) == ("link", ("--report",)), told  # a report reads none of such files
    with pytest.raises(UserError, match=r"leads out of|could lead out of"):
        results(here.ledger)
    assert victim.exists() == (kind == "link"), "a file of the reader was written"
    for copy in (here.folder / "runs").rglob("notes.txt"):
        assert copy == payload, f"a file of the reader was copied to {copy}"
    shutil.rmtree(Path(here.ledger.store.root, key))
    fresh_mlflow(here, database)
    again(here, reference)
    survived.add("hostile ledger", f"a cell's file has a name that leads out: {kind}", "toy")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = (
    (MARKER, cut, f"{MARKER} is no JSON object"),
    ("rows.parquet", cut, "rows.parquet has"),
    ("rows.parquet", flip, "rows.parquet has other bytes"),
    ("rows.parquet", os.unlink, "rows.parquet is missing"),
    ("value.txt", flip, "value.txt has other bytes"),
    ("value.txt", os.unlink, "value.txt is missing"),
)


@pytest.mark.parametrize("index", [False, True])
def test_damaged_files(
    bench: MakeBench, reference: References, survived: Survived, database: Path, index: bool
) -> None:
    """The cells are named and left out of MLflow, the others are copied, and --retry-failed computes them again."""
    here = bench("toy")
    again(here, reference)
    keys = dict(zip(sorted(here.ledger.done()), DAMAGE, strict=False))
    for key, (name, harm, _) in keys.items():
        harm(Path(here.ledger.store.root, key, name))
    if not index:
        shutil.rmtree(Path(here.ledger.store.root, "_index"))
    fresh_mlflow(here, database)
    code = here.launch()
    told = here.output()
    assert code == 1, told
    for key, (_, _, fault) in keys.items():
        assert any(key in line and fault in line and "--retry-failed" in line for line in told.splitlines()), told
    assert "Traceback" not in told
    again(here, reference, "--retry-failed")
    how = "cut, changed in place, removed; " + ("the index knows the rows" if index else "no index")
    survived.add("damaged file of a cell", how, "toy", n=len(DAMAGE))


def test_a_writer_that_comes_late_on_an_object_store(
    bench: MakeBench, reference: References, survived: Survived
) -> None:
    """One launch is stopped between its upload and its marker, another computes the cell meanwhile: that one stays."""
    here = bench("toy", objects=True)
    late = here.start(Fault(do="stop", on=PUT_MARKER, first=3), lease=2.0)
    wait_for(lambda: psutil.Process(late).status() == psutil.STATUS_STOPPED)
    other = here.start(lease=2.0)
    try:
        assert here.wait(other) == 0, here.output()
        first = {key: here.ledger.read(key).meta for key in here.ledger.done()}
    finally:
        os.kill(late, signal.SIGCONT)
    assert here.wait(late) == 0, here.output(1)
    assert {key: here.ledger.read(key).meta for key in here.ledger.done()} == first
    here.check(reference("toy"))
    survived.add("interleaved writers of one cell", "one waits between its upload and its marker", "toy")


def test_default_threads(bench: MakeBench, reference: References, survived: Survived) -> None:
    """Nothing is set and a finished cell is lost: it comes back with the same bits, on a machine of two processors."""
    here = bench("codec_lm", threads=0)
    assert here.launch(cpus=2) == 0, here.output()
    expected = results(here.ledger)
    lost = min(expected)
    shutil.rmtree(Path(here.ledger.store.root, lost))
    assert here.launch(cpus=2) == 0, here.output()
    assert "rounding" not in here.output()
    here.check(reference("codec_lm"))
    survived.add("finished cell lost", "its folder is removed from a run of default settings", "codec_lm")


@contextmanager
def asleep(here: Bench) -> Iterator[None]:
    """The leases that there are look an hour old, as they do right after the machine woke up or its clock was set."""
    leases = list(Path(here.ledger.store.root, "_claims", "launches").glob("*.json"))
    over = threading.Event()

    def age() -> None:
        while not over.wait(0.05):
            for lease in leases:
                if lease.exists():
                    os.utime(lease, (time.time() - 3600, time.time() - 3600))

    thread = threading.Thread(target=age)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("on", [PUBLISH, r"^call create_run$"])
def test_a_machine_that_slept(bench: MakeBench, reference: References, survived: Survived, on: str) -> None:
    """A launch that lives is not robbed by another on its machine, and each cell gets one run in MLflow."""
    here = bench("toy")
    slow = Fault(do="slow", on=on, times=1000, seconds=0.5)
    first, plans = here.start(slow), [here.launches.plan]
    wait_for(lambda: hits(plans[0]))
    with asleep(here):
        second = here.start(slow)
        plans.append(here.launches.plan)
        assert here.wait(second) == 0, here.output()
    assert here.wait(first) == 0, here.output(1)
    expected = reference("toy")
    here.check(expected)
    if on == PUBLISH:
        assert len([hit for plan in plans for hit in hits(plan)]) == len(expected), "a cell was computed twice"
    survived.add("machine that slept", "the living launch's lease looks an hour old", "toy")


def test_a_second_launch_with_other_data(bench: MakeBench, reference: References, survived: Survived) -> None:
    """While the first computes, and again when it has ended: exit code 2, and nothing of the first's is reported."""
    here = bench("toy")
    slow = Fault(do="slow", on=PUBLISH, times=1000, seconds=1.0)
    first, plan = here.start(slow), here.launches.plan
    wait_for(lambda: hits(plan))
    for moment in ("meanwhile", "afterwards"):
        reports = here.folder / f"reports {moment}"
        code = here.launch(more=("--set", "salt=other", "--report-dir", str(reports)))
        assert code == 2, here.output()
        assert "other code or data" in here.output() or "has fingerprint" in here.output()
        assert "sum  " not in here.output()
        assert not list(reports.rglob("report.md"))
        if moment == "meanwhile":
            assert here.wait(first) == 0, here.output(1)
    again(here, reference)
    survived.add("second launch with other data", "while the first computes, and afterwards", "toy", n=2)


def test_idle_processes_leave_the_storage_alone(bench: MakeBench, reference: References, survived: Survived) -> None:
    """A launch at its last of twelve packs, and one that waits for it: two requests a second at most, each."""
    here = bench("toy", objects=True)
    notes = Fault(do="note", on=REQUESTS, times=100_000)
    last = Fault(do="slow", on=PUT_MARKER, first=12, seconds=25.0)
    working, first = here.start(notes, last), here.launches.plan
    wait_for(lambda: any(hit.startswith("slow") for hit in hits(first)))
    over = time.monotonic() + 24.0
    waiting, second = here.start(notes), here.launches.plan
    wait_for(lambda: hits(second) and "waiting" in here.output())
    rates = [9.9]
    while max(rates) > 2.0 and time.monotonic() < over - 8.0:  # it copies what is finished to MLflow first
        before = [len(hits(plan)) for plan in (first, second)]
        time.sleep(8.0)
        rates = [(len(hits(plan)) - n) / 8.0 for plan, n in zip((first, second), before, strict=True)]
    assert max(rates) <= 2.0, f"{rates} requests a second"
    assert [here.wait(pid) for pid in (working, waiting)] == [0, 0], here.output()
    here.check(reference("toy"))
    survived.add("idle launches", "at most 2 requests a second each, counted for 8 s", "toy", n=2)
