"""Digests that identify a file's content, wherever the file lies."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from data._atomic import write_whole

UNREADABLE = "unreadable"
_AT_ONCE = 8  # files hashed at once: more would not make a disk faster
_LONG_BYTES = 10**9  # takes some seconds to read: worth a line to the user
_FRESH_NS = 2 * 10**9  # a file as young as this may change again within the clock's tick: its digest is not kept


def file_sha256(*paths: str | Path) -> str:
    """Hexadecimal SHA-256 of the files' bytes, one after another."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def file_stamp(path: str | Path) -> list[int]:
    """What changes when a file does: size, times of change of content and of inode (ns), inode. Raises OSError."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def known_digests(
    stamps: Mapping[str, list[int]],
    read: Callable[[str], str],
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """{name: digest} of all names in `stamps`: kept ones where the stamp is the same, else what `read` gives.

    Args:
        stamps: by name, what changes when the content does: bytes, two times in ns, and more.
        read: the digest of a name, or `UNREADABLE`, which is never kept; called in several threads.
        cache: JSON file that keeps digests from one process to the next; other processes wait for the one that reads.
        say: called once with a line, where reading takes more than some seconds.
    """
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock") if cache is not None else nullcontext():
        kept = _kept(cache)
        found = {name: kept[name][-1] for name, stamp in stamps.items() if name in kept and kept[name][:-1] == stamp}
        missing = [name for name in stamps if name not in found]
        size = sum(max(0, stamps[name][0]) for name in missing)
        if size > _LONG_BYTES:
            say(f"reading {len(missing):,} files ({size / 1e9:.0f} GB) once, to know their content")
        now = time.time_ns()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found |= zip(missing, pool.map(read, missing), strict=True)
        settled = [n for n in missing if found[n] != UNREADABLE and now - max(stamps[n][1:3]) > _FRESH_NS]
        if cache is not None and settled:
            kept |= {name: [*stamps[name], found[name]] for name in settled}
            write_whole(cache, json.dumps({n: entry for n, entry in kept.items() if n in stamps}).encode())
    return found


def _kept(cache: Path | None) -> dict[str, list[Any]]:
    if cache is None:
        return {}
    try:
        return dict(json.loads(cache.read_bytes()))
    except (OSError, ValueError):  # a damaged file only costs reading
        return {}


def content_of(filesystem: Any, path: str, cache: Path | None = None) -> str:
    """SHA-256 of a file on an fsspec filesystem, or the ETag of a store that lists one: nothing is read then.

    The hub lists the SHA-256 of large files itself. A file that has to be read is read whole; `cache` is a folder
    that keeps its digest by path, size, times of change and inode, so that a machine reads it once.
    """
    info = filesystem.info(path)
    if lfs := info.get("lfs"):
        return f"sha256 {lfs['sha256']}"
    if etag := info.get("ETag") or info.get("etag"):
        return f"etag {etag}"
    known = _place(cache, path, info)
    if known is not None and known.is_file():
        return known.read_text(encoding="ascii")
    with filesystem.open(path, "rb") as file:
        digest = f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
    if known is not None:
        write_whole(known, digest.encode())
    return digest


def _place(cache: Path | None, path: str, info: dict[str, Any]) -> Path | None:
    if cache is None or "mtime" not in info:
        return None
    # of a local file: `created` is the time its inode changed, which a copy with the old time of change does not keep
    stamp = (path, info["size"], info["mtime"], info.get("created"), info.get("ino"))
    return cache / hashlib.sha256(repr(stamp).encode()).hexdigest()
