"""The command line on the toy sweep: continue, extend, fail, crash, kill, share, track."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sweeps.core.cells import Row, UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch import command as command_module
from sweeps.launch import ray_session
from sweeps.launch.address import Address
from sweeps.launch.pack_queue import Queue
from sweeps.launch.ray_session import connect
from sweeps.launch.report_folder import say_partial
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from tests.sweeps.mlflow_runs import runs_of_cells
from tests.sweeps.toy_sweep import Square, Toy, ToySweep

TOY = Path(__file__).parents[1] / "toy_sweep.py"


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(TOY), *arguments]


def toy(folder: Path, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=timeout)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Main = Callable[..., Outcome]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """The command line called in this process, for what must end without Ray."""
    monkeypatch.syspath_prepend(str(TOY.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(command_module, "connect", lambda *a: pytest.fail("Ray was started"))
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = command_module.main(importlib.import_module("toy_sweep").SWEEP, list(arguments))
        return Outcome(code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


def tries(folder: Path) -> dict[int, int]:
    return {int(p.stem): len(p.read_text()) for p in folder.glob("*.tries")}


def cell_runs(uri: str, failed: Sequence[str] = ()) -> list[str]:
    """n of the finished runs; all others must be failed ones, of these n."""
    runs = runs_of_cells(uri, "toy")
    assert sorted(r.data.tags["n"] for r in runs if r.info.status == "FAILED") == list(failed)
    finished = sorted(r.data.tags["n"] for r in runs if r.info.status == "FINISHED")
    assert len(finished) + len(failed) == len(runs)
    return finished


@pytest.mark.slow
def test_run_fail_repair_extend_continue_report(tmp_path: Path, main: Main) -> None:
    settings = ("--set", "pack_size=1", "--set", f"scratch={tmp_path}")
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    for name in ("sweeps/__init__.py", "data/__init__.py", "pandas.py"):  # workers must not take them for their own
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('of the folder that the launch was started from')")
    first = toy(tmp_path, *settings, "--set", "n=1,2,3", "--set", "bad=2")
    assert first.returncode == 1
    assert "n=2 is on the list of bad numbers; choose another" in first.stderr
    assert "2/3 published" in first.stdout
    assert "compare-runs?runs=" not in first.stdout  # the long address is in the report alone
    assert "/#/experiments/1/runs?" in first.stdout
    assert "compare-runs?runs=" in (tmp_path / "runs/reports/toy/small/report.md").read_text()
    assert "next         put right what the reasons name, then" in first.stderr
    assert "--retry-failed" in first.stderr.splitlines()[-1]
    assert "a toy for the machinery's tests" in first.stdout
    assert cell_runs(uri, failed=["2"]) == ["1", "3"]

    assert main(*settings, "--set", "n=1,2,3", "--set", "bad=2").code == 1  # failed cells are not repeated unasked
    assert tries(tmp_path) == {1: 1, 2: 1, 3: 1}

    wider = toy(tmp_path, *settings, "--set", "n=1,2,3,4", "--retry-failed")
    assert wider.returncode == 0, wider.stderr
    assert "4/4 published" in wider.stdout
    assert tries(tmp_path) == {1: 1, 2: 2, 3: 1, 4: 1}
    assert cell_runs(uri) == ["1", "2", "3", "4"]

    again = main(*settings, "--set", "n=1,2,3,4")
    assert again.code == 0
    assert "4/4 published" in again.out
    assert tries(tmp_path) == {1: 1, 2: 2, 3: 1, 4: 1}
    assert cell_runs(uri) == ["1", "2", "3", "4"]

    report = main("--report", "--set", "n=1,2,3,4")
    assert report.code == 0
    assert "sum          30" in report.out
    assert (tmp_path / "runs/reports/toy/small/report.md").read_text().splitlines() == [
        "1 1.0",
        "2 4.0",
        "3 9.0",
        "4 16.0",
        "",
        "Settings of this launch: `--preset small --set n=1,2,3,4`.",
    ]

    cell = next((tmp_path / "runs/ledger/toy/1").glob("*/cell.json"))
    meta = json.loads(cell.read_text())
    assert {"git_commit", "packages", "hardware", "fingerprint", "python"} <= set(meta)

    other_code = main("--set", "n=1", "--set", "salt=changed")
    assert other_code.code == 2
    assert "fingerprint" in other_code.err
    assert "Traceback" not in other_code.err


@pytest.mark.slow
def test_killed_worker_is_retried_and_keeps_what_was_published(tmp_path: Path) -> None:
    """Each loss of a worker after some progress counts from one again, however many there are."""
    settings = ("n=1,2,3", "crash=2,3", "pack_size=3", "max_retries=1", f"scratch={tmp_path}")
    run = toy(tmp_path, *(part for setting in settings for part in ("--set", setting)))
    assert run.returncode == 0, run.stderr
    assert "pack0: its worker died (Worker unexpectedly exits with a connection error code" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    assert tries(tmp_path) == {1: 1, 2: 2, 3: 2}
    assert cell_runs(f"sqlite:///{tmp_path}/runs/mlflow.db") == ["1", "2", "3"]


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cells(tmp_path: Path) -> None:
    arguments = ("--set", "n=1,2,3,4,5,6", "--set", "seconds=2", "--set", "pack_size=6")
    driver = subprocess.Popen(
        command(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    deadline = time.monotonic() + 120
    while not ledger.done() and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors
    done = ledger.done()
    assert 0 < len(done) < 6
    assert toy(tmp_path, *arguments, "--set", "seconds=0").returncode == 0
    assert len(ledger.done()) == 6


@pytest.mark.slow
def test_two_launches_share_one_ledger(tmp_path: Path) -> None:
    arguments = (
        "--set",
        "n=1,2,3,4,5,6",
        "--set",
        "seconds=0.5",
        "--set",
        "pack_size=3",
        "--set",
        f"scratch={tmp_path}",
    )
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/runs/mlflow.db"}
    both = [
        subprocess.Popen(
            command(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for _ in range(2)
    ]
    outs = [p.communicate(timeout=240) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert all("6/6 published" in out for out, _ in outs)
    assert tries(tmp_path) == dict.fromkeys(range(1, 7), 1)
    assert cell_runs(f"sqlite:///{tmp_path}/runs/mlflow.db") == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("moment", ["while the first computes", "when it has ended"])
def test_a_second_launch_with_other_data_is_refused(tmp_path: Path, moment: str) -> None:
    """A process of its own, which ends before Ray starts; the first launch is played here."""
    ledger = Ledger(str(tmp_path / "runs" / "ledger"), "toy", "1")
    cells = [Square(n=n) for n in Toy().n]
    prints = {cell.key: ToySweep().fingerprint(cell, Toy(salt="first"), RunSettings()) for cell in cells}
    claims = Claims(ledger.store)
    try:
        claims.claim(prints, fingerprints=prints)
        if moment == "when it has ended":
            for cell in cells:
                ledger.publish(cell, [Row("square", 777.0)], {}, {"fingerprint": prints[cell.key]})
        second = toy(tmp_path, "--set", "salt=second")
    finally:
        claims.release()
    assert second.returncode == 2, second.stderr
    assert "Traceback" not in second.stderr
    assert ("from other code or data" if "computes" in moment else "has fingerprint") in second.stderr
    assert "sum" not in second.stdout
    assert not list(tmp_path.rglob("report.md"))


def test_bad_arguments_are_one_line_and_start_nothing(tmp_path: Path, main: Main) -> None:
    for arguments, line in (
        (("--preset", "smal"), "preset 'smal' is not known; did you mean small?; presets: small, many"),
        (("--set", "pak_size=3"), "'pak_size' is not a field of this sweep; did you mean pack_size?"),
        (("--set", "pack_size=many"), "--set pack_size='many' is not a <class 'int'>"),
        (("--set", "n=-1"), "n=-1 is negative; choose n >= 0"),
        (("--set", "on_corrupt=ignore"), "on_corrupt='ignore' is not known; choose raise or skip"),
        (("--only", "0000"), "--only 0000 matches none of the 3 planned cells"),
        (
            ("--only", "../x"),
            "--only '../x' is not the beginning of a key (up to 16 of 0-9 a-f); --plan prints the keys",
        ),
        (("--report",), "none of the 3 cells is published"),
        (("--storage", "/proc/nowhere"), "is not writable"),
        (
            ("--storage", "s3:/bucket/x"),
            "storage s3:/bucket/x has one slash after its scheme; write s3://…, or ./s3:/",
        ),
        (("--storage", "s4://bucket/x"), "storage s4://bucket/x/toy/1 cannot be opened"),
        (
            ("--storage", "memory://x"),
            "storage memory://x is the memory of one process, which Ray's workers do not share",
        ),
        (("--set", "grace_seconds=nan"), "grace_seconds=nan is not a finite number of 0 or more"),
    ):
        run = main(*arguments)
        assert run.code == 2, (arguments, run.err)
        assert line in run.err
        assert len(run.err.strip().splitlines()) == 1
    with pytest.raises(SystemExit) as unknown:
        main("--nonsense")
    assert unknown.value.code == 2
    assert not (tmp_path / "runs/ledger").exists()


@pytest.mark.slow
def test_plan_then_only_one_cell_while_mlflow_is_down(tmp_path: Path, main: Main) -> None:
    plan = main("--plan")
    assert plan.code == 0
    assert "3 planned, 0 done, 3 to do" in plan.out
    assert "nothing was run" in plan.out
    assert not (tmp_path / "runs/ledger").exists()
    only = next(line.split()[0] for line in plan.out.splitlines() if "n=2" in line)[:6]
    down = toy(tmp_path, "--only", only, "--tracking-uri", "http://user:secret@127.0.0.1:9")
    assert down.returncode == 0
    assert "does not answer" in down.stdout
    assert "secret" not in down.stdout + down.stderr
    assert "1/1 published" in down.stdout
    assert "3 planned, 1 done, 2 to do" in main("--plan").out
    assert main("--only", only).code == 0  # nothing left to compute: the finished cell is copied
    assert cell_runs(f"sqlite:///{tmp_path}/runs/mlflow.db") == ["2"]


def test_sigterm_frees_the_claims_and_leaves_the_report_out(
    tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends SIGTERM sends SIGKILL soon after: nothing that takes long may stand before the claims' release."""
    from toy_sweep import Square

    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    monkeypatch.setattr(command_module, "connect", lambda *a: Machine.here())

    def packs(job: object, queue: Queue, *rest: object) -> dict[str, str]:
        assert queue.next() is not None
        ledger.publish(Square(n=1), [Row("square", 1)], {}, {"fingerprint": "", "published_unix": 1.7e9})
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    monkeypatch.setattr(command_module, "run_packs", packs)
    monkeypatch.setattr(command_module, "_LEAVE_SECONDS", 0.1)
    run = main("--tracking-uri", "http://127.0.0.1:9")
    assert run.code == 1
    assert "report       left out, as are the copies in MLflow: the same command makes both" in run.out
    assert "1/3 published" in run.out
    assert "run the same command to continue" in run.err
    assert not (tmp_path / "runs/reports").exists()
    assert ledger.store.names("_claims/launches") == []
    assert ledger.store.names("_stop") == []
    assert ledger.failures([Square(n=2).key, Square(n=3).key]) == {}


@pytest.mark.parametrize(
    ("reason", "failed"),
    [
        ("RuntimeError: SIGTERM: stopped between two cells", False),  # its node was taken away, three times
        ("OSError: [Errno 5] EndpointConnectionError: Could not connect", False),
        ("ZeroDivisionError: division by zero", True),
    ],
)
def test_a_pack_given_up_for_its_nodes_or_the_storages_sake_fails_no_cell(
    reason: str, failed: bool, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toy_sweep import Square

    monkeypatch.setattr(command_module, "connect", lambda *a: Machine.here())

    def given_up(job: object, queue: Queue, *rest: object) -> dict[str, str]:
        assert queue.next() is not None
        return {"pack0": reason}

    monkeypatch.setattr(command_module, "run_packs", given_up)
    monkeypatch.setattr(command_module.Tracker, "start", lambda *a: None)
    monkeypatch.setattr(command_module.Tracker, "finish", lambda *a: False)
    run = main("--set", "n=1")
    assert run.code == 1
    assert reason.removeprefix("OSError: ") in run.err
    assert ("what is published stays: run the same command again" in run.err) != failed
    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    assert list(ledger.failures([Square(n=1).key])) == [Square(n=1).key] * failed


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_workers_get_the_drivers_cache_and_a_cluster_that_is_away_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    given: dict[str, Any] = {}

    def init(**options: Any) -> None:
        given.update(options)
        raise error("nobody\nthere")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(ray_session, "check_address", lambda asked: Address("far:1", "--address"))
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"no Ray cluster answers at far:1 \(nobody there\); start one"):
        connect("far:1", "s3://bucket/ledger")
    assert given["runtime_env"]["env_vars"]["PLUMBLINE_CACHE"] == str(tmp_path)


def test_a_temporary_folder_with_too_long_a_name_for_ray_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(UserError, match=r"107 bytes: /.*/longlong.*; give it a shorter one: export RAY_TMPDIR=/tmp"):
        connect(None, str(tmp_path))


def test_a_cell_that_the_grid_names_twice_is_planned_once(main: Main) -> None:
    assert "2 planned, 0 done, 2 to do" in main("--plan", "--set", "n=3,4,3").out


def test_report_of_a_part_of_the_plan_says_so(tmp_path: Path, main: Main) -> None:
    from toy_sweep import Square

    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    report = tmp_path / "runs/reports/toy/small/report.md"
    for n in (1, 2, 3):
        ledger.publish(Square(n=n), [Row("square", n**2)], {}, {"published_unix": 1.7e9})
        said = main("--report", "--set", "n=1,2,3")
        assert said.code == (n < 3)
        assert (f"{n} of 3 planned cells" in report.read_text()) == (n < 3)
        assert (f"partial      {n} of 3 planned cells" in said.out) == (n < 3)
    main("--report", "--set", "n=1,2,3", "--only", Square(n=2).key)
    assert report.read_text().splitlines() == [
        "**1 of 3 planned cells** are published; this report is of those alone.",
        "",
        "2 4.0",
        "",
        f"Settings of this launch: `--preset small --set n=1,2,3 --only {Square(n=2).key}`.",
    ]


def test_the_part_is_named_below_the_heading(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("# Audit: x\n\n- a fact\n")
    say_partial(report, 3, 36)
    assert report.read_text() == (
        "# Audit: x\n\n**3 of 36 planned cells** are published; this report is of those alone.\n\n- a fact\n"
    )


@pytest.mark.slow
def test_overhead_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledger, MLflow and Tune together: at most 0.2 s a cell, from the first of 200 trivial cells to the last.

    And before the first no import of loggers that nobody asked for.
    """
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    run = toy(tmp_path, "--preset", "many")
    assert run.returncode == 0, run.stderr
    assert "ray.tune" in run.stderr
    assert "wandb" not in run.stderr
    assert len(cell_runs(f"sqlite:///{tmp_path}/runs/mlflow.db")) == 200
    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    times = [cell.meta["published_unix"] for cell in ledger.read_many(sorted(ledger.done()))]
    assert (max(times) - min(times)) / 199 <= 0.2


LEAVE_RAY = """
import gc, sys, threading
import ray
from sweeps.launch.command import shutdown_ray

class Cycle:
    pass

gc.disable()
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", object_store_memory=10**8)
for i in range(20_000):
    cycle = Cycle()
    cycle.itself, cycle.reference = cycle, ray.put(i)
del cycle
collector = threading.Thread(target=gc.collect)
sys.setswitchinterval(1e-5)
start = ray.shutdown
ray.shutdown = lambda: (collector.start(), start())
shutdown_ray()
collector.join()
print("alive")
"""


@pytest.mark.slow
def test_garbage_of_ray_in_another_thread_does_not_end_the_driver(tmp_path: Path) -> None:
    """A collector that runs while Ray shuts down, in a thread like the lease's, finds nothing of Ray's."""
    where = {**os.environ, "PYTHONPATH": str(TOY.parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", LEAVE_RAY], cwd=tmp_path, env=where, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-500:]
    assert run.stdout.strip() == "alive"


LOOK_AT_IPYTHON = """
import sys
from pathlib import Path
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from sweeps.launch.tracking import Tracker

class Looking(Tracker):
    def _work(self):
        print("whole" if hasattr(sys.modules.get("IPython"), "version_info") else "not yet")

ledger = Ledger(str(Path("ledger").resolve()), "toy", "1")
tracker = Looking("sqlite:///mlflow.db", ledger, Claims(ledger.store), artifact_mb=1.0, say=print)
tracker.start({}, {})
tracker._thread.join()
"""


def test_the_thread_of_mlflow_finds_ipython_loaded(tmp_path: Path) -> None:
    """Matplotlib reads the version of an IPython it finds, so one that a thread has loaded by half breaks a plot."""
    where = {**os.environ, "PYTHONPATH": str(TOY.parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", LOOK_AT_IPYTHON], cwd=tmp_path, env=where, capture_output=True, text=True, timeout=240
    )
    assert run.stdout.strip() == "whole", run.stderr[-500:]
