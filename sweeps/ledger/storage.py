"""A folder on any fsspec URI, with the three operations a crash cannot hurt.

`publish_folder` makes a folder of files appear whole or not at all, `replace` swaps one file atomically and `create`
succeeds for exactly one of many callers. On a local disk they are rename, rename and link. On object stores (where a
PUT is atomic) every attempt to publish uploads to a folder of its own, FOLDER/ATTEMPT/, and the marker, a conditional
PUT, names the one attempt that counts: a second writer can neither change nor mix up what is published.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

import fsspec
import tenacity
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from data._atomic import move_whole, write_whole
from sweeps.core.cells import UserError
from sweeps.core.names import checked, inside
from sweeps.ledger.logins import remember, with_login, without_password

MARKER = "_PUBLISHED"
_ASIDE, _LEFT_SECONDS = ".tmp-", 86_400.0  # folders that are being made, and when they are taken for dead
_DAMAGED = ".damaged-"  # folders kept for inspection, which no reader counts
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)  # no better a second later
# what the storage answers about a file, and mistakes of this program: no faults of the storage
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, NotImplementedError)
_MISTAKES = (ValueError, TypeError, KeyError, AttributeError)
_UPLOADS = 8  # files of a folder that are uploaded and checksummed at once
_CHUNK = 1 << 20  # bytes read at once: large enough for speed, negligible memory
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Facts:
    """What must be true of a file's bytes: their number, and their SHA-256 in hexadecimal digits."""

    size: int
    sha256: str

    def fault(self, data: bytes) -> str:
        """What is wrong with these bytes in a few words; empty where nothing is."""
        if len(data) != self.size:
            return f"has {len(data)} bytes instead of {self.size}"
        return "" if hashlib.sha256(data).hexdigest() == self.sha256 else f"has other bytes than it had ({self.size})"


def facts_of(data: bytes | Path) -> Facts:
    """Facts of bytes, or of a local file (read in pieces)."""
    if isinstance(data, bytes):
        return Facts(len(data), hashlib.sha256(data).hexdigest())
    with open(data, "rb") as f:
        return Facts(os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest())


Describe = Callable[[Mapping[str, Facts], str], Mapping[str, bytes]]


def _transient(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, _PERMANENT) and error.errno not in _LASTING


_retry = tenacity.retry(
    retry=tenacity.retry_if_exception(_transient),
    wait=tenacity.wait_exponential_jitter(initial=0.2, max=5),
    stop=tenacity.stop_after_attempt(5),
    reraise=True,
)


def with_errno(error: Exception) -> Exception:
    """A library's error as an OSError with a number, by which callers tell a fault of the storage from one of a cell.

    Libraries raise classes of their own (botocore, aiohttp, paramiko) and OSErrors without a number when a server is
    unreachable or refuses. Answers about a file, mistakes in code and errors with a number stay as they are.
    """
    if isinstance(error, _ANSWERS + _MISTAKES) or (isinstance(error, OSError) and error.errno is not None):
        return error
    number = errno.EACCES if isinstance(error, PermissionError) else errno.EIO
    return OSError(number, f"{type(error).__name__}: {without_password(' '.join(str(error).split()))}")


@contextlib.contextmanager
def _numbered() -> Iterator[None]:
    """Errors of the block, or of the function it decorates, are raised as `with_errno` returns them."""
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

    Transient OSErrors are tried five times with exponential back-off; a full disk, a missing file and a refused
    permission are not. What a library raises because its server is unreachable or refuses becomes an OSError.
    """

    def __init__(self, uri: str) -> None:
        uri = remember(uri)
        address = with_login(uri)
        self.fs, root = _open(uri, address)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.root = absolute(root) if self.local else root.rstrip("/")
        self.uri = self.root if self.local else uri if address != uri else self.fs.unstrip_protocol(self.root)
        # s3fs asks for an object's size first, to read large ones in several requests; here most are small
        self._in_one = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri,)

    def former_uris(self) -> list[str]:
        """The addresses by which this and older programs, which followed links, name the storage."""
        return list(dict.fromkeys([self.uri, os.path.realpath(self.root)] if self.local else [self.uri]))

    def path(self, name: str) -> str:
        """Full path of a file named relative to the root; raises UserError for a name that could leave it."""
        return f"{self.root}/{checked(name, self.uri)}"

    def check_writable(self) -> None:
        """Write, create and remove a probe file; raises UserError if that does not work.

        A storage on which two callers can create the same file cannot order claims or keep a first result. fsspec's
        own way to create a file (sftp, smb, hdfs, ftp) is a look and then a write, which no probe of one caller finds.
        """
        if not self.local and getattr(self.fs.pipe_file, "__func__", None) is AbstractFileSystem.pipe_file:
            raise UserError(
                f"storage {self.uri} cannot be a ledger: fsspec's driver of it looks and then writes, so that two "
                "launches could both claim a cell. Mount it and give the folder (on a cluster with file+shared:// "
                "before it), or choose an object store with --storage"
            )
        name = f".probe-{uuid.uuid4().hex}"
        try:
            made = [self.create(name, b"1"), self.create(name, b"2")]
            kept = self.read(name)
            self.replace(name, b"")
            self.fs.rm_file(self.path(name))
        except Exception as error:
            raise UserError(
                f"storage {self.uri} is not writable ({type(error).__name__}: {without_password(str(error))}); "
                "choose another place with --storage"
            ) from error
        if made[1] or kept != b"1":  # the first may be False: a repeated request that met its own first try
            raise UserError(
                f"storage {self.uri} ignores conditional creation (If-None-Match): two launches could both claim a "
                "cell and overwrite its result. Choose a storage that honours it with --storage"
            )

    def remove_leftovers(self) -> None:
        """Remove what killed processes left of folders that they were publishing more than a day ago.

        A day by the storage's own clock: the age is the difference to a file written there now.
        """
        if not self.local or not os.path.isdir(self.root):
            return
        with os.scandir(self.root) as found:
            aside = [entry.path for entry in found if entry.name.startswith(_ASIDE)]
        if not aside:
            return
        with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe-") as probe:
            now = os.stat(probe.name).st_mtime
        for path in aside:
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                if now - os.stat(path).st_mtime > _LEFT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    @_request
    def read(self, name: str) -> bytes:
        """Bytes of a file; raises FileNotFoundError, and UserError for a link that leads out of its folder."""
        if self.local:
            return Path(self._linked(name)).read_bytes()
        return self.fs.cat_file(self.path(name), **self._in_one)

    def _linked(self, name: str) -> str:
        """Path of a local file, whose links stay in the folder of the root that it is in."""
        path = inside(self.path(name), self.root, self.root)
        top, _, rest = name.partition("/")
        return inside(path, f"{self.root}/{top}", f"{self.root}/{top}") if rest else path

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A local copy of a file while the block runs, the file itself on a local store; raises FileNotFoundError."""
        if self.local:
            yield Path(self._linked(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "file")
            self._download(name, copy)
            yield copy

    @_request
    def _download(self, name: str, copy: Path) -> None:
        self.fs.get_file(self.path(name), str(copy))

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[Path]:
        """A local path for what `replace` will take as `name`; on a local store in the same folder, for a rename."""
        if not self.local:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder, "file")
            return
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        place = Path(f"{target}.{uuid.uuid4().hex}.tmp")
        try:
            yield place
        finally:
            place.unlink(missing_ok=True)

    def read_sound(self, name: str, known: Facts | None, damaged: Callable[[str], Exception]) -> bytes:
        """Bytes of a file that was written and must be as it was; raises `damaged(FAULT)` where it is missing or not.

        known: None where nobody recorded what it must be.
        """
        try:
            data = self.read(name)
        except FileNotFoundError as error:
            raise damaged("is missing") from error
        if known and (fault := known.fault(data)):
            raise damaged(fault)
        return data

    def read_json(self, name: str) -> Any | None:
        """Parsed JSON of a file, or None where there is none, or an empty one (after a power failure).

        Raises UserError for one that holds something else.
        """
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None
        try:
            return json.loads(data) if data else None
        except ValueError as error:
            raise UserError(
                f"{self.uri}/{name} is damaged ({error}); remove that file and run the same command again"
            ) from error

    @_request
    def exists(self, name: str) -> bool:
        """Whether the file exists now (directory caches are bypassed).

        On an object store the file is read, since it is small and this takes one request: the library's own check of a
        missing one takes a HEAD and, since it might be a folder, a LIST.
        """
        if self.local:
            return self.fs.exists(self.path(name))
        try:
            self.fs.cat_file(self.path(name), **self._in_one)
        except FileNotFoundError:
            return False
        return True

    @_request
    def modified(self, name: str) -> float:
        """When the file was last written, in seconds by the storage's own clock; raises FileNotFoundError."""
        if self.local:
            return os.stat(self.path(name)).st_mtime
        self.fs.invalidate_cache()
        return self.fs.modified(self.path(name)).timestamp()

    @_request
    def replace(self, name: str, data: bytes | Path) -> None:
        """Write a whole file (bytes, or a local file made in `aside`); readers see the old one or the new one."""
        target = self.path(name)
        if isinstance(data, Path):
            if self.local:
                move_whole(data, target)
            else:
                self.fs.put_file(str(data), target)
        elif self.local:
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
        """Remove one file; nothing happens where there is none. One request, while `remove` must list first."""
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

    def published(self, folder: str) -> bool:
        """Whether the folder was published."""
        return self.exists(f"{folder}/{MARKER}")

    def marker(self, folder: str) -> dict[str, Any]:
        """The contents of a published folder's marker: `attempt`, and `last` with the text of the file written last.

        Empty for folders published before markers had a content; raises FileNotFoundError where there is none.
        """
        data = self.read(f"{folder}/{MARKER}")
        found = json.loads(data) if data.startswith(b"{") else {}
        return found if isinstance(found, dict) else {}

    def stamp(self, folder: str) -> int | None:
        """A number that differs when a folder is published again in place of another; None where it is not published.

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

    def publish_folder(
        self, folder: str, contents: Mapping[str, bytes | Path], describe: Describe | None = None
    ) -> bool:
        """Publish files (bytes, or paths of local files to copy) as a folder, whole or not at all.

        `describe` gets the facts of all files and the attempt's name (empty on a local store, whose files lie directly
        in the folder) and returns one more file, a text, which is written last and is in the marker, too, so that
        reading it needs no second request. Returns False, and changes nothing, when the folder is already published:
        the first result stays, on every store.
        """
        if self.published(folder):
            return False
        for name in contents:
            checked(name, folder)
        return (self._publish_here if self.local else self._publish_there)(folder, contents, describe)

    def _publish_there(self, folder: str, contents: Mapping[str, bytes | Path], describe: Describe | None) -> bool:
        attempt = uuid.uuid4().hex
        home = f"{folder}/{attempt}"
        with ThreadPoolExecutor(_UPLOADS) as pool:
            sent = [pool.submit(self.replace, f"{home}/{name}", data) for name, data in contents.items()]
            facts = dict(zip(contents, pool.map(facts_of, contents.values()), strict=True))
            for one in sent:
                one.result()
        last = describe(facts, attempt) if describe else {}
        for name, data in last.items():
            self.replace(f"{home}/{name}", data)
        if (
            self.create(f"{folder}/{MARKER}", marker_bytes(attempt, last))
            or self.marker(folder).get("attempt") == attempt
        ):
            return True  # the marker is ours also where a repeated request met its own first try
        self.remove(home)
        return False

    @_request
    def _publish_here(self, folder: str, contents: Mapping[str, bytes | Path], describe: Describe | None) -> bool:
        target = self.path(folder)
        aside = f"{os.path.dirname(target)}/{_ASIDE}{os.path.basename(target)}-{uuid.uuid4().hex}"
        try:
            os.makedirs(aside)
            facts = {name: _put(aside, name, data) for name, data in contents.items()}
            last = describe(facts, "") if describe else {}
            for name, data in last.items():
                _put(aside, name, data)
            _put(aside, MARKER, marker_bytes("", last))
            try:
                os.rename(aside, target)
            except OSError:
                if self.published(folder):
                    return False
                if not os.path.isdir(target):
                    raise
                self.set_aside(folder)  # no marker: an interrupted removal, or a file that a network disk left there
                os.rename(aside, target)
            return True
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    @_request
    def set_aside(self, folder: str) -> None:
        """Hide a folder from every reader, so that it can be published again; its files stay for inspection.

        On a local store it gets another name; on others its marker goes.
        """
        if self.local:
            target = self.path(folder)
            where = f"{os.path.dirname(target)}/{_DAMAGED}{os.path.basename(target)}-{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(FileNotFoundError):  # another launch did it
                os.rename(target, where)
        else:
            self.remove_file(f"{folder}/{MARKER}")


def absolute(path: str) -> str:
    """The absolute path, whose links are left for each machine to follow.

    Links are resolved only where the path contains `..`, since after a link the text alone would lead elsewhere.
    """
    whole = str(Path(path).expanduser().absolute())
    return os.path.realpath(whole) if ".." in whole.split("/") else os.path.normpath(whole)


def marker_bytes(attempt: str, last: Mapping[str, bytes]) -> bytes:
    """A marker that names an attempt and carries the texts that were written last."""
    return json.dumps({"attempt": attempt, "last": {name: data.decode() for name, data in last.items()}}).encode()


def _put(folder: str, name: str, data: bytes | Path) -> Facts:
    """Copy bytes or a file into a folder that exists, to the disk; the facts are taken from the bytes on their way.

    Only folders below it are made: a folder that somebody removed meanwhile must not come back half filled.
    """
    place, digest, size = f"{folder}/{name}", hashlib.sha256(), 0
    below = os.path.dirname(name)
    for depth in range(below.count("/") + 1 if below else 0):
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{folder}/{'/'.join(below.split('/')[: depth + 1])}")
    with contextlib.ExitStack() as files:
        out = files.enter_context(open(place, "wb"))
        pieces = [data] if isinstance(data, bytes) else _pieces(files.enter_context(open(data, "rb")))
        for piece in pieces:
            out.write(piece)
            digest.update(piece)
            size += len(piece)
        out.flush()
        os.fsync(out.fileno())
    return Facts(size, digest.hexdigest())


def _pieces(source: BinaryIO) -> Iterator[bytes]:
    while piece := source.read(_CHUNK):
        yield piece


@_numbered()  # sftp:// and similar schemes connect here
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
            "another object store that fsspec knows"
        ) from error


SHARED_PATH = re.compile(r"^file\+shared://")  # a local path that every node mounts, as the user declares


def normal_storage(storage: str) -> str:
    """The storage text as fsspec takes it: relative local paths made absolute, `file+shared://` stripped.

    Raises UserError for an address that was mistyped as a path, and for one that the workers cannot share.
    """
    text = SHARED_PATH.sub("", storage)
    if text.startswith("memory:"):
        raise UserError(
            f"storage {text} is the memory of one process, which Ray's workers do not share; choose a folder or "
            "s3://BUCKET/PREFIX"
        )
    if "://" in text:
        return text
    if mistyped := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(
            f"storage {text} has one slash after its scheme; write {mistyped[0]}/…, or ./{text} for a local folder"
        )
    return absolute(text)  # no link is followed here: those of the workers may lead elsewhere
