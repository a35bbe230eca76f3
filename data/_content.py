"""What names a file's content wherever the file lies."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from data._atomic import write_whole


def file_sha256(*paths: str | Path) -> str:
    """Hexadecimal SHA-256 of the files' bytes, one after another."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def content_of(filesystem: Any, path: str, cache: Path | None = None) -> str:
    """SHA-256 of a file on an fsspec filesystem, or the ETag of a store that lists one: nothing is read then.

    The hub lists the SHA-256 of large files itself. A file that has to be read is read whole; `cache` is a folder
    that keeps its digest by path, size and time of change, so that a machine reads it once.
    """
    info = filesystem.info(path)
    if lfs := info.get("lfs"):
        return f"sha256 {lfs['sha256']}"
    if etag := info.get("ETag") or info.get("etag"):
        return f"etag {etag}"
    known = _place(cache, path, info)
    if known is not None and known.is_file():
        return known.read_text()
    with filesystem.open(path, "rb") as file:
        digest = f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
    if known is not None:
        write_whole(known, digest.encode())
    return digest


def _place(cache: Path | None, path: str, info: dict[str, Any]) -> Path | None:
    if cache is None or "mtime" not in info:
        return None
    return cache / hashlib.sha256(f"{path} {info['size']} {info['mtime']}".encode()).hexdigest()
