"""Claims with leases, so that two launches on one ledger never do the same work.

A launch renews one lease file; its claims on cells name the launch, so a hundred thousand claims cost one renewal.
A claim of a dead launch is taken over by creating the next generation of the claim file, which exactly one
launch can do.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable

import psutil

from sweeps._storage import Store

LEASE_SECONDS = 30.0


def _boot_id() -> str:
    return f"{socket.gethostname()}@{int(psutil.boot_time())}"


class Claims:
    """The lease of this launch and its claims; a daemon thread renews the lease until `release`.

    A lease ends when its time is over, or at once when its process is gone from the same running machine.
    """

    def __init__(self, store: Store, lease_seconds: float = LEASE_SECONDS) -> None:
        self.store, self.lease_seconds = store, lease_seconds
        self.launch_id = time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:8]
        self._mine: list[str] = []
        self._stop = threading.Event()
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        lease = {
            "expires_unix": time.time() + self.lease_seconds,
            "machine": _boot_id(),
            "pid": os.getpid(),
            "pid_start": psutil.Process().create_time(),
        }
        self.store.replace(f"_claims/launches/{self.launch_id}.json", json.dumps(lease).encode())

    def _keep(self) -> None:
        while not self._stop.wait(self.lease_seconds / 4):
            try:
                self._renew()
            except OSError:
                continue  # storage is away: the lease runs out by itself if it stays away

    def alive(self, launch_id: str) -> bool:
        """Whether that launch still holds its lease."""
        lease = self.store.read_json(f"_claims/launches/{launch_id}.json")
        if lease is None or lease["expires_unix"] < time.time():
            return False
        if lease["machine"] != _boot_id():
            return True
        try:
            return abs(psutil.Process(lease["pid"]).create_time() - lease["pid_start"]) < 1.0
        except psutil.NoSuchProcess:
            return False

    def claim(self, keys: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        """Claim cells; returns (keys now ours, {key: launch that holds it}). Order is kept."""
        generations: dict[str, int] = {}
        for name in self.store.names("_claims/cells"):
            key, _, number = name.partition(".")
            generations[key] = max(generations.get(key, -1), int(number))
        alive: dict[str, bool] = {}
        ours, others = [], {}
        for key in keys:
            generation = generations.get(key, -1)
            if generation >= 0:
                holder = self._holder(key, generation)
                if holder == self.launch_id:
                    ours.append(key)
                    continue
                if holder not in alive:
                    alive[holder] = self.alive(holder)
                if alive[holder]:
                    others[key] = holder
                    continue
            name = f"_claims/cells/{key}.{generation + 1:06d}"
            made = self.store.create(name, self.launch_id.encode())
            holder = self.launch_id if made else self._holder(key, generation + 1)
            if holder == self.launch_id:  # also when a retried create met its own first try
                ours.append(key)
                self._mine.append(name)
            else:
                others[key] = holder
        return ours, others

    def _holder(self, key: str, generation: int) -> str:
        try:
            return self.store.read(f"_claims/cells/{key}.{generation:06d}").decode()
        except FileNotFoundError:
            return "released"

    def release(self) -> None:
        """End the lease: what this launch claimed and did not publish is free for others."""
        self._stop.set()
        self._thread.join()
        for name in self._mine:
            self.store.remove(name)
        self.store.remove(f"_claims/launches/{self.launch_id}.json")
