"""Derived weights kept on disk: built once, published atomically, safe when two processes need them at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, else $PLUMBLINE_CACHE, else ~/.cache/plumbline."""
    return Path(cache_dir or os.environ.get("PLUMBLINE_CACHE") or Path.home() / ".cache" / "plumbline")


def cached_directory(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """``root/key``, made by ``build(scratch)`` when it is not there yet.

    A second process waits for the first one's lock instead of building too; the directory appears complete or
    not at all (built in a sibling and renamed), so a killed builder leaves nothing that looks finished.
    """
    target = root / key
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{key}.lock"):
        if target.is_dir():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=root))
        try:
            build(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target
