"""A folder on any fsspec URI, with the three operations a crash cannot hurt.

`publish_folder` makes a folder of files appear whole or not at all, `replace` swaps one small file atomically and
`create` succeeds for exactly one of many callers. On a local disk they are rename, rename and O_EXCL; on object
stores (where a PUT is atomic) a commit marker written last, a PUT, and a conditional PUT.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

from data._atomic import write_whole
from sweeps._secrets import remember, with_login, without_password
from sweeps._sweep import UserError

MARKER = "_PUBLISHED"
_ASIDE, _LEFT_SECONDS = ".tmp-", 86_400.0  # folders that are being made, and when they are taken for dead
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, NotImplementedError)
_MISTAKES = (ValueError, TypeError, KeyError, AttributeError)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _transient(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, _PERMANENT) and error.errno != errno.ENOSPC


_retry = tenacity.retry(
    retry=tenacity.retry_if_exception(_transient),
    wait=tenacity.wait_exponential_jitter(initial=0.2, max=5),
    stop=tenacity.stop_after_attempt(5),
    reraise=True,
)


def with_errno(error: Exception) -> Exception:
    """The error of a library as an OSError with a number, by which callers know the storage's fault from a cell's.

    Libraries raise classes of their own (botocore, aiohttp, paramiko) and OSErrors without a number when a server is
    away or refuses. What the storage answers about a file, mistakes in code and what has a number stay as they are.
    """
    if isinstance(error, _ANSWERS + _MISTAKES) or (isinstance(error, OSError) and error.errno is not None):
        return error
    number = errno.EACCES if isinstance(error, PermissionError) else errno.EIO
    return OSError(number, f"{type(error).__name__}: {without_password(' '.join(str(error).split()))}")


@contextlib.contextmanager
def _numbered() -> Iterator[None]:
    """Errors of the block, or of the function it decorates, as `with_errno` tells them."""
    try:
        yield
    except Exception as error:
        if (told := with_errno(error)) is error:
            raise
        raise told from error


def _request(method: Callable[Concatenate[Store, _P], _R]) -> Callable[Concatenate[Store, _P], _R]:
    """A method that asks the storage: tried again where that may help, with errors that have a number."""

    @functools.wraps(method)
    def call(store: Store, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with contextlib.nullcontext() if store.local else _numbered():
            return method(store, *args, **kwargs)

    return _retry(call)


class Store:
    """Files under one root URI (`runs/ledger`, `s3://bucket/prefix`, ...); UserError for one that names no storage.

    Transient OSErrors are tried five times with exponential back-off; a full disk, a missing file and a
    refused permission are not. Whatever a library raises because its server is away or refuses is an OSError.
    """

    def __init__(self, uri: str) -> None:
        uri = remember(uri)
        address = with_login(uri)
        self.fs, root = _open(uri, address)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.root = str(Path(root).resolve()) if self.local else root.rstrip("/")
        self.uri = self.root if self.local else uri if address != uri else self.fs.unstrip_protocol(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri,)

    def path(self, name: str) -> str:
        """Full path of a file named relative to the root; raises ValueError for a name that leaves it."""
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"file name {name!r} leads out of {self.uri}; choose a relative name without '..'")
        return f"{self.root}/{name}"

    def check_writable(self) -> None:
        """Write and remove a probe file; raises UserError if that does not work."""
        name = f".probe-{uuid.uuid4().hex}"
        try:
            self.replace(name, b"")
            self.fs.rm_file(self.path(name))
        except Exception as error:
            raise UserError(
                f"storage {self.uri} is not writable ({type(error).__name__}: {without_password(str(error))}); "
                "choose another place with --storage"
            ) from error

    def remove_leftovers(self) -> None:
        """Remove what killed processes left of folders that they were publishing a day ago or earlier."""
        if not self.local or not os.path.isdir(self.root):
            return
        with os.scandir(self.root) as found:
            aside = [entry.path for entry in found if entry.name.startswith(_ASIDE)]
        for path in aside:
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                if time.time() - os.stat(path).st_mtime > _LEFT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    @_request
    def read(self, name: str) -> bytes:
        """Bytes of a file; raises FileNotFoundError."""
        return self.fs.cat_file(self.path(name))

    def read_json(self, name: str) -> Any | None:
        """Parsed JSON of a file, or None where there is none."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    @_request
    def exists(self, name: str) -> bool:
        """Whether the file exists now (directory caches are bypassed)."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.path(name))

    @_request
    def modified(self, name: str) -> float:
        """When the file was last written, in seconds by the storage's own clock; raises FileNotFoundError."""
        if self.local:
            return os.stat(self.path(name)).st_mtime
        self.fs.invalidate_cache()
        return self.fs.modified(self.path(name)).timestamp()

    @_request
    def replace(self, name: str, data: bytes) -> None:
        """Write a whole file; readers see the old bytes or the new ones, never a part."""
        target = self.path(name)
        if self.local:
            write_whole(target, data)
        else:
            self.fs.pipe_file(target, data)

    @_request
    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not exist yet; True for the one caller that made it."""
        target = self.path(name)
        if self.local:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            aside = f"{target}.{uuid.uuid4().hex}.tmp"
            try:
                Path(aside).write_bytes(data)
                os.link(aside, target)  # link, not O_EXCL: the name never shows an empty file
            except FileExistsError:
                return False
            finally:
                Path(aside).unlink(missing_ok=True)
            return True
        try:
            self.fs.pipe_file(target, data, mode="create")
        except FileExistsError:
            return False
        return True

    @_request
    def remove(self, name: str) -> None:
        """Remove a file or folder; nothing happens where there is none."""
        self.fs.invalidate_cache()
        if self.fs.exists(self.path(name)):
            self.fs.rm(self.path(name), recursive=True)

    @_request
    def remove_file(self, name: str) -> None:
        """Remove one file; nothing happens where there is none. One request, where `remove` must look first."""
        try:
            if self.local:
                os.unlink(self.path(name))
            else:
                self.fs.rm_file(self.path(name))
        except FileNotFoundError:
            return

    @_request
    def names(self, folder: str = "") -> list[str]:
        """Names directly inside a folder, sorted; empty where there is none."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder) if folder else self.root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in found)

    @_request
    def files(self, folder: str = "") -> list[str]:
        """All file names below a folder, relative to it, sorted."""
        self.fs.invalidate_cache()
        base = self.path(folder) if folder else self.root
        try:
            found = self.fs.find(base)
        except FileNotFoundError:
            return []
        return sorted(p[len(base) :].lstrip("/") for p in found)

    @_request
    def sizes(self, folder: str) -> dict[str, int]:
        """{name: bytes} of all files below a folder, relative to it, in one listing."""
        self.fs.invalidate_cache()
        base = self.path(folder)
        try:
            found = self.fs.find(base, detail=True)
        except FileNotFoundError:
            return {}
        return {p[len(base) :].lstrip("/"): int(info["size"]) for p, info in sorted(found.items())}

    def published(self, folder: str) -> bool:
        """Whether the folder was published."""
        return self.exists(f"{folder}/{MARKER}")

    def stamp(self, folder: str) -> int | None:
        """What tells a published folder from another one published in its place; None where it is not published.

        The marker's time of change in ns on a local store, 0 on others.
        """
        if not self.local:
            return 0 if self.published(folder) else None
        try:
            return os.stat(self.path(f"{folder}/{MARKER}")).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None

    def markers(self) -> dict[str, int]:
        """{folder: stamp} of the published folders directly inside the root of a local store."""
        try:
            with os.scandir(self.root) as found:
                names = [entry.name for entry in found if entry.name[0] not in "_."]
        except FileNotFoundError:
            return {}
        return {name: stamp for name in names if (stamp := self.stamp(name)) is not None}

    @_request
    def publish_folder(self, folder: str, contents: Mapping[str, bytes | Path]) -> bool:
        """Publish files (bytes, or paths of local files to copy) as a folder, whole or not at all.

        Returns False, and changes nothing, when the folder is already published: the first result stays.
        """
        if self.published(folder):
            return False
        if not self.local:
            for name, data in contents.items():
                if isinstance(data, Path):
                    self.fs.put_file(str(data), self.path(f"{folder}/{name}"))
                else:
                    self.fs.pipe_file(self.path(f"{folder}/{name}"), data)
            self.fs.pipe_file(self.path(f"{folder}/{MARKER}"), b"")
            return True
        target = self.path(folder)
        aside = f"{os.path.dirname(target)}/{_ASIDE}{os.path.basename(target)}-{uuid.uuid4().hex}"
        try:
            for name, data in contents.items():
                self.path(name)  # refuses a name that leaves the folder
                place = Path(aside, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(data, Path):
                    shutil.copyfile(data, place)
                else:
                    place.write_bytes(data)
                with open(place, "rb") as f:
                    os.fsync(f.fileno())
            Path(aside, MARKER).touch()
            try:
                os.rename(aside, target)
            except OSError:
                if self.published(folder):
                    return False
                raise
            return True
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@_numbered()  # sftp:// and their like connect at once
def _open(uri: str, address: str) -> tuple[Any, str]:
    """(file system, root path) of an address; `uri` is the same without its login, for the messages."""
    try:
        return fsspec.url_to_fs(address)
    except ImportError as error:
        raise UserError(
            f"storage {uri} needs a package that requirements.lock leaves out ({error}); `pip install` it on every "
            "node, or choose another place with --storage"
        ) from error
    except ValueError as error:
        raise UserError(
            f"storage {uri} cannot be opened ({without_password(str(error))}); choose a folder, s3://BUCKET/PREFIX or "
            "another address that fsspec knows"
        ) from error
