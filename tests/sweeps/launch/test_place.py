"""Where a launch runs: limits of containers, the code of its workers; folders, homes, clusters that are not there."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import _launched
from data.codec_shards import _ShardMaker
from data.shard_reader import _ReadShard
from sweeps.core import limits as process_limits
from sweeps.core import machine as machine_module
from sweeps.core.cells import Pack, UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch import address as address_module
from sweeps.launch import command, failure, ray_session, same_code, tune
from sweeps.launch.pack_queue import Queue
from sweeps.ledger import storage as storage_module
from sweeps.ledger.ledger import Ledger
from tests.sweeps.launch.test_launch import Main, main  # noqa: F401 - a fixture

GIB = 2**30


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 CPUs and 64 GiB, 60 of them free, with no affinity."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(
        process_limits.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB)
    )


V1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/abc\n0::/\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
}
V1_FREE = {
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/cpu.max": "350000 100000\n",
    "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
    "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
    "sys/fs/cgroup/a/memory.current": f"{GIB}\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
}


@pytest.mark.parametrize(
    ("files", "cpus", "total", "available"),
    [
        ({}, 16, 64, 60),
        (V1, 1, 3, 2),
        (V1_FREE, 16, 64, 60),
        (V1_FREE | {"sys/fs/cgroup/cpuset/cpuset.cpus": "0-3,8,10-11\n"}, 7, 64, 60),
        (V2, 3, 4, 3),
        (V2 | {"sys/fs/cgroup/a/b/cpuset.cpus.effective": "4-5\n"}, 2, 4, 3),
        (V2 | {"sys/fs/cgroup/a/memory.current": f"{5 * GIB}\n", "sys/fs/cgroup/a/cpu.max": "5000 100000"}, 1, 4, 0),
    ],
)
def test_the_smallest_limit_counts(
    files: dict[str, str], cpus: int, total: int, available: int, host: None, tmp_path: Path
) -> None:
    assert process_limits.here(plant(tmp_path, files)) == process_limits.Limits(cpus, total * GIB, available * GIB)


def test_affinity_counts_too(host: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2})
    assert process_limits.here(tmp_path).cpus == 2


def test_planning_and_ray_get_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_limits, "here", lambda: process_limits.Limits(1, 3 * GIB, 2 * GIB))
    machine = Machine.here()
    assert (machine.cpus, machine.memory_bytes) == (1, 2 * GIB)
    assert "1 cores, 3 GiB" in machine.hardware
    told = ray_session._local_options()
    assert told["num_cpus"] == 1
    assert told["_memory"] + told["object_store_memory"] == 2 * GIB
    monkeypatch.setattr(process_limits, "here", lambda: process_limits.Limits(1, GIB, 0))
    assert ray_session._local_options()["_memory"] > 0  # Ray's own sum would be negative: no launch at all


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout of other code, to be found before this one."""
    return plant(tmp_path / "other", {f"{room}/__init__.py": "" for room in same_code.ROOMS})


def test_the_digest_tells_contents_names_and_rooms_apart(checkout: Path) -> None:
    def digest() -> str:
        return same_code.code_digest(checkout / room for room in same_code.ROOMS)

    seen = [digest()]
    (checkout / "data/a.py").write_text("x = 1")
    seen.append(digest())
    (checkout / "data/a.py").write_text("x = 3")
    seen.append(digest())
    (checkout / "data/a.py").rename(checkout / "data/b.py")
    seen.append(digest())
    (checkout / "data/b.py").rename(checkout / "models/b.py")
    seen.append(digest())
    assert len(set(seen)) == len(seen)
    (checkout / "data/notes.txt").write_text("no code")
    assert digest() == seen[-1]


def test_a_worker_of_other_code_says_so_and_its_data_tasks_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launched, "_reasons", [])
    monkeypatch.setenv(same_code.VARIABLE, same_code.own_code())
    same_code.guard()
    assert same_code.other_code() is None
    monkeypatch.setenv(same_code.VARIABLE, "f" * 64)
    line = same_code.other_code()
    assert line is not None
    assert f"{same_code.own_code()[:12]} in {machine_module.ROOT}, the launch ffffffffffff" in line
    same_code.guard()
    tasks: list[Callable[[], object]] = [
        lambda: next(_ReadShard(None, 0, 0, 1)()),  # type: ignore[arg-type]
        lambda: _ShardMaker(None, None, {}, ""),  # type: ignore[arg-type]
    ]
    for task in tasks:
        with pytest.raises(RuntimeError, match="runs other code than its launch") as refused:
            task()
        assert failure.refusal(f"Traceback\n  x\nRuntimeError: {refused.value}\n") == line


def test_workers_take_the_checkout_whatever_comes_before_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The setup travels by value, and after it the packages are the checkout's though another folder comes first."""
    import cloudpickle

    travelling = tmp_path / "setup.pkl"
    travelling.write_bytes(cloudpickle.dumps(same_code.worker_setup(str(machine_module.ROOT))))
    worker = (
        "import pickle, sys\n"
        f"pickle.load(open({str(travelling)!r}, 'rb'))()\n"
        f"sys.path.insert(0, {str(checkout)!r})\n"
        "import data.point_clouds, sweeps\n"
        "print(data.point_clouds.__file__, sweeps.__file__)"
    )
    environment = {**os.environ, same_code.VARIABLE: same_code.own_code(), "PYTHONPATH": str(checkout)}
    run = subprocess.run([sys.executable, "-c", worker], cwd=checkout, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [
        str(machine_module.ROOT / "data/point_clouds.py"),
        str(machine_module.ROOT / "sweeps/__init__.py"),
    ]
    assert same_code.worker_job()._runtime_env_has_working_dir()  # what makes Ray add no folder of the driver's


def job_in(folder: Path) -> tune.Job:
    import toy_sweep

    return tune.Job(
        sweep=toy_sweep.SWEEP,
        preset=toy_sweep.Toy(),
        run=RunSettings(),
        storage=str(folder / "l"),
        launch_id="x",
        fingerprints={toy_sweep.Square(n=1).key: ""},
    )


def test_a_pack_whose_worker_runs_other_code_ends_the_launch_and_fails_no_cell(
    tmp_path: Path,
    main: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from toy_sweep import SWEEP, Square

    pack = SWEEP.pack([Square(n=1)], SWEEP.presets["small"], Machine.here(), RunSettings())[0]
    reports: list[dict] = []
    with monkeypatch.context() as patch:
        patch.setenv(same_code.VARIABLE, "f" * 64)
        tune.run_one(job_in(tmp_path), pack, reports.append)
    (line,) = (report["progress"]["refused"] for report in reports)
    assert not (tmp_path / "l").exists()
    ended: list[str] = []
    monkeypatch.setattr(command, "connect", lambda *a: Machine.here())

    def refused(job: object, queue: Queue, *rest: object) -> dict[str, str]:
        assert queue.next() is not None
        return {"pack0": line}

    monkeypatch.setattr(command, "run_packs", refused)
    monkeypatch.setattr(command.Tracker, "start", lambda *a: None)
    monkeypatch.setattr(command.Tracker, "leave", lambda self, status, *a: ended.append(status))
    run = main("--set", "n=1")
    assert run.code == 2
    assert run.err.strip() == f"toy: {line}"
    assert ended == ["FAILED"]
    assert Ledger(str(tmp_path / "runs/ledger"), "toy", "1").failures([Square(n=1).key]) == {}


def test_a_data_task_of_other_code_fails_no_cell(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    import toy_sweep

    line = f"a worker on node7 {same_code.OTHER_CODE}: abc in /x, the launch def; run it again"

    def run(*arguments: object) -> None:
        raise RuntimeError(f"ray::read()\n  File …\nRuntimeError: {line}")

    monkeypatch.setattr(toy_sweep.ToySweep, "run", run)
    reports: list[dict] = []
    square = toy_sweep.Square(n=1)
    tune.run_one(job_in(tmp_path), Pack(name="p", cells=(square,)), reports.append)
    assert reports[-1]["progress"]["refused"] == line
    assert Ledger(str(tmp_path / "l"), "toy", "1").failures([square.key]) == {}


@pytest.fixture
def silent() -> Iterator[str]:
    """A port where something listens that does not speak Ray's protocol."""
    with socket.create_server(("", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("asked", "variable", "text", "undo"),
    [
        (None, "127.0.0.1:9", "127.0.0.1:9", "or unset RAY_ADDRESS, which names it"),
        ("auto", "127.0.0.1:9", "127.0.0.1:9", "or unset RAY_ADDRESS, which names it"),
        ("127.0.0.1:9", "10.0.0.1:6379", "127.0.0.1:9", "or leave out --address, which names it"),
        ("ray://127.0.0.1:9", "", "ray://127.0.0.1:9", "or leave out --address, which names it"),
        ("127.0.0.1:port", "", "127.0.0.1:port", "or leave out --address, which names it"),
    ],
)
def test_a_cluster_that_is_gone_is_told_at_once(
    asked: str | None, variable: str, text: str, undo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    before = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster answers at {text} ") as error:
        address_module.check(asked)
    assert undo in str(error.value)
    assert time.monotonic() - before < 5


def test_this_machine_alone_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(address_module, "_knock", lambda text: pytest.fail("asked"))
    assert address_module.check(None).text == "local"


def test_signals_are_heard_while_a_stranger_is_asked_and_it_gets_no_minutes(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heard(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, heard)
    sender = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    began = time.monotonic()
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            address_module._within(30.0, lambda: time.sleep(3))
        assert time.monotonic() - began < 2
    finally:
        signal.signal(signal.SIGUSR1, before)
    monkeypatch.setattr(address_module, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: time.sleep(2))  # it waits for 40 s
    with pytest.raises(UserError, match=r"nothing that speaks Ray's protocol within 0\.3 s"):
        address_module.check(silent)


def test_a_dead_cluster_is_told_before_anything_is_begun(
    tmp_path: Path,
    main: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command.Tracker, "start", lambda *a: pytest.fail("MLflow was asked"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    run = main()
    assert run.code == 2
    assert "toy: no Ray cluster answers at 127.0.0.1:9" in run.err
    assert len(run.err.strip().splitlines()) == 1
    assert Ledger(str(tmp_path / "runs/ledger"), "toy", "1").store.names("_claims") == []


def test_a_cluster_of_another_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9\n    Python: 3.10")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(ray_session, "check_address", lambda asked: address_module.Address("far:1", "--address"))
    with pytest.raises(UserError, match=r"the Ray cluster at far:1 does not fit \(Version mismatch: .* Python: 3.10\)"):
        ray_session.connect("far:1", "s3://bucket/x")


def test_versions_of_a_cluster_are_compared_before_anything_is_begun(
    tmp_path: Path,
    main: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(address_module, "_knock", lambda text: {"ray_version": "2.50.1", "python_version": "3.10.4"})
    monkeypatch.setattr(command.Tracker, "start", lambda *a: pytest.fail("MLflow was asked"))
    run = main("--address", "far:1")
    assert run.code == 2
    (line,) = run.err.strip().splitlines()
    assert "the Ray cluster at far:1 has Ray 2.50.1 and Python 3.10.4, here are Ray " in line
    assert "install here what the cluster has, or restart it" in line
    assert Ledger(str(tmp_path / "runs/ledger"), "toy", "1").store.names("_claims") == []
    address_module.check_versions("far:1", {})  # a head that has only just started


def test_a_ray_of_this_machine_alone_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services, worker

    at: dict[object, tuple[str, str | None]] = {}

    def init(address: str, **options: object) -> None:  # its own address is what Ray's servers listen on
        at[address] = services.get_node_ip_address(), os.environ.get(ray_session._MANY_NODES)

    monkeypatch.setenv(ray_session._MANY_NODES, "")
    monkeypatch.delenv(ray_session._MANY_NODES)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(worker, "_global_node", None)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address=None: "10.0.0.11")
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(ray_session, "_machine", lambda storage: None)
    monkeypatch.setattr(ray_session, "check_address", lambda asked: address_module.Address(asked or "local", ""))
    ray_session.connect(None, "runs")
    ray_session.connect("far:1", "runs")
    assert at == {"local": ("127.0.0.1", "0"), "far:1": ("10.0.0.11", None)}


def test_a_ray_of_this_machine_alone_waits_for_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's classes still have what is left out, a cluster's Ray keeps it, and an error brings it back."""
    from ray._private.node import Node

    started: dict[str, list[str]] = {}
    monkeypatch.setattr(Node, "start_api_server", lambda self, *, include_dashboard, raise_on_failure: said("server"))
    monkeypatch.setattr(Node, "start_monitor", lambda self: said("monitor"))

    def said(what: str) -> None:
        started[current].append(what)

    def init(address: str, **options: object) -> None:
        nonlocal current
        started[current := address] = []
        node = Node.__new__(Node)
        node.start_monitor()
        node.start_api_server(include_dashboard=False, raise_on_failure=False)
        raise ConnectionError("far away")

    current = ""
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(ray_session, "check_address", lambda asked: address_module.Address(asked or "local", ""))
    for asked in (None, "far:1"):
        with pytest.raises(UserError):
            ray_session.connect(asked, "runs")
    assert started == {"local": [], "far:1": ["monitor", "server"]}


def test_what_a_local_ray_leaves_out_is_what_ray_starts() -> None:
    from ray._private import node

    source = inspect.getsource(node.Node.start_head_processes)
    assert "self.start_api_server(" in source
    assert "self.start_monitor()" in source


def test_links_are_left_for_each_machine_to_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("desk", "worker", "elsewhere"):
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / "mount").symlink_to("desk")
    storage = storage_module.normal_storage("file+shared://mount/ledger")
    assert storage == f"{tmp_path}/mount/ledger"
    ledger = Ledger(storage, "toy", "1")
    place = "ledger/toy/1"  # MLflow may know cells by the address that older programs used
    assert ledger.store.former_uris() == [f"{tmp_path}/mount/{place}", f"{tmp_path}/desk/{place}"]
    sent = pickle.dumps(ledger)
    (tmp_path / "mount").unlink()
    (tmp_path / "mount").symlink_to("worker")  # as the same path leads on another machine
    pickle.loads(sent).store.replace("x", b"1")
    assert (tmp_path / "worker/ledger/toy/1/x").read_bytes() == b"1"
    assert storage_module.normal_storage("mount/../x") == f"{tmp_path}/x"
    (tmp_path / "mount").unlink()
    (tmp_path / "mount").symlink_to("elsewhere/sub")
    assert storage_module.normal_storage("mount/../x") == f"{tmp_path}/elsewhere/x"  # as every other program sees it
    assert storage_module.normal_storage("./a//b/") == f"{tmp_path}/a/b"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "storage /proc/runs/ledger/toy/1 is not writable"),
        (("--storage", "L"), "the folder for reports runs/reports/toy/small cannot be written"),
        (("--storage", "L", "--report-dir", "R"), "the folder of MLflow's database /proc/runs cannot be written"),
    ],
)
def test_a_working_directory_that_cannot_be_written_is_told_before_anything_is_computed(
    arguments: tuple[str, ...],
    line: str,
    tmp_path: Path,
    main: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir("/proc")  # where not even root can make a folder
    run = main(*(str(tmp_path / a) if a in "LR" else a for a in arguments))
    assert run.code == 2
    assert line in run.err
    assert any(option in run.err for option in ("--storage", "--report-dir", "--tracking-uri"))
    assert len(run.err.strip().splitlines()) == 1


def test_reports_go_where_they_are_asked_to(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from toy_sweep import Square

    from sweeps.core.cells import Row

    Ledger(str(tmp_path / "L"), "toy", "1").publish(Square(n=2), [Row("square", 4)], {}, {"published_unix": 1.7e9})
    monkeypatch.chdir("/proc")
    arguments = ("--report", "--set", "n=2", "--storage", str(tmp_path / "L"))
    assert "choose another with --report-dir DIR" in main(*arguments).err
    run = main(*arguments, "--report-dir", str(tmp_path / "R"))
    assert run.code == 0, run.err
    assert (tmp_path / "R/toy/small/report.md").read_text().splitlines()[0] == "2 4.0"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry, as containers have them."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("PLUMBLINE_CACHE", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_no_home_folder_matters_only_where_nothing_names_the_cache(
    homeless: None,
    tmp_path: Path,
    main: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = main("--plan")
    assert run.code == 2
    assert "no home folder" in run.err
    assert "export PLUMBLINE_CACHE=DIR" in run.err
    assert len(run.err.strip().splitlines()) == 1
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    assert main("--plan").code == 0
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "cache/numba")
    monkeypatch.delenv("NUMBA_CACHE_DIR")


def test_a_home_that_cannot_be_written_gets_the_right_remedy(
    main: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PLUMBLINE_CACHE", raising=False)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/proc"))
    run = main("--plan")
    assert run.code == 2
    assert "the cache folder /proc/.cache/plumbline/numba cannot be written" in run.err
    assert "export PLUMBLINE_CACHE=DIR" in run.err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_printing_never_fails(encoding: str, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(command.Tracker, "start", lambda *a: None)
    monkeypatch.setattr(command.Tracker, "finish", lambda *a: False)
    monkeypatch.setattr(command, "connect", lambda *a: Machine.here())

    def given_up(job: object, queue: Queue, *rest: object) -> dict[str, str]:
        assert queue.next() is not None
        return {"pack0": "Überlauf → ∞"}

    monkeypatch.setattr(command, "run_packs", given_up)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        assert command.main(importlib.import_module("toy_sweep").SWEEP, ["--set", "n=1"]) == 1  # its head has an arrow
    screen.flush()
    assert b"toy --preset small ? " in screen.buffer.getvalue()  # type: ignore[attr-defined]
