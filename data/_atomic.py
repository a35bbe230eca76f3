"""A file on a disk that readers see whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(target: str | Path, data: bytes) -> None:
    """Write next to the target, flush to the disk, rename; a process that dies leaves at most a `.tmp` file there.

    Folders are made as needed. Raises OSError, and then the target is what it was before.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    aside = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with open(aside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def move_whole(made: Path, target: str | Path) -> None:
    """Move a finished file of the same disk to `target`: flush it, then rename."""
    with open(made, "rb") as f:
        os.fsync(f.fileno())
    os.replace(made, target)
