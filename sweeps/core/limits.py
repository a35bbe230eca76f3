"""CPUs and memory that this process may really use: the smallest of what host, affinity and control groups allow.

Containers and batch systems show the whole host in /proc and limit through control groups. Both versions are read where
Linux documents them (kernel documentation: admin-guide/cgroup-v1 and admin-guide/cgroup-v2), from the process's own
group up to the root, since a limit of any group above holds too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

_UNLIMITED_BYTES = 2**60  # cgroup v1 spells "no limit" as a number of pages near 2^63


@dataclass(frozen=True)
class Limits:
    """cpus: whole CPUs, at least 1. total_bytes: memory that exists here; available_bytes: of it, not in use."""

    cpus: int
    total_bytes: int
    available_bytes: int


def here(root: Path = Path("/")) -> Limits:
    """The limits of this process; `root` is the folder that holds proc/ and sys/, so that tests can plant their own."""
    host = psutil.virtual_memory()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = [*_memory(root)]
    return Limits(
        cpus=max(1, int(min([os.cpu_count() or 1, affinity, *_cpus(root)]))),
        total_bytes=min([host.total, *(limit for limit, _ in memory)]),
        available_bytes=max(0, min([host.available, *(limit - used for limit, used in memory)])),
    )


def _cpus(root: Path) -> Iterator[float]:
    """CPUs that each group allows, by quota and by the set of processors."""
    for group in _groups(root, ""):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)
        if cpus := _set_size(_text(group / "cpuset.cpus.effective")):
            yield cpus
    for group in _groups(root, "cpu"):
        allowed, per = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if allowed and per and allowed > 0:  # -1: no limit
            yield allowed / per
    for group in _groups(root, "cpuset"):
        if cpus := _set_size(_text(group / "cpuset.effective_cpus") or _text(group / "cpuset.cpus")):
            yield cpus


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used that cannot be reclaimed) of each group that limits memory."""
    for controller, limited, used, cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups(root, controller):
            limit = _number(group / limited)
            if limit is not None and limit < _UNLIMITED_BYTES:
                yield limit, max(0, (_number(group / used) or 0) - _stat(group / "memory.stat", cache))


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's group and of those above it; `controller` "" is version 2.

    In a container the listed path may be the host's, of which only the last folders, or none, exist here: what is
    missing has no files and counts for nothing.
    """
    mounted = root / "sys/fs/cgroup"
    tops = [mounted, mounted / "unified"] if not controller else [p for p in _mounts(mounted, controller) if p.is_dir()]
    path = PurePosixPath("/")
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, where = line.split(":", 2)
        if controller in names.split(","):
            path = PurePosixPath(where)
    inside = [str(p).lstrip("/") for p in (path, *path.parents) if ".." not in p.parts]
    return [top / part for top in tops for part in dict.fromkeys([*inside, ""])]


def _mounts(mounted: Path, controller: str) -> list[Path]:
    """Where version 1 mounts a controller: `cpu`, or together with others as `cpu,cpuacct`."""
    if not mounted.is_dir():
        return []
    return [p for p in sorted(mounted.iterdir()) if controller in p.name.split(",")]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """The whole number in a file; None where there is no file or no number (`max`)."""
    text = _text(file)
    return int(text) if text.lstrip("-").isdigit() else None


def _stat(file: Path, name: str) -> int:
    """One entry of a file of `name value` lines, 0 where it is missing."""
    entries = dict(line.split(" ", 1) for line in _text(file).splitlines() if " " in line)
    return int(entries.get(name, 0))


def _set_size(text: str) -> int:
    """How many processors a list such as `0-3,8` names."""
    count = 0
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            count += int(last or first) - int(first) + 1
    return count
