"""Claims with leases, so that two launches on one ledger never do the same work.

A launch renews one lease file and its claims end with that lease. The claims themselves are entries of a numbered log
(`_claims/GROUP/N.json`). An entry names a launch and every key that the launch holds. It is made by creating a file
that must not exist, which exactly one launch can do for each number.

What always holds of the log:

1. The highest entry is never removed, so the highest number never falls. A launch removes its own old entry only after
   its new one is the highest; an entry of a dead launch is removed only below the highest; a launch that ends replaces
   its entry by an empty one.
2. An entry counts as a claim only if its number is the highest when its author lists the log again. Its author has
   therefore read every entry below it, and the author of any later entry reads it. (An author with an old listing may
   create a number again that was removed below the highest. The second listing shows that; the author removes the entry
   and claims again.)
3. An entry names no key that a live launch held by the entries below it.

It follows that the last entry that names a key decides (`holders`): its launch holds the key while it is alive, and no
other launch does. A launch that was taken for dead and lives after all finds its keys in a later entry, and has lost
them (`decide`).

A claim of a hundred thousand keys costs one listing, a read of each entry not read before, and one write.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from sweeps.ledger.storage import Store

LEASE_SECONDS = 30.0  # renewed four times in that span; a launch that died elsewhere blocks its cells so long
_FRESH_SHARE = 0.5  # of a lease: an own time stamp older than this is renewed before another's age is measured by it
_MARK = 16  # hexadecimal digits (64 bits) of a fingerprint that a claim carries: enough to tell two apart


def _boot_id() -> str:
    """Name of the running machine, or of the container on it, within which a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()  # new at each start
        pids = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux
        boot, pids = str(int(psutil.boot_time())), 0
    return f"{socket.gethostname()}@{boot}:{pids}"


def _now() -> float:
    """Seconds of a clock that cannot be set and that continues while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _process_runs(lease: Mapping[str, Any]) -> bool | None:
    """Whether the lease's process is at work on this very machine; None where that cannot be seen from here.

    None also for a process that was stopped (SIGSTOP), so that its lease can run out.
    """
    if lease["machine"] != _boot_id():
        return None
    try:
        process = psutil.Process(lease["pid"])
        same = abs(process.create_time() - lease["pid_start"]) < 1.0
        return None if same and process.status() == psutil.STATUS_STOPPED else same
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Entry:
    """One entry of the log: a launch and every key it held when it wrote it, with their fingerprints."""

    launch: str
    nonce: str
    keys: dict[str, str]  # {key: fingerprint, shortened; empty where the group has none}

    def encoded(self) -> bytes:
        """JSON; neighbouring keys of one fingerprint (usually all) share its text."""
        runs = [[mark, len(list(some))] for mark, some in groupby(self.keys.values())]
        entry = {"launch": self.launch, "nonce": self.nonce, "keys": list(self.keys), "fingerprints": runs}
        return json.dumps(entry).encode()

    @classmethod
    def decoded(cls, entry: Mapping[str, Any]) -> Entry:
        """Inverse of `encoded`; an entry of a program that knew no fingerprints has empty ones."""
        marks = [mark for mark, count in entry.get("fingerprints", ()) for _ in range(count)]
        marks += [""] * (len(entry["keys"]) - len(marks))
        return cls(entry["launch"], entry["nonce"], dict(zip(entry["keys"], marks, strict=True)))


@dataclass
class _Log:
    """What this launch knows of one group of claims: the entries read so far, and what it holds itself."""

    entries: dict[int, Entry] = field(default_factory=dict)  # by number
    mine: dict[str, str] = field(default_factory=dict)  # {key: fingerprint}
    foreign: dict[str, str] = field(default_factory=dict)  # {key: launch} held elsewhere for another fingerprint
    number: int = -1  # of this launch's own entry
    shared: bool = False  # another live launch claimed in this group since this one first did


@dataclass(frozen=True)
class Decision:
    """What a launch gets of the keys it wants, and what its next entry must name."""

    ours: list[str]  # wanted keys that no other live launch holds, in their order
    others: dict[str, str]  # {key: live launch that holds it}, the rest of the wanted keys
    foreign: dict[str, str]  # those of `others` that are computed for another fingerprint
    mine: dict[str, str]  # {key: fingerprint} of all that the launch holds now
    recorded: bool  # the log already names the launch as the holder of every key of `ours`


def holders(entries: Mapping[int, Entry]) -> dict[str, Entry]:
    """{key: the last entry that names it}; `entries` by number. Dead launches count here like live ones."""
    last: dict[str, Entry] = {}
    for number in sorted(entries):
        last.update(dict.fromkeys(entries[number].keys, entries[number]))
    return last


def decide(
    own: str,
    wanted: Mapping[str, str],
    mine: Mapping[str, str],
    held: Mapping[str, Entry],
    alive: Mapping[str, bool],
) -> Decision:
    """Divide the keys that launch `own` wants between it and the other live launches.

    wanted: {key: fingerprint, "" where it has none}. mine: {key: fingerprint} that `own` believes it holds.
    held: of `holders`. alive: {launch: whether it lives}, for every launch in `held`.
    """
    others = {k: held[k].launch for k in wanted if k in held and held[k].launch != own and alive[held[k].launch]}
    foreign = {k: launch for k, launch in others.items() if wanted[k] and held[k].keys[k] not in ("", wanted[k])}
    ours = [k for k in wanted if k not in others]
    # what a later entry of another launch names is lost, also if that launch has died since
    kept = {k: mark for k, mark in mine.items() if k not in held or held[k].launch == own}
    recorded = all(k in held and held[k].launch == own for k in ours)
    return Decision(ours, others, foreign, kept | {k: wanted[k] for k in ours}, recorded)


class Claims:
    """The lease of this launch and its claims; a daemon thread renews the lease until `release`.

    A lease ends when it was not renewed for `lease_seconds` by the storage's clock (a machine's may be wrong). On the
    machine of its launch the process decides instead: the lease ends at once when that is gone, and lives as long as
    it, also right after the machine has slept.
    """

    def __init__(self, store: Store, lease_seconds: float = LEASE_SECONDS) -> None:
        self.store, self.lease_seconds = store, lease_seconds
        self.launch_id = time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:8]
        self._logs: dict[str, _Log] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewed, self._lapses = _now(), 0
        self._stored: float | None = None  # when the lease was last written, by the storage's clock
        # one moment by this machine's clock and (or a little earlier) by the storage's
        self._moment = self._renewed, 0.0
        self._far: dict[str, dict[str, Any]] = {}  # leases of other machines, of which only the time stamps change
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        lease = {
            "seconds": self.lease_seconds,
            "unix": time.time(),
            "machine": _boot_id(),
            "pid": os.getpid(),
            "pid_start": psutil.Process().create_time(),
        }
        self.store.replace(_lease(self.launch_id), json.dumps(lease).encode())
        with contextlib.suppress(NotImplementedError):  # the storage gives no times
            stored = self.store.modified(_lease(self.launch_id))
            before, self._stored = self._stored, stored
            if before is not None and stored - before > self.lease_seconds:  # a paused machine's own clock stood still
                self._lapses, self._renewed = self._lapses + 1, _now()
        self._lapses, self._renewed = self.lapses(), _now()
        self._moment = self._renewed, self._stored or 0.0

    def lapses(self) -> int:
        """How often the lease may have ended although this launch lives (a pause, an unreachable storage)."""
        return self._lapses + (_now() - self._renewed > self.lease_seconds)

    def _keep(self) -> None:
        while not self._stop.wait(self.lease_seconds / 4):
            try:
                self._renew()
            except Exception:  # any error: this thread must live on; if the error lasts, the lease simply runs out
                continue

    def alive(self, launch_id: str) -> bool:
        """Whether that launch still holds its lease; after its own release a launch takes every other for alive."""
        if self._stop.is_set():
            return True  # it has no stamp of its own to compare with, and must not make one again
        lease = self._far.get(launch_id) or self.store.read_json(_lease(launch_id))
        if lease is None:
            return False
        if (runs := _process_runs(lease)) is not None:
            return runs
        if _now() - self._renewed > _FRESH_SHARE * self.lease_seconds:
            self._renew()
        renewed, stored = self._moment
        try:
            age = stored + (_now() - renewed) - self.store.modified(_lease(launch_id))
        except FileNotFoundError:  # released in the meantime
            return False
        except NotImplementedError:  # the storage gives no times: use the machines' clocks
            age = time.time() - lease["unix"]
        else:
            if lease["machine"] != _boot_id():
                self._far[launch_id] = lease
        return bool(age <= lease.get("seconds", LEASE_SECONDS))

    def claim(
        self, keys: Iterable[str], group: str = "cells", fingerprints: Mapping[str, str] | None = None
    ) -> tuple[list[str], dict[str, str]]:
        """Claim keys of a group; returns (keys now ours, {key: launch that holds it}). Order is kept.

        `fingerprints` of the keys travel with the claim; `foreign` names the launches that compute a key from other
        code or data. The number of requests depends on the number of launches, not on that of keys.
        """
        wanted = _marks(keys, fingerprints)
        with self._lock:
            log = self._logs.setdefault(group, _Log())
            while True:
                newest, alive = self._read_launches(group, log)
                decision = decide(self.launch_id, wanted, log.mine, holders(log.entries), alive)
                log.foreign, log.mine = decision.foreign, decision.mine
                if decision.recorded or self._append(group, log, newest + 1):
                    self._tidy(group, log, alive)
                    return decision.ours, decision.others

    def held(
        self, keys: Iterable[str], group: str = "cells", fingerprints: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """{key: other live launch that holds it}, without claiming anything; `foreign` is brought up to date."""
        wanted = _marks(keys, fingerprints)
        with self._lock:
            log = self._logs.setdefault(group, _Log())
            _, alive = self._read_launches(group, log)
            decision = decide(self.launch_id, wanted, log.mine, holders(log.entries), alive)
            log.foreign = decision.foreign
            return decision.others

    def _read_launches(self, group: str, log: _Log) -> tuple[int, dict[str, bool]]:
        """Bring the log up to date; returns its highest number and {launch that holds a key: whether it is alive}."""
        newest = self._read_log(group, log)
        holding = dict.fromkeys(log.entries[n].launch for n in sorted(log.entries) if log.entries[n].keys)
        alive = {launch: launch == self.launch_id or self.alive(launch) for launch in holding}
        log.shared |= any(lives for launch, lives in alive.items() if launch != self.launch_id)
        log.shared |= 0 <= log.number != newest
        return newest, alive

    def overtaken(self, group: str) -> bool:
        """Whether another launch claimed in the group after this one did; one listing."""
        with self._lock:
            log = self._logs.get(group)
            return log is not None and self._read_log(group, log) != log.number

    def foreign(self, group: str = "cells") -> dict[str, str]:
        """{key: launch} of the last claim's keys that a live launch computes from other code or data."""
        with self._lock:
            return dict(self._logs[group].foreign) if group in self._logs else {}

    def shared(self, group: str) -> bool:
        """Whether another live launch held anything of the group since this launch's first claim in it."""
        with self._lock:
            return group in self._logs and self._logs[group].shared

    def done_with(self, keys: Iterable[str], group: str = "cells") -> None:
        """Let go of finished keys: the next entry of this launch leaves them out."""
        with self._lock:
            if group in self._logs:
                for key in keys:
                    self._logs[group].mine.pop(key, None)

    def _read_log(self, group: str, log: _Log) -> int:
        """Bring the entries up to date; returns the highest number, -1 where there is none."""
        names = {
            int(n[:-5]): n for n in self.store.names(f"_claims/{group}") if n.endswith(".json") and n[:-5].isdigit()
        }
        log.entries = {number: entry for number, entry in log.entries.items() if number in names}
        for number in names.keys() - log.entries.keys():
            entry = self.store.read_json(f"_claims/{group}/{names[number]}")
            if entry is not None:  # another launch removes entries of dead launches
                log.entries[number] = Entry.decoded(entry)
        return max(names, default=-1)

    def _append(self, group: str, log: _Log, number: int) -> bool:
        """Write this launch's keys as entry `number`; False when that place in the order is not ours."""
        entry = Entry(self.launch_id, uuid.uuid4().hex, dict(log.mine))
        if not self.store.create(_entry(group, number), entry.encoded()):
            made = self.store.read_json(_entry(group, number))
            if made is None or made["nonce"] != entry.nonce:  # the same nonce: a retried create met its own first try
                return False
        if self._read_log(group, log) != number:
            # removed below the highest entry and made again from an old listing: it orders nothing
            self.store.remove_file(_entry(group, number))
            log.entries.pop(number, None)
            return False
        log.entries[number] = entry
        before, log.number = log.number, number
        if before >= 0:  # only now: until here the old entry keeps the keys
            self.store.remove_file(_entry(group, before))
            log.entries.pop(before, None)
        return True

    def _tidy(self, group: str, log: _Log, alive: dict[str, bool]) -> None:
        """Remove entries of dead launches. The highest one stays: its number is what the next claim must exceed."""
        highest = max(log.entries, default=-1)
        for number, entry in list(log.entries.items()):
            if number < highest and (not entry.keys or not alive[entry.launch]):
                self.store.remove_file(_entry(group, number))
                del log.entries[number]

    def release(self) -> None:
        """End the lease, once: what this launch claimed and did not publish is free for others."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._lapses += 1  # a copy in another thread must check whether another launch took over
        with contextlib.suppress(OSError):  # the storage is unreachable: the lease runs out
            self.store.remove_file(_lease(self.launch_id))
            for group, log in list(self._logs.items()):  # another thread may be claiming
                if log.number >= 0:
                    ended = Entry(self.launch_id, "", {})
                    self.store.replace(_entry(group, log.number), ended.encoded())


def _marks(keys: Iterable[str], fingerprints: Mapping[str, str] | None) -> dict[str, str]:
    """{key: its fingerprint as a claim carries it}."""
    return {key: (fingerprints or {}).get(key, "")[:_MARK] for key in keys}


def _lease(launch_id: str) -> str:
    return f"_claims/launches/{launch_id}.json"


def _entry(group: str, number: int) -> str:
    return f"_claims/{group}/{number:09d}.json"
