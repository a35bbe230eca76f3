"""`objects:///FOLDER`: an object store on a local folder, for launches that must not know that it is local.

A PUT appears whole or not at all, one with mode "create" succeeds once, folders are prefixes, nothing is renamed.
Each request is announced to `faultpoints` before it is done and before it is answered, so that one can fail, be
slow or be the last thing a process does, and also be done although its answer is an error.
"""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem


class ObjectStore(AbstractFileSystem):
    """Requests of an object store, answered from files. Objects being written lie outside the store's folder."""

    protocol = "objects"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("objects://").rstrip("/")

    def _request(self, name: str, path: str) -> None:
        sys.audit("plumbline.operation", f"{name} {path}")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._strip_protocol(path)
        self._request("put", path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=os.environ["PLUMBLINE_CACHE"])
        with os.fdopen(handle, "wb") as f:
            f.write(value)
        if mode == "create":
            try:
                os.link(aside, path)
            finally:
                os.unlink(aside)
        else:
            os.replace(aside, path)
        self._request("put-answer", path)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        self._request("get", path)
        return Path(path).read_bytes()[start:end]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self._request("head", path)
        place = Path(path)
        if place.is_dir():
            if not any(p.is_file() for p in place.rglob("*")):
                raise FileNotFoundError(path)
            return {"name": path, "size": 0, "type": "directory"}
        return {"name": path, "size": place.stat().st_size, "type": "file"}

    def modified(self, path: str) -> datetime:
        path = self._strip_protocol(path)
        self._request("head", path)
        return datetime.fromtimestamp(os.stat(path).st_mtime, tz=UTC)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        self._request("ls", path)  # "list" is what Python announces when the local folder is read
        if not os.path.isdir(path):
            raise FileNotFoundError(path)
        found = []
        for name in sorted(os.listdir(path)):
            place = Path(path, name)
            if place.is_file():
                found.append({"name": str(place), "size": place.stat().st_size, "type": "file"})
            elif any(p.is_file() for p in place.rglob("*")):
                found.append({"name": str(place), "size": 0, "type": "directory"})
        return found if detail else [f["name"] for f in found]

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        self._request("delete", path)
        os.unlink(path)

    def _rm(self, path: str) -> None:
        self.rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        for file in self.find(path) if recursive and os.path.isdir(path) else [path]:
            self.rm_file(file)


def register() -> None:
    """Make `objects://` known to fsspec in this process."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
