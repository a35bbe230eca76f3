"""Checkpoints of unfinished work: other data, damage, other threads, and two writers at once."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch

from sweeps._context import WorkStore
from sweeps._storage import Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


def files(store: Store) -> list[str]:
    return [name for name in store.names("_work/cell") if name.endswith(".pt")]


def test_a_checkpoint_of_other_data_is_not_continued(store: Store) -> None:
    said: list[str] = []
    work = WorkStore(store, said.append)
    work.save("cell", 7, {"step": 7}, origin="old")
    assert work.load("cell", origin="new") is None
    assert said == ["checkpoint of cell at step 7 was made with other code or data: starting anew"]
    assert work.load("cell", origin="old") == {"step": 7}
    assert work.load("cell") == {"step": 7}  # who only looks need not know


def test_a_flipped_bit_is_not_loaded(store: Store) -> None:
    said: list[str] = []
    work = WorkStore(store, said.append)
    work.save("cell", 3, {"weights": torch.zeros(1000)})
    place = f"_work/cell/{files(store)[0]}"
    data = bytearray(store.read(place))
    data[len(data) // 2] ^= 1
    store.replace(place, bytes(data))
    assert work.load("cell") is None
    assert said == ["checkpoint of cell at step 3 is damaged: starting anew"]


def test_another_number_of_threads_is_said(store: Store) -> None:
    said: list[str] = []
    WorkStore(store, threads=1).save("cell", 3, {"step": 3})
    assert WorkStore(store, said.append, threads=1).load("cell") == {"step": 3}
    assert said == []
    assert WorkStore(store, said.append, threads=2).load("cell") == {"step": 3}
    assert "reached with 1 threads, now there are 2" in said[0]


def test_a_writer_that_was_given_up_never_takes_the_file_of_the_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old worker reaches the same step between the new pointer of the other and its removal of the old file."""
    ours, zombie = WorkStore(store), WorkStore(store)
    ours.save("cell", 1, {"step": 1})
    remove = store.remove_file

    def then_the_zombie_saves(name: str) -> None:
        monkeypatch.setattr(store, "remove_file", remove)
        zombie.save("cell", 2, {"step": 2, "by": "zombie"})
        remove(name)

    monkeypatch.setattr(store, "remove_file", then_the_zombie_saves)
    ours.save("cell", 2, {"step": 2, "by": "ours"})
    state = ours.load("cell")
    assert state is not None
    assert state["step"] == 2
    ours.save("cell", 3, {"step": 3})
    assert ours.load("cell") == {"step": 3}
    ours.save("cell", 3, {"best": 3}, "best")
    assert len(files(store)) == 2


def test_a_full_disk_is_an_error_with_its_number_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    work = WorkStore(Store(str(tmp_path)))
    work.save("cell", 1, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="File too large"):
            work.save("cell", 2, {"weights": torch.zeros(1_000_000)})
    finally:
        signal.signal(signal.SIGXFSZ, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert work.load("cell") == {"step": 1}
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []
