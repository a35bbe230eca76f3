"""Audio files in a folder, a zip or a tar, behind one pair of operations: list the names, read the bytes.

A zip is read in place (its members have an index). A tar has none, so it is unpacked once beside itself.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import uuid
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_TAR_ENDINGS = (".tar.bz2", ".tbz2", ".tar.gz", ".tgz", ".tar.xz", ".tar")


@dataclass(frozen=True)
class FolderFiles:
    """Files below a folder; names are relative to it, with forward slashes."""

    root: Path

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())

    def read(self, name: str) -> bytes:
        """Bytes of one file; raises OSError."""
        return (self.root / name).read_bytes()


@dataclass
class ZipFiles:
    """Members of a zip archive below ``prefix``; picklable, the archive is opened once a process."""

    path: Path
    prefix: str = ""
    _opened: dict[int, zipfile.ZipFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def _archive(self) -> zipfile.ZipFile:
        pid = os.getpid()  # a forked child must not share its parent's file position
        if pid not in self._opened:
            self._opened = {pid: zipfile.ZipFile(self.path)}
        return self._opened[pid]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "prefix": self.prefix, "_opened": {}}

    @cached_property
    def _names(self) -> list[str]:
        names = (i.filename for i in self._archive.infolist() if not i.is_dir())
        return sorted(n[len(self.prefix) :] for n in names if n.startswith(self.prefix))

    def names(self) -> list[str]:
        return self._names

    def read(self, name: str) -> bytes:
        """Bytes of one member; raises OSError where there is none or its checksum is wrong."""
        try:
            return self._archive.read(self.prefix + name)
        except (KeyError, zipfile.BadZipFile, NotImplementedError) as error:
            raise OSError(f"{name} in {self.path.name}: {error}") from error


AudioFiles = FolderFiles | ZipFiles


def unpack_tar(path: Path, into: Path) -> Path:
    """Unpack a tar archive as the folder ``into``, whole or not at all; a second call finds it and returns.

    Members that would land outside the folder, links and devices are refused (tarfile's ``data`` filter).
    Raises tarfile.TarError for a damaged archive, and leaves nothing behind.
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


def open_files(path: str | Path, cache: str | Path | None = None) -> AudioFiles:
    """The files of a folder, a .zip, or a .tar(.bz2|.gz|.xz) (unpacked under ``cache``, by default beside it).

    Raises FileNotFoundError where nothing is, ValueError for another kind of file.
    """
    path = Path(path)
    if path.is_dir():
        return FolderFiles(path)
    if not path.exists():
        raise FileNotFoundError(f"no audio data at {path}; give a folder, a .zip or a .tar.bz2 that exists")
    if path.suffix == ".zip":
        return ZipFiles(path)
    for ending in _TAR_ENDINGS:
        if path.name.endswith(ending):
            place = Path(cache) if cache is not None else path.parent
            return FolderFiles(unpack_tar(path, place / f"{path.name.removesuffix(ending)}.unpacked"))
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
