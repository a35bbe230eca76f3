"""Checkpoints of unfinished work: other data, damage, other threads, and two writers at once."""

from __future__ import annotations

import gc
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from models.codec.model import build_codec_lm
from sweeps.codec.loop import Batch, TrainConfig, Trainer
from sweeps.ledger.checkpoints import WorkStore
from sweeps.ledger.storage import Store
from tests.sweeps.codec.test_codec_lm import CONFIG


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
    assert said == ["checkpoint of cell at step 7 was made with other code or data: starting again"]
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
    assert said == ["checkpoint of cell at step 3 is damaged: starting again"]


def anonymous_mib() -> float:
    """This process's memory that no file backs, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_a_checkpoint_takes_no_memory_besides_the_state_it_is_of(tmp_path: Path) -> None:
    size = 64  # MiB of state
    weights, other = torch.ones(size * 2**18), torch.zeros(size * 2**18)
    work, peak, over = WorkStore(Store(str(tmp_path))), [anonymous_mib()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not over.wait(0.001):
            peak.append(anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work.save("cell", 1, {"weights": weights})
    state = work.load("cell")
    assert state is not None
    other.copy_(state["weights"])
    over.set()
    watcher.join()
    assert max(peak) - before < size / 4
    assert torch.equal(other, weights)


def test_a_trainer_that_goes_on_holds_nothing_of_the_file(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, lr=0.01, lr_end=0.001, warmup_steps=1)

    def trainer() -> Trainer:
        return Trainer(build_codec_lm(CONFIG, seed=1), config)

    store = Store(str(tmp_path))
    whole, work = trainer(), WorkStore(store)
    inputs, targets = torch.zeros(2, 2, 6, dtype=torch.long), torch.ones(2, 2, 6, dtype=torch.long)
    batch = Batch(inputs, targets, real_tokens=24)
    whole.step(batch)
    work.save("cell", 1, whole.state())
    resumed, state = trainer(), work.load("cell")
    assert state is not None
    resumed.restore(state)
    assert files(store)[0] in Path("/proc/self/maps").read_text(encoding="utf-8")
    del state
    gc.collect()
    assert files(store)[0] not in Path("/proc/self/maps").read_text(encoding="utf-8")
    work.drop("cell")
    for one in (whole, resumed):
        one.step(batch)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


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
