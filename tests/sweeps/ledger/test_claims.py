"""Leases through sleep, pauses and errors of a library; claims that carry what they are computed from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.ledger import claims as claims_module
from sweeps.ledger.claims import Claims
from sweeps.ledger.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def pair(store: Store) -> Iterator[tuple[Claims, Claims]]:
    first, second = Claims(store, lease_seconds=0.4), Claims(store, lease_seconds=0.4)
    yield first, second
    first.release()
    second.release()


def _stop_renewing(claims: Claims) -> None:
    claims._stop.set()
    claims._thread.join()
    claims._stop.clear()


def test_a_machine_that_slept_does_not_rob_its_own_launch(store: Store, pair: tuple[Claims, Claims]) -> None:
    """Right after waking up the lease is an hour old, and its process is alive on this very machine."""
    first, second = pair
    first.claim(["a"])
    _stop_renewing(first)
    lease = store.path(f"_claims/launches/{first.launch_id}.json")
    os.utime(lease, (time.time() - 3600, time.time() - 3600))
    assert second.claim(["a"]) == ([], {"a": first.launch_id})


def test_a_paused_machine_whose_own_clocks_stood_still_notices(
    store: Store, pair: tuple[Claims, Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = pair
    _stop_renewing(first)
    monkeypatch.setattr(claims_module, "_now", lambda: 1000.0)
    first._renewed = 1000.0
    before = first.lapses()
    lease = store.path(f"_claims/launches/{first.launch_id}.json")
    os.utime(lease, (time.time() - 3600, time.time() - 3600))
    first._stored = store.modified(f"_claims/launches/{first.launch_id}.json")
    first._renew()
    assert first.lapses() == before + 1


def test_who_claims_after_us_is_seen_without_a_clock(pair: tuple[Claims, Claims]) -> None:
    first, second = pair
    first.claim(["a"])
    assert not first.overtaken("cells")
    second.claim(["b"])
    assert first.overtaken("cells")


@pytest.mark.parametrize("error", [ValueError("bad date"), KeyError("LastModified"), RuntimeError("loop closed")])
def test_no_error_ends_the_renewal(store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    claims = Claims(store, lease_seconds=0.2)
    try:
        renew, failed = claims._renew, []

        def once() -> None:
            if not failed:
                failed.append(error)
                raise error
            renew()

        monkeypatch.setattr(claims, "_renew", once)
        end = time.monotonic() + 5
        while not failed and time.monotonic() < end:
            time.sleep(0.02)
        written = store.modified(f"_claims/launches/{claims.launch_id}.json")
        while store.modified(f"_claims/launches/{claims.launch_id}.json") == written and time.monotonic() < end:
            time.sleep(0.02)
        assert failed
        assert claims._thread.is_alive()
        assert store.modified(f"_claims/launches/{claims.launch_id}.json") > written
    finally:
        claims.release()


def test_claims_tell_who_computes_a_key_from_something_else(pair: tuple[Claims, Claims]) -> None:
    first, second = pair
    first.claim(["a", "b"], fingerprints={"a": "1" * 64, "b": "2" * 64})
    ours, others = second.claim(["a", "b", "c"], fingerprints={"a": "1" * 64, "b": "9" * 64, "c": "3" * 64})
    assert (ours, set(others)) == (["c"], {"a", "b"})
    assert second.foreign() == {"b": first.launch_id}
    assert first.foreign() == {}


def test_an_entry_of_an_older_program_has_no_fingerprints(store: Store, pair: tuple[Claims, Claims]) -> None:
    first, second = pair
    first.claim(["a"])
    place = f"_claims/cells/{store.names('_claims/cells')[-1]}"
    entry = {k: v for k, v in json.loads(store.read(place)).items() if k != "fingerprints"}
    store.replace(place, json.dumps(entry).encode())
    assert second.claim(["a"], fingerprints={"a": "x"}) == ([], {"a": first.launch_id})
    assert second.foreign() == {}
