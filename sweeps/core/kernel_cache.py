"""Where numba keeps compiled kernels: under the content that they are compiled from, not the place of the checkout.

numba names a kernel's cache folder after the folder of its source file, so every checkout, and every copy of one that
Ray makes on a node of a cluster, would compile all kernels again (21 core-seconds for one architecture of the codec
models). It also looks at the kernel's own file alone, and not at those whose functions are compiled into it.

Kernels of installed packages go by the package's version and the file's content: librosa's took 17 core-seconds in each
new environment. numba imports this module itself, as `prepare_process` names it in NUMBA_CACHE_LOCATOR_CLASSES.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.caching import UserProvidedCacheLocator

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("analysis", "data", "models", "sweeps")
_FROM = re.compile(r"^[ \t]*from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)", re.M)
_PLAIN = re.compile(r"^[ \t]*import[ \t]+([\w., \t]+)", re.M)


def sources(file: Path, root: Path) -> list[Path]:
    """The file and all files under `root` that it imports, directly or not, by absolute names; sorted."""
    found, todo = {file}, [file]
    while todo:
        fresh = _imported(todo.pop(), root) - found
        found |= fresh
        todo += fresh
    return sorted(found)


def _imported(file: Path, root: Path) -> set[Path]:
    text = file.read_text(encoding="utf-8")
    names = {name for line in _PLAIN.findall(text) for name in re.findall(r"[\w.]+", line)}
    for module, members in _FROM.findall(text):
        names |= {module, *(f"{module}.{name}" for name in re.findall(r"\w+", members))}
    places = [root.joinpath(*name.split(".")) for name in names if name.startswith(PACKAGES)]
    files = {place.with_suffix(".py") for place in places} | {place / "__init__.py" for place in places}
    return {found for found in files if found.is_file()}


@functools.cache
def content(file: Path, root: Path) -> str:
    """Digest of a file and of what it imports, with their places under `root`: 40 hex digits."""
    total = hashlib.sha256()
    for part in sources(file, root):
        total.update(f"{hashlib.sha256(part.read_bytes()).hexdigest()} {part.relative_to(root).as_posix()}\n".encode())
    return total.hexdigest()[:40]


@functools.cache
def folder(file: Path, root: Path) -> str | None:
    """Name of the cache folder for the kernels of a file; None for one of neither this checkout nor a known package."""
    if file.is_relative_to(root) and file.relative_to(root).parts[0] in PACKAGES:
        return f"{'.'.join(file.relative_to(root).with_suffix('').parts)}-{content(file, root)}"
    _, found, inner = file.as_posix().rpartition("/site-packages/")
    if not found:
        return None
    try:
        version = importlib.metadata.version(inner.split("/")[0])
    except importlib.metadata.PackageNotFoundError:
        return None
    stamp = hashlib.sha256(file.read_bytes()).hexdigest()[:40]
    return f"{inner.removesuffix('.py').replace('/', '.')}-{version}-{stamp}"


class ByContent(UserProvidedCacheLocator):  # type: ignore[misc]
    """The folder of that name in NUMBA_CACHE_DIR."""

    def __init__(self, py_func: Callable[..., Any], py_file: str) -> None:
        super().__init__(py_func, py_file)
        name = folder(Path(py_file).resolve(), ROOT)
        assert name is not None  # from_function has looked
        self._cache_path = str(Path(self._cache_path).with_name(name))

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> ByContent | None:
        """The locator of a kernel; None for one that lies elsewhere, or without a cache folder."""
        if not Path(py_file).is_file() or folder(Path(py_file).resolve(), ROOT) is None:
            return None
        return super().from_function(py_func, py_file)
