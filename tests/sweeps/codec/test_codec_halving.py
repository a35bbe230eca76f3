"""Successive halving of learning rates: decisions follow the rule, and neither kills nor subsets change a bit."""

from __future__ import annotations

import io
import math
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from sweeps.codec import loop
from sweeps.codec.cells import HalvedCell, LMCell
from sweeps.codec.presets import PRESETS
from sweeps.codec.run import run_pack
from sweeps.codec.sweep import SWEEP
from sweeps.core.cells import UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.stop import PackStopped
from sweeps.ledger.ledger import Ledger
from sweeps.search.halving import survivors

STUDY = replace(
    PRESETS["local"],
    architectures=("transformer",),
    lr=(1e-4, 1e-3, 1e-2, 3e-2),
    rungs=(2, 4),
    seeds=(0, 1),
    corpus_clips=40,
    chunk_s=1.5,
    min_s=1.0,
    holdout=0.3,
    steps=6,
    batch_size=2,
    warmup_steps=1,
    eval_every=6,
    eval_clips=3,
    sample_s=0.0,
)
CELLS = list(SWEEP.plan(STUDY))


def context(**settings: bool) -> PackContext:
    ledger = Ledger(f"memory://{uuid.uuid4().hex}", "codec_lm", LMCell.VERSION)
    return PackContext(ledger, RunSettings(**settings), threads=1, device="cpu", fingerprint=lambda cell: "f")


@pytest.fixture(scope="module")
def whole(codec_cache: Path) -> Iterator[Ledger]:
    """All cells, undisturbed; the token cache stays for the other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_CACHE", str(codec_cache))
        place = context()
        run_pack(CELLS, STUDY, place)
        yield place.ledger


def rows(ledger: Ledger, cell: LMCell) -> pd.DataFrame:
    found = ledger.read(cell.key).rows
    return found[found["metric"] != "tokens_per_second"].reset_index(drop=True)


def value(ledger: Ledger, cell: LMCell, metric: str, step: int | None = None) -> float:
    found = rows(ledger, cell)
    at = (found["metric"] == metric) & ((found["step"] == step) & (found["weights"] == "ema") if step else True)
    values = found.loc[at, "value"].tolist()
    return values[0] if values else math.nan


def test_survivors_are_the_best_of_the_mean() -> None:
    scores = {1e-4: 3.0, 1e-3: 1.0, 1e-2: 2.0, 1e-1: math.inf, 1.0: 1.0}
    assert survivors(scores, 2) == [1e-3, 1.0, 1e-2]
    assert survivors(scores, 3) == [1e-3, 1.0]
    assert survivors({1e-3: math.inf}, 4) == [1e-3]


def test_every_decision_follows_the_published_measurements(whole: Ledger) -> None:
    assert whole.done() == {c.key for c in CELLS}
    alive = set(STUDY.lr)
    for rung in STUDY.rungs:
        means = {lr: sum(value(whole, c, "val_nll", rung) for c in CELLS if c.lr == lr) / 2 for lr in alive}
        expected = set(sorted(means, key=lambda lr: means[lr])[: len(means) // 2])
        stopped = {c.lr for c in CELLS if value(whole, c, "stopped_at") == rung}
        assert stopped == alive - expected
        alive = expected
    (best,) = alive
    for cell in CELLS:
        end = value(whole, cell, "stopped_at")
        assert math.isnan(end) == (cell.lr == best)
        assert value(whole, cell, "best_step") <= (STUDY.steps if math.isnan(end) else end)
    assert len({tuple(rows(whole, c).loc[lambda f: f["metric"] == "train_tokens", "value"]) for c in CELLS}) > 1


def test_a_stopped_run_continues_to_the_same_decisions_and_bits(whole: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    place = context()
    asked = iter(range(1000))
    monkeypatch.setattr(place, "stopping", lambda: next(asked) in (9, 30, 45))
    for _ in range(10):
        try:
            run_pack([c for c in CELLS if c.key not in place.ledger.done()], STUDY, place)
            break
        except PackStopped:
            continue
    assert next(asked) > 45
    for cell in CELLS:
        pd.testing.assert_frame_equal(rows(place.ledger, cell), rows(whole, cell), check_exact=True)


def test_one_cell_alone_competes_with_all_and_is_the_same(whole: Ledger) -> None:
    ended = {c.key: value(whole, c, "stopped_at") for c in CELLS}
    for cell in (next(c for c in CELLS if ended[c.key] == 4), next(c for c in CELLS if math.isnan(ended[c.key]))):
        place = context()
        run_pack([cell], STUDY, place)
        assert place.ledger.done() == {cell.key}
        pd.testing.assert_frame_equal(rows(place.ledger, cell), rows(whole, cell), check_exact=True)


def test_a_promoted_cell_continues_and_is_the_separately_trained_one(
    whole: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = replace(STUDY, rungs=(), seeds=(0,), lr=(1e-3, 1e-2), eval_every=4)
    ends: list[int] = []
    real = loop.Trainer.step

    def counted(self: loop.Trainer, batch: loop.Batch, **how: bool) -> loop.StepStats:
        ends.append(self.step_count)
        return real(self, batch, **how)

    monkeypatch.setattr(loop.Trainer, "step", counted)
    promoted, apart = context(keep_checkpoints=True), context()
    for amount in (2, 3, 6):  # never where the whole training is measured
        cells = SWEEP.plan_until(study, amount)
        run_pack(cells, study, promoted)
        kept = promoted.ledger.store.names("_work")
        assert set(kept) == ({SWEEP.checkpoint(c, study, RunSettings()) for c in cells} if amount < 6 else set())
    assert ends == [*[0, 1] * 2, *[2] * 2, *[3, 4, 5] * 2]
    for amount in (2, 3, 6):
        cells = SWEEP.plan_until(study, amount)
        run_pack(cells, study, apart)
        assert apart.ledger.store.names("_work") == []
        for cell in cells:
            pd.testing.assert_frame_equal(rows(promoted.ledger, cell), rows(apart.ledger, cell), check_exact=True)
            assert math.isnan(value(promoted.ledger, cell, "stopped_at")) == (amount == 6)
    for cell in SWEEP.plan(study):
        assert promoted.ledger.file(cell.key, "clips.parquet") == apart.ledger.file(cell.key, "clips.parquet")
    with pytest.raises(UserError, match="rungs and --stop"):
        SWEEP.plan_until(STUDY, 3)


def test_another_part_holds_out_other_recordings_in_the_same_pack(whole: Ledger) -> None:
    studies = [replace(STUDY, rungs=(), seeds=(0,), lr=(1e-3,), steps=2, eval_part=part) for part in (0, 1)]
    cells = [cell for study in studies for cell in SWEEP.plan(study)]
    place = context()
    run_pack(cells, studies[0], place)
    scored = [pd.read_parquet(io.BytesIO(place.ledger.file(c.key, "clips.parquet"))) for c in cells]
    assert not set(scored[0]["recording_id"]) & set(scored[1]["recording_id"])
    alone = context()
    run_pack(cells[1:], studies[1], alone)
    pd.testing.assert_frame_equal(rows(place.ledger, cells[1]), rows(alone.ledger, cells[1]), check_exact=True)
    with pytest.raises(UserError, match=r"eval_part=3 does not lie within the recordings; choose 0\.\.2"):
        SWEEP.plan(replace(STUDY, eval_part=3))


def test_report_leaves_stopped_cells_out(whole: Ledger, tmp_path: Path) -> None:
    some = [c for c in CELLS if not math.isnan(value(whole, c, "stopped_at"))]
    with pytest.raises(UserError, match="every published cell was stopped early"):
        SWEEP.report(whole.read_many([c.key for c in some]), "local", STUDY, tmp_path)


def test_a_cell_that_competes_is_another_cell_and_its_rivals_share_a_pack() -> None:
    plain = SWEEP.plan(replace(STUDY, rungs=()))
    assert not {c.key for c in plain} & {c.key for c in CELLS}
    assert all(isinstance(c, HalvedCell) for c in CELLS)
    machine = Machine(nodes=1, cpus=4, gpus=0, memory_bytes=2**33, hardware="test")
    study = replace(STUDY, architectures=("transformer", "la"))
    packs = SWEEP.pack(list(SWEEP.plan(study)), study, machine, RunSettings())
    assert len(packs) == 2
    assert all(len({c.identity()["architecture"] for c in p.cells}) == 1 and len(p.cells) == 8 for p in packs)


def test_the_estimate_counts_what_halving_saves() -> None:
    assert {c.mean_steps for c in CELLS} == {(4 * 2 + 2 * 2 + 1 * 2) / 4}
    machine = Machine(nodes=1, cpus=4, gpus=0, memory_bytes=2**33, hardware="test")
    plain = replace(STUDY, rungs=())
    full, halved = (SWEEP.estimate(list(SWEEP.plan(s)), s, machine, RunSettings()).flops for s in (plain, STUDY))
    assert halved / full == pytest.approx(3.5 / 6, rel=1e-3)


def test_own_grids_of_learning_rates() -> None:
    study = replace(PRESETS["local"], architectures=("transformer", "la"), lr=(1e-3,), lr_of=("la:1e-4", "la:2e-4"))
    found = {(c.architecture, c.lr) for c in SWEEP.plan(study)}
    assert found == {("transformer", 1e-3), ("la", 1e-4), ("la", 2e-4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs": (4, 2)}, "rungs must rise"),
        ({"rungs": (6,)}, r"lie in 1\.\.5"),
        ({"eta": 1}, "eta be at least 2"),
        ({"lr_of": ("la:1e-3",)}, "is not ARCHITECTURE:RATE of a planned architecture"),
        ({"lr_of": ("transformer:fast",)}, "is not ARCHITECTURE:RATE"),
    ],
)
def test_bad_settings_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        replace(STUDY, **changes)
    assert "\n" not in str(caught.value)
