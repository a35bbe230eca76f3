"""Audio files in a folder, a zip or a tar, with the same operations: list names, read bytes, digest their content.

A zip is read in place (its members have an index). A tar has none, so it is unpacked once, next to itself.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import struct
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data._content import UNREADABLE, file_stamp, known_digests

_TAR_ENDINGS = (".tar.bz2", ".tbz2", ".tar.gz", ".tgz", ".tar.xz", ".tar")
# what zipfile raises for a damaged, truncated, encrypted or oddly compressed member, besides OSError
_MEMBER_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, KeyError, NotImplementedError, RuntimeError,
    ValueError,
)  # fmt: skip
_TAR_ERRORS = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, struct.error, ValueError)


def left_behind(name: str) -> bool:
    """Whether a name is one that desktop programs leave among data: `.ipynb_checkpoints`, `._x.wav`, `__MACOSX`.

    Narrower than `data._listing.is_hidden`: recordings are listed by a table, and an id may begin with `_`.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


@dataclass(frozen=True)
class FolderFiles:
    """Files below a folder, links followed; names are relative to it, with forward slashes."""

    root: Path

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root}

    @cached_property
    def _names(self) -> list[str]:
        return sorted(_below(self.root, "", frozenset([os.path.realpath(self.root)])))

    def names(self) -> list[str]:
        return [name for name in self._names if not left_behind(name)]

    def hidden(self) -> list[str]:
        """The names that `names` leaves out, see `left_behind`."""
        return [name for name in self._names if left_behind(name)]

    def read(self, name: str) -> bytes:
        """Bytes of one file; raises OSError."""
        return (self.root / name).read_bytes()

    def contents(
        self, names: Sequence[str], cache: Path | None = None, say: Callable[[str], None] = lambda line: None
    ) -> dict[str, str]:
        """SHA-256 of each file's bytes, `UNREADABLE` where they cannot be read.

        cache: folder that keeps digests by path, size, times and inode, so that a machine reads the files once.
        """
        stamps = {name: _stamp(self.root / name) for name in names}
        return known_digests(stamps, self._digest, _kept_in(cache, self.root), say)

    def _digest(self, name: str) -> str:
        try:
            with open(self.root / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return UNREADABLE


def _stamp(path: Path) -> list[int]:
    try:
        return file_stamp(path)
    except OSError:
        return [-1, 0, 0, 0]


def _kept_in(cache: Path | None, path: Path) -> Path | None:
    place = hashlib.sha256(os.path.abspath(path).encode(errors="surrogateescape")).hexdigest()[:32]
    return None if cache is None else cache / f"audio-{place}.json"


def _below(folder: str | Path, prefix: str, above: frozenset[str]) -> Iterator[str]:
    """Names of the files below a folder; links are followed, but not to a folder that is being visited."""
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except PermissionError:  # its files come up as missing
        return
    for entry in entries:
        name = prefix + entry.name
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in above:
                yield from _below(entry.path, f"{name}/", above | {real})
        elif entry.is_file():
            yield name


@dataclass
class ZipFiles:
    """Members of a zip archive below ``prefix``; picklable, the archive is opened once per process."""

    path: Path
    prefix: str = ""
    _opened: dict[int, zipfile.ZipFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def _archive(self) -> zipfile.ZipFile:
        """Raises ValueError for a file that is no zip archive, OSError for one that cannot be read."""
        pid = os.getpid()  # a forked child must not share its parent's file position
        if pid not in self._opened:
            try:
                self._opened = {pid: zipfile.ZipFile(self.path)}
            except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
                raise ValueError(
                    f"{self.path} is not a zip archive, or is damaged ({error}); fetch it again"
                ) from error
        return self._opened[pid]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "prefix": self.prefix, "_opened": {}}

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        """By name below the prefix; some programs for Windows write backslashes."""
        named = {i.filename.replace("\\", "/"): i for i in self._archive.infolist() if not i.is_dir()}
        return {n[len(self.prefix) :]: named[n] for n in sorted(named) if n.startswith(self.prefix)}

    def names(self) -> list[str]:
        return [name for name in self._members if not left_behind(name)]

    def hidden(self) -> list[str]:
        """The names that `names` leaves out, see `left_behind`."""
        return [name for name in self._members if left_behind(name)]

    def read(self, name: str) -> bytes:
        """Bytes of one member; raises OSError where there is none, or it is damaged, encrypted or packed unusually."""
        try:
            return self._archive.read(self._members[name])
        except _MEMBER_ERRORS as error:
            raise OSError(f"{name} in {self.path.name}: {error or type(error).__name__}") from error

    def contents(
        self, names: Sequence[str], cache: Path | None = None, say: Callable[[str], None] = lambda line: None
    ) -> dict[str, str]:
        """SHA-256 of each member's bytes, `UNREADABLE` where they cannot be read; as in a folder of the same files.

        cache: folder that keeps digests by the archive's path, size, times and inode, so that it is read once.
        """
        archive = _stamp(self.path)
        stamps = {
            name: [i.file_size, *archive[1:], archive[0], i.CRC, i.header_offset]
            for name in names
            if (i := self._members.get(name))
        }
        return known_digests(stamps, self._digest, _kept_in(cache, self.path / self.prefix), say)

    def _digest(self, name: str) -> str:
        try:
            with self._archive.open(self._members[name]) as member:
                total = hashlib.sha256()
                while block := member.read(1 << 20):
                    total.update(block)
                return total.hexdigest()
        except (OSError, *_MEMBER_ERRORS):
            return UNREADABLE


AudioFiles = FolderFiles | ZipFiles


def unpack_tar(path: Path, into: Path) -> Path:
    """Unpack a tar archive as the folder ``into``, whole or not at all; a second call finds it and returns.

    Members that would land outside the folder, links and devices are refused (tarfile's ``data`` filter).
    Raises tarfile.TarError for a damaged archive, and then leaves no files.
    """
    if into.is_dir():
        return into
    into.parent.mkdir(parents=True, exist_ok=True)
    aside = into.with_name(f".{into.name}-{uuid.uuid4().hex}")
    try:
        with tarfile.open(path) as archive:
            archive.extractall(aside, filter="data")
        try:
            os.rename(aside, into)
        except OSError:
            if not into.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return into


def _unpacked(path: Path, ending: str, place: Path) -> Path:
    """The folder of a tar's files; another archive of the same name has another folder."""
    stamp = hashlib.sha256(repr(file_stamp(path)).encode()).hexdigest()[:8]
    try:
        return unpack_tar(path, place / f"{path.name.removesuffix(ending)}-{stamp}.unpacked")
    except _TAR_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a tar archive, or is damaged ({reason}); fetch it again") from error


def open_files(path: str | Path, cache: str | Path | None = None) -> AudioFiles:
    """The files of a folder, a .zip, or a .tar(.bz2|.gz|.xz) (unpacked under ``cache``, by default next to it).

    Raises FileNotFoundError where there is nothing, ValueError for another kind of file or a damaged archive.
    """
    path = Path(path)
    if path.is_dir():
        return FolderFiles(path)
    if not path.exists():
        raise FileNotFoundError(f"no audio data at {path}; give a folder, a .zip or a .tar.bz2 that exists")
    if path.suffix.lower() == ".zip":
        return ZipFiles(path)
    for ending in _TAR_ENDINGS:
        if path.name.endswith(ending):
            return FolderFiles(_unpacked(path, ending, Path(cache) if cache is not None else path.parent))
    raise ValueError(f"{path} is neither a folder nor a .zip nor one of {', '.join(_TAR_ENDINGS)}")


def below(files: AudioFiles, landmark: str) -> AudioFiles | None:
    """The same files seen from the shallowest folder that holds ``landmark``; None where no folder does."""
    if isinstance(files, FolderFiles) and (files.root / landmark).is_file():
        return files
    found = [n for n in files.names() if n == landmark or n.endswith("/" + landmark)]
    if not found:
        return None
    prefix = min(found, key=lambda n: (n.count("/"), n)).removesuffix(landmark)
    if isinstance(files, FolderFiles):
        return FolderFiles(files.root / prefix)
    return ZipFiles(files.path, files.prefix + prefix)
