"""The real command line on Ray: drivers, workers, raylets and heads are killed, then the same command runs again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import psutil
import pytest
from fault_rig import PATIENCE, Launches, Survived, kill, said, schedule, wait_for
from fault_sweeps import SWEEPS, Tiny, assert_same, assert_tidy, assert_tracked, results
from fault_warm import References
from faultpoints import Fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
RANDOM, AGAIN = "kill -9 at a random time", ", the same command again"
RECONNECT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}  # Ray waits a minute for a head that is gone


class Chain:
    """The same command in one folder, disturbed again and again, then let finish."""

    def __init__(self, launches: Launches, tiny: Tiny, case: str, *more: str) -> None:
        self.launches, self.tiny, self.case, self.more = launches, tiny, case, more
        self.ledger = tiny.ledger(str(launches.folder / "runs" / "ledger"))
        self.draw = schedule(case)
        self.events: list[str] = []
        self.resumed: list[float] = []  # of each launch: seconds from the command to the first new work that is kept

    def start(self, *faults: Fault) -> subprocess.Popen[str]:
        """Start the command with these faults armed."""
        self.launches.arm(*faults)
        return self.launches.start(self.tiny.script, *self.tiny.arguments, *self.more, **RECONNECT)

    def progress(self) -> int:
        """A number that grows with the work kept: steps in checkpoints and cells published."""
        names = self.ledger.store.names("_work")
        pointers = [self.ledger.store.read_json(f"_work/{name}/latest.json") for name in names]
        return 1_000_000 * len(self.ledger.done()) + sum(p["step"] for p in pointers if p)

    def worked(self, driver: subprocess.Popen[str]) -> None:
        """Wait until a launch that was just started has kept new work, or has ended."""
        before, began = self.progress(), time.monotonic()
        wait_for(lambda: self.progress() > before or driver.poll() is not None)
        self.resumed.append(time.monotonic() - began)

    def kill(self, victim: Callable[[], object], driver: subprocess.Popen[str], what: str) -> int:
        """kill -9 of a process; returns the exit code with which the launch ends."""
        time.sleep(0.5 * self.draw.random())
        assert driver.poll() is None, self.failing("the launch ended before it could be disturbed")
        kill(victim())  # type: ignore[arg-type]
        self.events.append(f"kill -9 of {what} at progress {self.progress()}")
        return driver.wait(PATIENCE)

    def kill_worker(self, driver: subprocess.Popen[str]) -> None:
        """kill -9 of a worker as soon as there is one; returns once it is gone."""
        found = wait_for(lambda: self.launches.worker() or driver.poll() is not None)
        assert isinstance(found, psutil.Process), self.failing("the launch ended before it had a worker")
        kill(found)
        self.events.append("kill -9 of a worker")
        wait_for(lambda: not found.is_running())

    def one(self, name: str) -> Callable[[], object]:
        """A process of the launch by a part of its command line."""
        return lambda: wait_for(lambda: self.launches.processes(name))[0]

    def finish(self, reference: References) -> None:
        """The same command with nothing in its way; everything that must hold then."""
        self.launches.arm()
        driver = self.launches.start(self.tiny.script, *self.tiny.arguments, *self.more)
        self.worked(driver)
        assert driver.wait(2 * PATIENCE) == 0, self.failing(self.launches.output())
        expected = reference(self.tiny.name)
        try:
            assert_same(results(self.ledger), expected)
            assert_tidy(self.ledger)
            uri = f"sqlite:///{self.launches.folder}/runs/mlflow.db"
            assert_tracked(self.tiny, uri, self.ledger.store.uri, expected, len(self.launches.started))
        except AssertionError as error:
            raise AssertionError(self.failing(str(error))) from error

    def failing(self, why: str) -> str:
        return f"{said(self.case, self.events)}\n{why}"


def slowed(publishing: float) -> Fault:
    """Room for kills: tiny cells are over too soon."""
    return Fault(do="slow", on=r"^rename .*/[0-9a-f]{16}$", times=100, seconds=publishing, role="worker")


def slow_steps(seconds: float) -> Fault:
    """Room for kills within a cell that saves its state after every step."""
    return Fault(do="slow", on=r"^rename .*/_work/.*\.json$", times=100, seconds=seconds, role="worker")


def struck(launches: Launches) -> list[str]:
    """Operations at which a process was killed."""
    return [hit for hit in launches.hits() if not hit.startswith("slow")]


def test_workers_and_drivers_killed(launches: Launches, sources, reference: References, survived: Survived) -> None:
    chain = Chain(launches, SWEEPS["proxy_gap"](sources), "proxy_gap on Ray")
    torn = Fault(do="torn", on=r"^write .*/_work/.*\.pt\.", role="worker")
    published = Fault(do="kill", on=r"^rename .*/[0-9a-f]{16}$", role="worker")
    driver = chain.start(torn, published, slowed(1.0))
    chain.worked(driver)
    wait_for(lambda: len(struck(launches)) >= 2 or driver.poll() is not None)
    hit = struck(launches)
    chain.events += hit
    assert chain.kill(lambda: driver, driver, "the driver") == -9
    launches.gone()
    chain.finish(reference)
    launches.gone()
    survived.add("worker killed: writing", "kill -9 at the n-th write, on Ray", "proxy_gap", n=len(hit))
    survived.add("driver killed", f"{RANDOM}, private Ray{AGAIN}", "proxy_gap", seconds=chain.resumed[1])


@pytest.mark.parametrize("name", ["raylet/raylet", "gcs_server"])
def test_raylet_or_head_killed(
    launches: Launches, sources, reference: References, survived: Survived, name: str
) -> None:
    chain = Chain(launches, SWEEPS["odor_topology"](sources), f"odor_topology on Ray, {name}")
    driver = chain.start(slowed(8.0))  # work must be left when Ray notices, up to 40 s later
    chain.worked(driver)
    assert chain.kill(chain.one(name), driver, name) != 0, chain.failing(launches.output())
    launches.gone()  # what workers publish before they notice must not be taken for the next launch's work
    chain.finish(reference)
    launches.gone()
    what = f"{name.split('/')[-1]} killed"
    survived.add(what, f"{RANDOM}, private Ray{AGAIN}", "odor_topology", seconds=chain.resumed[1])


def test_sigterm_then_kills_of_worker_and_driver(
    launches: Launches, sources, reference: References, survived: Survived
) -> None:
    chain = Chain(launches, SWEEPS["codec_lm"](sources), "codec_lm on Ray")
    driver = chain.start(slowed(1.0), slow_steps(0.5))
    chain.worked(driver)
    told = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(PATIENCE) == 1, chain.failing(launches.output())
    assert time.monotonic() - told < 60
    assert "run the same command to continue" in launches.output()
    assert "Traceback" not in launches.output(), launches.output()
    assert chain.ledger.store.names("_stop") == chain.ledger.store.names("_failed") == []
    chain.events.append("SIGTERM of the driver")
    launches.gone()
    driver = chain.start(slowed(1.0), slow_steps(0.5))
    chain.kill_worker(driver)
    chain.worked(driver)
    assert chain.kill(lambda: driver, driver, "the driver") == -9
    launches.gone()
    chain.finish(reference)
    launches.gone()
    survived.add("driver told to stop", f"SIGTERM at a random time{AGAIN}", "codec_lm")
    survived.add("worker killed", f"{RANDOM}, retried by the launch", "codec_lm")
    survived.add("driver killed", f"{RANDOM}, private Ray{AGAIN}", "codec_lm", seconds=chain.resumed[-1])


LEAKS = """
import json, ray, sys, time
from ray.util import placement_group_table
ray.init(address=sys.argv[1], logging_level="ERROR")
end = time.monotonic() + float(sys.argv[2])
while True:
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    total, free = ray.cluster_resources(), ray.available_resources()
    taken = {n: total[n] - free.get(n, 0.0) for n in total if total[n] - free.get(n, 0.0) > 1e-6 and "memory" not in n}
    if (not groups and not taken) or time.monotonic() > end:
        print(json.dumps([groups, taken]))
        break
    time.sleep(0.5)
"""


def test_drivers_killed_on_a_cluster_that_stays(
    launches: Launches, sources, reference: References, survived: Survived, tmp_path_factory: pytest.TempPathFactory
) -> None:
    head = Launches(tmp_path_factory.mktemp("head"), PLUMBLINE_CACHE=launches.env["PLUMBLINE_CACHE"])
    short = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # a socket's name has 107 bytes
    try:
        address = start_head(head, launches, short.name)
        chain = Chain(launches, SWEEPS["odor_topology"](sources), "driver on a cluster", "--address", address)
        for _ in range(2):
            driver = chain.start(slowed(1.0))
            chain.worked(driver)
            assert chain.kill(lambda driver=driver: driver, driver, "the driver") == -9
        chain.finish(reference)
        found = subprocess.run(
            [sys.executable, "-c", LEAKS, address, str(PATIENCE)],
            capture_output=True,
            text=True,
            check=True,
            env=head.env,
        )
        assert json.loads(found.stdout.splitlines()[-1]) == [[], {}], "placement groups or resources are still held"
        launches.gone()
        survived.add("driver killed", f"{RANDOM}, cluster that stays{AGAIN} at once", "odor_topology", n=2)
    finally:
        head.close()
        short.cleanup()


def start_head(head: Launches, launches: Launches, folder: str) -> str:
    """A Ray head of this test alone, as a cluster's first node, with slow workers and its files in `folder`.

    Returns its address.
    """
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=2"),
        *("--include-dashboard=false", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"),
    ]
    head.arm(slowed(1.0), roots=[launches.folder / "runs" / "ledger"])
    env = head.env | {"PLUMBLINE_FAULTS": str(head.plan)}
    with open(head.folder / "head.txt", "w") as out:
        subprocess.run(command, env=env, stdout=out, stderr=out, check=True, timeout=PATIENCE)
    return f"127.0.0.1:{port}"
