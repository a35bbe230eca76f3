"""Compiled kernels are kept under the content that they are compiled from: every copy of a checkout finds them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numba.core import config

from sweeps.core import kernel_cache
from sweeps.core.machine import KERNEL_CACHE

KERNEL = """
from numba import njit
from models.helper import (
    times,  # a comment
)

@njit(cache=True)
def kernel(x):
    return times(x) + 1
"""
HELPER = """
from numba import njit

@njit(cache=True)
def times(x):
    return 2 * x
"""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    known = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "models"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
        patch.setenv("NUMBA_CACHE_LOCATOR_CLASSES", KERNEL_CACHE)
        config.reload_config()
        yield tmp_path / "cache"
    config.reload_config()
    forget()
    sys.modules.update(known)


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]


def checkout(place: Path, kernel: str = KERNEL, helper: str = HELPER) -> Path:
    (place / "models").mkdir(parents=True)
    (place / "models/__init__.py").touch()
    (place / "models/kernel.py").write_text(kernel)
    (place / "models/helper.py").write_text(helper)
    return place


def called(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(the kernel's answer to 3, whether it was found in the cache) in a new copy of the modules."""
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "ROOT", place)
        patch.syspath_prepend(str(place))
        importlib.invalidate_caches()
        kernel: Any = importlib.import_module("models.kernel").kernel
        return kernel(3), sum(kernel.stats.cache_hits.values())


def test_copies_share_kernels_and_a_changed_helper_is_compiled_in(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert called(checkout(tmp_path / "a"), monkeypatch) == (7, 0)
    assert called(checkout(tmp_path / "b"), monkeypatch) == (7, 1)
    other = checkout(tmp_path / "c", helper=HELPER.replace("2 * x", "5 * x"))
    assert called(other, monkeypatch) == (16, 0)
    assert called(tmp_path / "a", monkeypatch) == (7, 1)
    assert {folder.name.split("-")[0] for folder in cache.iterdir()} == {"models.kernel", "models.helper"}


def test_sources_are_what_is_imported_directly_or_not(tmp_path: Path) -> None:
    root = checkout(tmp_path, kernel="def late():\n    from models import helper, absent  # another\n")
    (root / "models/helper.py").write_text("import json, models.deep\nfrom numpy import array\n")
    (root / "models/deep.py").write_text("from models.kernel import late\n")
    (root / "models/apart.py").touch()
    found = kernel_cache.sources(root / "models/kernel.py", root)
    assert [file.name for file in found] == ["__init__.py", "deep.py", "helper.py", "kernel.py"]


def test_installed_packages_share_kernels_wherever_they_are_installed(cache: Path, tmp_path: Path) -> None:
    def path(place: str, name: str, text: str) -> str | None:
        file = tmp_path / place / "lib/site-packages" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        found = kernel_cache.ByContent.from_function(called, str(file))
        return found and found.get_cache_path()

    first = path("a", "librosa/core.py", "x = 1")
    assert first is not None
    assert Path(first).parent == cache
    assert path("b", "librosa/core.py", "x = 1") == first
    assert path("c", "librosa/core.py", "x = 2") != first
    assert path("d", "of_no_known_version/core.py", "x = 1") is None


def test_other_kernels_are_left_to_numba(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel.py").touch()
    assert kernel_cache.ByContent.from_function(called, str(tmp_path / "kernel.py")) is None
    assert kernel_cache.ByContent.from_function(called, str(kernel_cache.ROOT / "tests/conftest.py")) is None
    assert kernel_cache.ByContent.from_function(called, "<ipython-input-1>") is None
