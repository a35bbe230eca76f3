"""`--set legibility=on`: columns of trained and audited cells, the same bits on every way, and who is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.sae.columns import LEGIBILITY_COLUMNS
from data.token_labels import CLASSES, NONE, TokenLabels
from models.host.host_lm import HostLM
from models.sae.trainer import SparseTrainer
from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings, apply_settings
from sweeps.ledger.ledger import Ledger
from sweeps.sae.cells import SAECell
from sweeps.sae.presets import PRESETS
from sweeps.sae.sources import held_out_labels, open_stream
from sweeps.sae.sweep import SWEEP
from tests.sweeps.sae.test_released import audit, audited_sources, export, preset
from tests.sweeps.sae.test_sae_grid import CONTEXT, GRID, Numbers, assert_same, fresh, lm, plan, toy_sources, train

__all__ = ["audited_sources", "lm", "toy_sources"]
SEQUENCES = 120
ASKED = replace(GRID, legibility="on", eval_sequences=SEQUENCES, depths=("mid",), k=(4,), rungs="free")


def labels(cell: SAECell, run: RunSettings, folder: Path | None) -> TokenLabels:
    """Classes by a token's number, which the model's activations tell; no documentation; four sequences a document."""
    tokens_ST = Numbers().eval_sequences(cell.eval_sequences).astype(np.int32)
    document_ST = np.repeat(np.random.default_rng(5).permutation(SEQUENCES)[: len(tokens_ST), None] // 4, CONTEXT, 1)
    return TokenLabels(tokens_ST, np.where(tokens_ST < 8, NONE, tokens_ST % 6).astype(np.int8), document_ST)


@pytest.fixture(autouse=True)
def planted_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.sae.evaluate.held_out_labels", labels)


@pytest.fixture(scope="module")
def measured(lm: HostLM) -> Ledger:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.sae.sources.open_lm", lambda cell, run, device, progress: lm)
        patch.setattr("sweeps.sae.train.open_stream", lambda cell, run, tokenizer_dir=None, **how: Numbers())
        patch.setattr("sweeps.sae.evaluate.held_out_labels", labels)
        ledger = fresh()
        train(plan(ASKED), ledger)
        return ledger


def table(ledger: Ledger, cell: SAECell) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(ledger.file(cell.key, "legibility.parquet"))).set_index("label")


def test_cells_have_the_columns_and_a_table_by_class(measured: Ledger) -> None:
    """Probes on activations tell classes by token number; documentation, which the text lacks, has a reason."""
    for cell in plan(ASKED):
        numbers, by_class = measured.read(cell.key).numbers(), table(measured, cell)
        assert by_class.index.tolist() == [*CLASSES, "documentation"]
        known = by_class[by_class["reason"] == ""]
        assert known.index.tolist() == list(CLASSES[:6])
        assert (known["dense"] > 0.6).all()
        assert ((known["k5"] >= 0.4) & (known["k5"] <= 1)).all()
        assert by_class.loc["documentation", "reason"].startswith("0 tokens with it in training documents")
        for name in LEGIBILITY_COLUMNS:
            assert numbers[name] == pytest.approx(known[name.removeprefix("legibility_")].mean(), abs=1e-12)
        assert (known["training_documents"] + known["test_documents"] == SEQUENCES / 4).all()


def test_the_field_enters_keys_only_where_it_is_on_and_changes_no_other_number(measured: Ledger) -> None:
    (asked, _), (plain, _) = plan(ASKED), plan(replace(ASKED, legibility="off"))
    assert "legibility" not in plain.identity()
    assert asked.key != plain.key
    assert asked.trajectory() == plain.trajectory()
    without = fresh()
    train([plain], without)
    one, two = measured.read(asked.key).numbers(), without.read(plain.key).numbers()
    assert set(one) - set(two) == set(LEGIBILITY_COLUMNS)
    assert all(one[n] == two[n] or (np.isnan(one[n]) and np.isnan(two[n])) for n in two)


def test_resume_and_alone_give_the_same_bits(measured: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, ledger, real = plan(ASKED), fresh(), SparseTrainer.step
    count = iter(range(1000))

    def failing(self: SparseTrainer, x: Any) -> Any:
        if next(count) == 15:
            raise RuntimeError("power cut")
        return real(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            train(cells, ledger, checkpoint_seconds=0.0)
    train([c for c in cells if c.key not in ledger.done()], ledger, checkpoint_seconds=0.0)
    alone = fresh()
    train(cells[1:], alone)
    assert_same(measured, ledger, [c.key for c in cells])
    assert_same(measured, alone, [cells[1].key])
    for other, some in ((ledger, cells), (alone, cells[1:])):
        for cell in some:
            assert other.file(cell.key, "legibility.parquet") == measured.file(cell.key, "legibility.parquet")


def test_an_audit_finds_the_same_and_reports_have_the_tables(measured: Ledger, tmp_path: Path) -> None:
    cells = plan(ASKED)
    asked = preset([export(measured, cells[1], tmp_path / "sae")], legibility="on", rungs="free")
    theirs, (audited,) = audit(replace(asked, eval_sequences=SEQUENCES))
    assert theirs.file(audited.key, "legibility.parquet") == measured.file(cells[1].key, "legibility.parquet")
    one, two = measured.read(cells[1].key).numbers(), theirs.read(audited.key).numbers()
    assert all(one[name] == two[name] for name in LEGIBILITY_COLUMNS)
    SWEEP.report([theirs.read(audited.key)], "released", asked, tmp_path / "audit")
    SWEEP.report([measured.read(c.key) for c in cells], "local", ASKED, tmp_path / "trained")
    for kind in ("audit", "trained"):
        text = (tmp_path / kind / "report.md").read_text()
        assert "chance is 0.500" in text
        assert "no interval, because the documents are few" in text
        assert "| keyword | " in text
        assert "| documentation | – | – |" in text
        saved = pd.read_parquet(tmp_path / kind / "cells.parquet")
        assert set(LEGIBILITY_COLUMNS) <= set(saved)
        assert f"{saved['legibility_k5'].iloc[-1]:.3f}" in text
        assert len(pd.read_csv(tmp_path / kind / "legibility.csv")) == 10 * len(saved)


def test_labels_of_other_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: Any) -> TokenLabels:
        found = labels(*arguments)
        return replace(found, tokens_ST=found.tokens_ST + 1)

    monkeypatch.setattr("sweeps.sae.evaluate.held_out_labels", shifted)
    with pytest.raises(RuntimeError, match="belong to other tokens than its held-out ones"):
        train(plan(ASKED)[:1], fresh())


def test_ready_made_tokens_and_unknown_values_are_one_line() -> None:
    for changes, message in (
        (["legibility=on"], "legibility=on needs the documents that tokens come from, and stream=pile holds tokens"),
        (["legibility=yes"], "legibility='yes' is not known; choose off or on"),
    ):
        (grid,) = apply_settings(changes, PRESETS["fast2"])
        with pytest.raises(UserError, match=message) as caught:
            SWEEP.plan(grid)
        assert "\n" not in str(caught.value)


def test_documents_of_a_user_are_labelled_with_the_models_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python files give classes; a text without any gives prose alone, and no class that can be told from another."""
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    for name, text in (
        ("code", "def f{}(x):\n    return x + 1\n\n\n"),
        ("words", "the {} words of a text without code\n"),
    ):
        (tmp_path / name).mkdir()
        for i in range(120):
            (tmp_path / name / f"{i:03d}.txt").write_text(text.format(i) * 30)
        grid = replace(GRID, text=str(tmp_path / name), eval_sequences=20, legibility="on")
        cell = SWEEP.plan(grid)[0]
        stream = open_stream(cell, RunSettings())
        found = held_out_labels(cell, RunSettings(), None)
        np.testing.assert_array_equal(found.tokens_ST, stream.eval_sequences(20))
        seen = {CLASSES[i] for i in np.unique(found.class_ST) if i != NONE}
        assert seen == ({"keyword", "name", "operator", "number"} if name == "code" else {"prose"})
