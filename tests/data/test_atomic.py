"""A file is whole or not there, also when writing it fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data._atomic import write_whole


def test_file_and_its_folders_are_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.bin"
    write_whole(target, b"old")
    write_whole(str(target), b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["b.bin"]


def test_a_full_disk_leaves_the_old_bytes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b.bin"
    write_whole(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["b.bin"]
