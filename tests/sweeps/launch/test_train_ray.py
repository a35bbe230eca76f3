"""Codec LMs through the command line on Ray Train: two workers, killed workers, SIGTERM, fewer workers than wished."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from sweeps.codec.cells import LMCell
from sweeps.codec.presets import PRESETS
from sweeps.codec.run import run_pack
from sweeps.codec.sweep import SWEEP
from sweeps.core.cells import Pack, UserError
from sweeps.core.settings import RunSettings
from sweeps.launch import workers as workers_module
from sweeps.launch.context import PackContext
from sweeps.ledger.checkpoints import WorkStore
from sweeps.ledger.ledger import Ledger

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "architectures": ("transformer",),
    "lr": (2e-3,),
    "corpus_clips": 40,
    "chunk_s": 1.5,
    "min_s": 1.0,
    "holdout": 0.3,
    "steps": 60,
    "batch_size": 3,
    "warmup_steps": 2,
    "eval_every": 20,
    "eval_clips": 3,
    "sample_s": 0.0,
}
STUDY = replace(PRESETS["local"], **SETTINGS)  # type: ignore[arg-type]
(CELL,) = SWEEP.plan(STUDY)
WORKER, TRIAL = "ray::RayTrainWorker", "ray::(ResourceTrainable|Listening)"  # titles of processes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Ledger:
    """The cell trained in this process, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_CACHE", str(cache))
        ledger = Ledger(str(tmp_path_factory.mktemp("alone")), "codec_lm", LMCell.VERSION)
        context = PackContext(ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f")
        run_pack([CELL], STUDY, context)
    return ledger


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Ledger, str]:
    """The cell trained by two workers, undisturbed, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    job = start(folder, cache, "--set", "workers=2", "--set", "micro_batch=1")
    out, _ = job.communicate(timeout=500)
    assert job.returncode == 0, out
    return ledger_in(folder), out


def start(folder: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in SETTINGS.items()}
    settings = [part for name, value in texts.items() for part in ("--set", f"{name}={value}")]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweeps" / "codec_lm.py"), *settings, "--set", "threads=1", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PLUMBLINE_CACHE": str(cache)},
    )


def ledger_in(folder: Path) -> Ledger:
    return Ledger(str(folder / "runs/ledger"), "codec_lm", LMCell.VERSION)


def wait_for(job: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "the work does not get there"
        time.sleep(0.02)


def processes_of(job: subprocess.Popen[str], title: str, number: int = 1) -> list[psutil.Process]:
    """The `number` processes below the job with that title.

    Ray writes each method's name into the title and a look amid a change finds none: looks again until all are there.
    """
    found: dict[int, psutil.Process] = {}

    def all_found() -> bool:
        for process in psutil.Process(job.pid).children(recursive=True):
            with suppress(psutil.Error):
                if re.match(title, " ".join(process.cmdline())):
                    found[process.pid] = process
        return len(found) >= number

    wait_for(job, all_found)
    assert len(found) == number
    return list(found.values())


def rows_of(ledger: Ledger) -> pd.DataFrame:
    rows = ledger.read(CELL.key).rows
    return rows[rows["metric"] != "tokens_per_second"].reset_index(drop=True)


def weights_of(ledger: Ledger) -> dict[str, dict[str, torch.Tensor]]:
    state = torch.load(io.BytesIO(ledger.file(CELL.key, "model.pt")), weights_only=True)
    return {name: state[name] for name in ("raw", "ema")}


def assert_same_bits(ledger: Ledger, other: Ledger) -> None:
    pd.testing.assert_frame_equal(rows_of(ledger), rows_of(other), check_exact=True)
    mine, theirs = weights_of(ledger), weights_of(other)
    for kind, weights in mine.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, theirs[kind][name]), (kind, name)


@pytest.mark.slow
def test_two_workers_train_as_one_process_does(two: tuple[Ledger, str], alone: Ledger) -> None:
    ledger, _ = two
    assert ledger.read(CELL.key).meta["processes"] == 2
    mine, theirs = rows_of(ledger), rows_of(alone)
    assert list(mine["metric"]) == list(theirs["metric"])
    for metric in ("final_val_nll", "train_loss"):
        values = [rows.loc[rows["metric"] == metric, "value"].to_numpy() for rows in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
        assert (values[0] != values[1]).any()  # they did not both run in one process


@pytest.mark.slow
@pytest.mark.daily
def test_kill_9_of_a_worker_continues_to_the_same_bits(two: tuple[Ledger, str], tmp_path: Path, cache: Path) -> None:
    job = start(tmp_path, cache, "--set", "workers=2", "--set", "micro_batch=1", "--set", "checkpoint_steps=4")
    work = WorkStore(ledger_in(tmp_path).store)
    wait_for(job, lambda: work.step(CELL.key) >= 8)
    processes_of(job, WORKER, 2)[1].kill()
    out, _ = job.communicate(timeout=500)
    assert job.returncode == 0, out
    assert_same_bits(ledger_in(tmp_path), two[0])
    assert work.step(CELL.key) == 0


@pytest.mark.slow
def test_sigterm_of_a_worker_saves_and_continues_to_the_same_bits(alone: Ledger, tmp_path: Path, cache: Path) -> None:
    job = start(tmp_path, cache, "--set", "checkpoint_seconds=1000")
    work = WorkStore(ledger_in(tmp_path).store)
    wait_for(job, lambda: work.step(CELL.key, "best") > 0)
    (worker,) = processes_of(job, WORKER)
    worker.terminate()
    wait_for(job, lambda: work.step(CELL.key) > 0)  # nothing else saves: it had 1000 s to the next checkpoint
    out, _ = job.communicate(timeout=500)
    assert job.returncode == 0, out
    assert_same_bits(ledger_in(tmp_path), alone)


@pytest.mark.slow
def test_kill_9_of_the_trial_frees_what_its_workers_held(alone: Ledger, tmp_path: Path, cache: Path) -> None:
    """The workers hold all cores: a retry has room only if Ray takes back what the dead one had reserved."""
    cores = len(os.sched_getaffinity(0))
    job = start(tmp_path, cache, "--set", f"threads={cores}", "--set", "checkpoint_steps=4")
    work = WorkStore(ledger_in(tmp_path).store)
    wait_for(job, lambda: work.step(CELL.key) >= 8)
    (trial,) = processes_of(job, TRIAL)
    trial.kill()
    out, _ = job.communicate(timeout=500)
    assert job.returncode == 0, out
    assert "crashed (attempt 1)" in out
    final = [
        rows.loc[rows["metric"] == "final_val_nll", "value"].to_numpy()
        for rows in (rows_of(ledger_in(tmp_path)), rows_of(alone))
    ]
    assert final[0] == pytest.approx(final[1], rel=1e-3)


@pytest.mark.slow
def test_fewer_workers_than_wished_and_a_changed_number(alone: Ledger, tmp_path: Path, cache: Path) -> None:
    """Two workers of all cores each: one has room. Its checkpoint, of step 20, continues in two workers that share."""
    cores = len(os.sched_getaffinity(0))
    wish = ("--set", "workers=2", "--set", "min_workers=1", "--set", f"threads={cores}", "--set", "checkpoint_steps=4")
    job = start(tmp_path, cache, *wish)
    ledger = ledger_in(tmp_path)
    work = WorkStore(ledger.store)
    wait_for(job, lambda: work.step(CELL.key) >= 8)
    processes_of(job, WORKER)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=120)
    assert 8 <= work.step(CELL.key) < 60
    again = start(tmp_path, cache, "--set", "workers=2")
    out, _ = again.communicate(timeout=500)
    assert again.returncode == 0, out
    assert "was reached with 1 processes, now there are 2" in out
    final = [rows.loc[rows["metric"] == "final_val_nll", "value"].to_numpy() for rows in map(rows_of, (ledger, alone))]
    assert final[0] == pytest.approx(final[1], rel=1e-3)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "least", "line"),
    [
        (2, 4, 0.0, 0, "workers=2 need 3.6 CPU and the cluster has 2; choose fewer with --set workers=N"),
        (4, 4, 4.0, 2, "workers=2 need 2 GPU and the cluster has 1"),
        (2, 4, 0.0, 1, ""),
        (2, 2, 0.0, 0, ""),
    ],
)
def test_more_workers_than_the_cluster_can_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int, cpus: int, gpus: float, least: int, line: str
) -> None:
    monkeypatch.setattr(workers_module.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    ledger = Ledger(str(tmp_path), "codec_lm", LMCell.VERSION)
    run = RunSettings(workers=workers, min_workers=least)
    context = PackContext(ledger, run, threads=1, device="cpu", fingerprint=lambda cell: "f")
    with pytest.raises(UserError, match=re.escape(line)) if line else nullcontext():
        workers_module._require(Pack(name="p", cells=(CELL,), cpus=cpus, gpus=gpus, workers=workers), context)


@pytest.mark.slow
def test_bad_input_is_not_retried_and_a_deadly_cell_is_given_up_alone(tmp_path: Path) -> None:
    toy = Path(__file__).parents[1] / "toy_sweep.py"
    settings = ("n=1,2,3,4", "deadly=2", "bad=4", "pack_size=4", "max_retries=1", "on_workers=true")
    arguments = [part for setting in (*settings, f"scratch={tmp_path}") for part in ("--set", setting)]
    job = subprocess.run(
        [sys.executable, str(toy), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert job.returncode == 1
    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    assert sorted(ledger.read(key).identity["n"] for key in ledger.done()) == [1, 3]
    failed = {line.split(" n=")[1].split(":")[0]: line for line in job.stderr.splitlines() if line.startswith("failed")}
    assert "its workers ended 2 times" in failed["2"]
    assert "n=4 is on the list of bad numbers; choose another" in failed["4"]
    tries = {int(p.stem): len(p.read_text()) for p in tmp_path.glob("*.tries")}
    assert tries == {1: 1, 2: 2, 3: 1, 4: 1}


@pytest.mark.slow
def test_sigterm_of_a_trial_ends_it_at_a_safe_point_and_a_retry_goes_on(tmp_path: Path) -> None:
    toy = Path(__file__).parents[1] / "toy_sweep.py"
    settings = ("n=1,2,3,4,5,6,7,8", "pack_size=8", "seconds=1", f"scratch={tmp_path}")
    job = subprocess.Popen(
        [sys.executable, str(toy), *(part for setting in settings for part in ("--set", setting))],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    wait_for(job, lambda: len(ledger.done()) >= 1)
    (trial,) = processes_of(job, TRIAL)
    trial.terminate()
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert "SIGTERM: stopped between two cells" in out
    tries = {int(p.stem): len(p.read_text()) for p in tmp_path.glob("*.tries")}
    assert tries.keys() == set(range(1, 9))
    assert sum(tries.values()) == 9  # the cell that was about to start was begun again, none was lost half-way
