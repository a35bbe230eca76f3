"""Two processes train as one does: same gradients, same bits after a restart, anomalies and stops known to both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.codec.model import build_codec_lm
from sweeps.core.world import World
from tests.sweeps.world_job import CONFIG, STEPS, batch_at, run, trainer

JOB = Path(__file__).parents[1] / "world_job.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("world")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    jobs = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(rank), "2", str(folder / "meeting"), str(out)], stderr=subprocess.PIPE
        )
        for rank, out in enumerate(outs)
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors.decode()[-2000:]
    return [torch.load(out, weights_only=True) for out in outs]


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_number_of_processes_changes_rounding_alone(both: list[dict[str, Any]]) -> None:
    alone = trainer(World())
    losses = run(alone)
    for found in both:
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert worst(found["model"], alone.model.state_dict()) < 1e-5
        assert worst(found["micro"], alone.model.state_dict()) < 1e-5
    start = build_codec_lm(CONFIG, seed=1).state_dict()
    assert worst(start, alone.model.state_dict()) > 0.02  # there was something to differ in


def test_all_processes_stay_equal_and_restart_to_the_same_bits(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert worst(found["model"], both[0]["model"]) == 0
        assert worst(found["resumed"], found["model"]) == 0


def test_a_stop_asked_of_one_process_stops_all_and_the_first_saves(both: list[dict[str, Any]]) -> None:
    assert [found["stopped"] for found in both] == [7, 7]
    assert [found["saved"] for found in both] == [7, None]


def test_an_anomaly_in_one_process_is_raised_in_all(both: list[dict[str, Any]]) -> None:
    assert all("loss nan at step 1" in found["anomaly"] for found in both)


def test_small_messages(both: list[dict[str, Any]]) -> None:
    assert [found["gathered"] for found in both] == [[0, 1], [0, 1]]
    assert [found["shared"] for found in both] == [0, 0]
    assert World().gather("x") == ["x"]
    assert World().sum([1.0, 2.5]) == [1.0, 2.5]


def test_another_number_of_processes_continues_from_the_checkpoint(both: list[dict[str, Any]]) -> None:
    alone = trainer(World())
    alone.restore(both[0]["state"])
    assert alone.step_count == 7
    run(alone)
    assert alone.step_count == STEPS
    assert worst(alone.model.state_dict(), both[0]["model"]) < 1e-5
    assert both[0]["state"]["processes"] == 2
    assert alone.state()["processes"] == 1


def test_gradients_weigh_tokens_not_clips_or_processes() -> None:
    """The mean of the processes' own means would be another gradient: the clips have 4, 20 and 20 frames."""
    batch, t = batch_at(0), trainer(World())
    heads = t.model.heads
    whole = t.model.loss(batch.inputs_BKT, batch.targets_BKT, batch.texts).loss
    t._accumulate(batch)
    assert heads.grad is not None
    (expected,) = torch.autograd.grad(whole, heads)
    torch.testing.assert_close(heads.grad, expected)
    assert batch.texts is not None
    halves = [
        t.model.loss(batch.inputs_BKT[r::2], batch.targets_BKT[r::2], batch.texts.rows(slice(r, None, 2))).loss / 2
        for r in range(2)
    ]
    (by_process,) = torch.autograd.grad(halves[0] + halves[1], heads)
    assert float((heads.grad - by_process).abs().max()) > 1e-4
