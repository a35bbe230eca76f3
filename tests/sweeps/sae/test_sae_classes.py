"""BatchTopK and Matryoshka SAEs as cells: keys, packed = alone, resumed = uninterrupted, the exported class."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sweeps.core.cells import UserError
from sweeps.ledger.ledger import Ledger
from sweeps.sae.cells import SAECell, sae_config
from sweeps.sae.report import tables
from sweeps.sae.sweep import SWEEP
from tests.sweeps.sae.test_sae_grid import GRID, assert_same, fresh, lm, toy_sources, train, train_until

__all__ = ["lm", "toy_sources"]

CLASSES = replace(GRID, sae=("topk", "batchtopk", "matryoshka"), depths=("mid",), k=(8,), expansion=4)


def cells() -> list[SAECell]:
    return list(SWEEP.plan(CLASSES))


def test_a_topk_cell_keeps_its_key_and_other_classes_have_their_own() -> None:
    by_class = {cell.sae: cell for cell in cells() if cell.tokens == 640}
    assert "sae" not in by_class["topk"].identity()
    assert by_class["batchtopk"].identity()["sae"] == "batchtopk"
    assert len({cell.key for cell in by_class.values()}) == 3
    assert sae_config(by_class["matryoshka"], 64).matryoshka_widths == (16, 32, 64, 128, 256)
    with pytest.raises(UserError, match="sae='batchtop' is not known; did you mean batchtopk"):
        SWEEP.plan(replace(GRID, sae=("batchtop",)))


def test_classes_train_packed_as_alone_and_resume_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes with two nested budgets in one pack; the report's table names the class and keeps cells apart."""
    packed = fresh()
    train(cells(), packed)
    assert packed.done() == {cell.key for cell in cells()}
    for cell in cells()[2:]:
        alone = fresh()
        train([cell], alone)
        assert_same(packed, alone, [cell.key])
    resumed: Ledger = fresh()
    train_until(7, cells(), resumed, monkeypatch)
    train(cells(), resumed)
    assert_same(packed, resumed, [cell.key for cell in cells()])
    frame, _, _ = tables([packed.read(cell.key) for cell in cells()])
    assert set(frame["sae_class"]) == {"topk", "batchtopk", "matryoshka"}
    assert set(frame["depth"]) == {"mid", "mid batchtopk", "mid matryoshka"}
    exact = frame[frame["sae_class"] == "topk"]
    assert (exact["l0"] <= 8).all()
    # SAELens' threshold starts at zero and follows slowly: after 20 steps most of what is positive still fires
    assert (frame.loc[frame["sae_class"] != "topk", "l0"] > 50).all()


def test_the_banner_tells_how_far_a_threshold_has_come() -> None:
    lines = SWEEP.banner("local", CLASSES)
    assert any("threshold has come 10% of its way after 10 steps" in line for line in lines)
    assert not any("threshold" in line for line in SWEEP.banner("local", replace(CLASSES, tokens=(64_000,))))
    assert not any("threshold" in line for line in SWEEP.banner("local", GRID))


def test_exports_are_of_the_class_that_saelens_writes() -> None:
    ledger = fresh()
    last = [cell for cell in cells() if cell.tokens == 320]
    train(last, ledger)
    for cell, architecture in zip(last, ("topk", "jumprelu", "jumprelu"), strict=True):
        config = json.loads(ledger.file(cell.key, "sae/cfg.json"))
        assert config["architecture"] == architecture
        trained = config["metadata"].get("training_architecture", "topk")
        assert trained == {"matryoshka": "matryoshka_batchtopk"}.get(cell.sae, cell.sae)
