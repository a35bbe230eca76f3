"""Names that come from outside: a ledger, a manifest, an archive, a checkpoint, the hub. One rule for all.

A name is a relative path of plain components. A link that leads out of its
folder is refused, too.
"""

from __future__ import annotations

import os

from sweeps.core.cells import UserError

_FORBIDDEN = ("\\", "\0")


def checked(name: str, where: str) -> str:
    """The name itself; raises UserError for one that could lead out of the folder `where`.

    Refused: an absolute name, a component that is empty, `.` or `..`, a backslash, and control characters.
    """
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or any(sign in name for sign in _FORBIDDEN)
        or not name.isprintable()
    ):
        raise UserError(
            f"file name {name!r} could lead out of {where}; only relative names of plain components are read or "
            "written. Remove that entry, and trust nothing else from its author"
        )
    return name


def inside(path: str, folder: str, where: str) -> str:
    """The path itself, a file below `folder`; raises UserError when a link leads it out of there."""
    base, real = os.path.realpath(folder), os.path.realpath(path)
    if real != base and not real.startswith(f"{base}{os.sep}"):
        raise UserError(f"{path} is a link that leads out of {where}; replace it by the file itself, or remove it")
    return path
