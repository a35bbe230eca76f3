"""Several launches on one ledger at once, launches that are paused, and clocks that are an hour wrong."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from fault_rig import Survived, said, schedule, wait_for
from fault_warm import Bench, MakeBench, References
from faultpoints import Fault, hits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PUBLISH = r"^rename .*/[0-9a-f]{16}$"
BUSY = Fault(do="slow", on=PUBLISH, times=1000, seconds=0.5)  # notes each publication, and leaves time for others
HOUR = 3600.0


def end(here: Bench, pids: list[int]) -> None:
    """Wait for all of the launches."""
    codes = [here.wait(pid) for pid in pids]
    outputs = [here.output(back) for back in reversed(range(len(pids)))]
    assert codes == [0] * len(pids), "\n\n".join(outputs)


def published(here: Bench, plans: list) -> list[str]:
    """The cell folders that were published by the launches of these plans."""
    return sorted(hit.split()[-1] for plan in plans for hit in hits(plan))


@pytest.mark.parametrize(("sweep", "n"), [("odor_topology", 3), ("codec_lm", 2), ("proxy_gap", 2)])
def test_launches_at_once(bench: MakeBench, reference: References, survived: Survived, sweep: str, n: int) -> None:
    here = bench(sweep)
    draw = schedule(f"at once {sweep} {n}")
    pids, plans = [], []
    for _ in range(n):
        pids.append(here.start(BUSY))
        plans.append(here.launches.plan)
        time.sleep(draw.random())
    end(here, pids)
    expected = reference(sweep)
    here.check(expected)
    assert len(published(here, plans)) == len(expected), "a cell was computed twice"
    survived.add("duplicate launches", f"{n} at once on one ledger", sweep, n=n - 1)


@pytest.mark.parametrize(
    ("sweep", "ahead"),
    [("odor_topology", HOUR), ("odor_topology", -HOUR), ("codec_lm", HOUR)],
)
def test_clock_an_hour_wrong(
    bench: MakeBench, reference: References, survived: Survived, sweep: str, ahead: float
) -> None:
    here = bench(sweep)
    pids, plans = [here.start(BUSY)], [here.launches.plan]
    wait_for(lambda: hits(plans[0]))
    pids.append(here.start(BUSY, clock=ahead))
    plans.append(here.launches.plan)
    end(here, pids)
    expected = reference(sweep)
    here.check(expected)
    assert len(published(here, plans)) == len(expected), "a cell was computed twice"
    survived.add("clock skew", f"a second launch whose clock is {ahead / HOUR:+.0f} h", sweep)


@pytest.mark.parametrize(
    ("sweep", "on", "first"),
    [
        ("odor_topology", PUBLISH, 2),
        ("odor_topology", r"^call create_run$", 2),  # the first makes the launch's own run
        ("odor_topology", r"^return create_run$", 2),
        ("codec_lm", r"^rename .*/_work/.*\.pt$", 2),
    ],
)
def test_paused_for_longer_than_its_lease(
    bench: MakeBench, reference: References, survived: Survived, sweep: str, on: str, first: int
) -> None:
    here = bench(sweep)
    case = f"paused {sweep} {on}"
    paused = here.start(Fault(do="stop", on=on, first=first), lease=2.0)
    wait_for(lambda: psutil.Process(paused).status() == psutil.STATUS_STOPPED)
    hit = here.launches.hits()
    other = here.start(lease=2.0)
    try:
        assert here.wait(other) == 0, f"{said(case, hit)}\n{here.output()}"
    finally:
        os.kill(paused, signal.SIGCONT)
    assert here.wait(paused) == 0, f"{said(case, hit)}\n{here.output(1)}"
    here.check(reference(sweep))
    survived.add("pause longer than the lease", "SIGSTOP at a chosen operation, SIGCONT after the other", sweep)
