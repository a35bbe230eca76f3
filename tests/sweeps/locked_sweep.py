"""The toy sweep on a storage that asks for a password: `locked://user:password@vault/folder` is a local folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from toy_sweep import ToySweep


class Locked(DirFileSystem):
    """A folder ($LOCKED_FOLDER) that asks for user name and password, like sftp:// and ftp://."""

    protocol = "locked"
    cachable = False

    def __init__(self, host: str = "", username: str = "", password: str = "", **kwargs: Any) -> None:
        if (username, password) != ("user", os.environ["LOCKED_WORD"]):
            raise PermissionError(f"no such user at {host}")
        super().__init__(path=os.environ["LOCKED_FOLDER"], fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        text = str(path)
        return text.split("://", 1)[1].partition("/")[2] if "://" in text else text.lstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        login, at, host = path.split("://", 1)[1].partition("/")[0].rpartition("@")
        user, _, word = login.partition(":")
        return {"host": host, "username": user, "password": word} if at else {"host": host}

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        super().pipe_file(path, value)

    def unstrip_protocol(self, name: str) -> str:
        return f"locked://{name}"


fsspec.register_implementation("locked", Locked, clobber=True)


class LockedSweep(ToySweep):
    """The toy, except for the module of its class: a worker that receives it imports this module."""


SWEEP = LockedSweep()

if __name__ == "__main__":
    from locked_sweep import SWEEP as IMPORTABLE

    from sweeps.launch.command import main

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    sys.exit(main(IMPORTABLE))
