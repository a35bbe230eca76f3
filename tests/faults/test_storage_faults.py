"""Launches killed at chosen storage operations, and storage that fails, is slow or full: then the same command."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_rig import Survived, said, schedule
from fault_warm import Bench, MakeBench, References
from faultpoints import CHANGES, Fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = (  # (where, operations, how many of them a launch may get through), the earliest in a launch first
    ("claims and leases", r"^(link|rename|write) .*/_claims/", 6),
    ("a checkpoint's file", r"^rename .*/_work/.*\.pt$", 2),
    ("a checkpoint's pointer", r"^rename .*/_work/.*\.json$", 2),
    ("any change", CHANGES, 20),
    ("publishing a cell", r"^(write .*/\.tmp-|rename .*/[0-9a-f]{16}$)", 4),
    ("publishing a cell", r"^rename .*/[0-9a-f]{16}$", 1),
    ("copying to MLflow", r"^(call|return) ", 6),
    ("the index", r"^(write|rename) .*/_index/", 1),
)
QUICK = ("odor_topology", "codec_lm")  # a launch of proxy_gap takes several times as long
REQUESTS = r"^(put|put-answer|delete) (?!.*/_claims/launches/)"
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN)


@pytest.mark.parametrize(
    ("sweep", "part"), [("odor_topology", 1), ("odor_topology", 2), ("codec_lm", 1), ("codec_lm", 2), ("proxy_gap", 1)]
)
def test_killed_at_storage_operations(
    bench: MakeBench, reference: References, survived: Survived, sweep: str, part: int
) -> None:
    case = f"kill {sweep} {part}"
    draw = schedule(case)
    here, rooms = bench(sweep), 0
    events: list[str] = []
    where: list[str] = []
    for name, on, most in KILLS:
        if sweep == "odor_topology" and "checkpoint" in name:
            continue  # it publishes small cells and keeps none
        torn = name in ("any change", "publishing a cell") and draw.random() < 0.5
        code = here.launch(
            Fault(do="torn" if torn else "kill", on=on, first=draw.randint(1, most if sweep in QUICK else 1))
        )
        hit = here.launches.hits()
        assert code == (-9 if hit else 0), f"{said(case, events + hit)}\n{here.output()}"
        events += hit
        where += [name] * len(hit)
        if code == 0:  # the work was done before the fault's turn came: it has its turn in a new folder
            check(here, reference)
            rooms += 1
            here = bench(sweep, place=f"room-{rooms}")
    assert len(events) >= 4, said(case, events)
    finish(here, reference, case, events)
    for name in where:
        survived.add(f"process killed: {name}", "kill -9 before the n-th operation, with torn files", sweep)


@pytest.mark.parametrize("sweep", QUICK)
def test_killed_between_requests_to_an_object_store(
    bench: MakeBench, reference: References, survived: Survived, sweep: str
) -> None:
    here = bench(sweep, objects=True)
    case = f"objects {sweep}"
    draw = schedule(case)
    events: list[str] = []
    for _ in range(3):
        here.launch(Fault(do="kill", on=REQUESTS, first=draw.randint(1, 40)))
        events += here.launches.hits()
    lost = [
        Fault(do="error", on=r"^put-answer ", first=draw.randint(1, 6), errno=errno.ETIMEDOUT),
        Fault(do="error", on=r"^put-answer .*/_claims/(?!launches)", errno=errno.ECONNRESET),
        Fault(do="error", on=r"^(get|head|list) ", first=draw.randint(1, 20), times=2, errno=errno.EIO),
    ]
    assert here.launch(*lost) == 0, f"{said(case, events)}\n{here.output()}"
    answers = here.launches.hits()
    finish(here, reference, case, [*events, *answers])
    survived.add("process killed: object store", "kill -9 before or after the n-th request", sweep, n=len(events))
    survived.add("object store: error, or done but answer lost", "OSError from a request", sweep, n=len(answers))


@pytest.mark.parametrize("sweep", QUICK)
def test_passing_errors_are_not_noticed(
    bench: MakeBench, reference: References, survived: Survived, sweep: str
) -> None:
    here = bench(sweep)
    case = f"passing {sweep}"
    draw = schedule(case)
    some = [
        Fault(do="error", on=on, first=draw.randint(1, most), times=2, errno=draw.choice(PASSING))
        for on, most in (
            (r"^write ", 20),
            (r"^rename ", 15),
            (r"^link ", 2),
            (r"^read ", 5),
            (r"^write .*/\.tmp-", 6),
            (r"^list ", 4),
        )
    ]
    assert here.launch(*some) == 0, f"{said(case, some)}\n{here.output()}"
    hit = here.launches.hits()
    assert len(hit) >= 6, said(case, hit)
    check(here, reference)
    survived.add("storage: passing error", "OSError from a file operation, twice in a row", sweep, n=len(hit))


@pytest.mark.parametrize("sweep", QUICK)
def test_slow_storage(bench: MakeBench, reference: References, survived: Survived, sweep: str) -> None:
    here = bench(sweep)
    draw = schedule(f"slow {sweep}")
    slow = Fault(do="slow", on=r"^(read|write|rename|list) ", first=draw.randint(1, 10), times=25, seconds=0.2)
    assert here.launch(slow) == 0, here.output()
    assert len(here.launches.hits()) == 25
    check(here, reference)
    survived.add("storage: slow", "25 operations take 0.2 s more", sweep)


@pytest.mark.parametrize(
    ("sweep", "number", "on"),
    [
        ("odor_topology", errno.EIO, r"^(write|rename|link) "),
        ("odor_topology", errno.EIO, r"^(read|list) "),
        ("odor_topology", errno.EDQUOT, r"^write "),
        ("codec_lm", errno.EIO, r"^(write|rename|link) .*/_work/"),
        ("codec_lm", errno.ENOSPC, r"^write "),
    ],
)
def test_storage_that_fails_until_the_command_is_run_again(
    bench: MakeBench, reference: References, survived: Survived, sweep: str, number: int, on: str
) -> None:
    here = bench(sweep, max_retries=0)
    case = f"lasting {sweep} {errno.errorcode[number]} {on}"
    fault = Fault(do="error", on=on, first=schedule(case).randint(1, 12), times=0, errno=number)
    code = here.launch(fault)
    hit = here.launches.hits()
    survivable = "_work" in on  # a model that cannot be saved on its way is trained to its end all the same
    assert code in ((0, 1) if survivable else (1, 2)), f"{said(case, hit)}\n{here.output()}"
    assert "Traceback" not in here.output(), f"{said(case, hit)}\n{here.output()}"
    finish(here, reference, case, hit)
    kind = "full" if number in (errno.ENOSPC, errno.EDQUOT) else "fails for good"
    survived.add(f"storage: {kind}", f"every operation from the n-th on: {errno.errorcode[number]}", sweep, n=len(hit))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB at runs/ledger."""
    place = tmp_path / "runs" / "ledger"
    place.mkdir(parents=True)
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_that_is_really_full(
    small_disk: Path, bench: MakeBench, reference: References, survived: Survived
) -> None:
    here = bench("codec_lm", max_retries=0)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 2_000_000)
    code = here.launch()
    assert code == 1, here.output()
    assert "No space left" in here.output()
    assert "Traceback" not in here.output(), here.output()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=512m", str(small_disk)], check=True)
    finish(here, reference, "full disk", [])
    survived.add("storage: full", "a file system of 4 MB", "codec_lm")


def finish(here: Bench, reference: References, case: str, events: list[str]) -> None:
    """The same command, with nothing in its way."""
    assert here.launch() == 0, f"{said(case, events)}\n{here.output()}"
    try:
        check(here, reference)
    except AssertionError as error:
        raise AssertionError(f"{said(case, events)}: {error}") from error


def check(here: Bench, reference: References) -> None:
    here.check(reference(here.tiny.name))
