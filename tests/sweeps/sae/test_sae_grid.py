"""The packed grid: packed = alone, nested = separate, resumed = uninterrupted, all bit for bit."""

from __future__ import annotations

import copy
import io
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.host.host_lm import HostLM
from models.host.specs import HOST_LMS
from models.host.standin import build_model
from models.sae.trainer import SparseTrainer
from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext, Place
from sweeps.launch.stop import PackStopped
from sweeps.ledger.ledger import Ledger
from sweeps.sae import train as train_module
from sweeps.sae.cells import Grid, SAECell
from sweeps.sae.sweep import SWEEP
from sweeps.sae.tokens import kept_tokens, replace_dropped

CONTEXT = 16


class Numbers:
    """A stream of random tokens, each sequence a function of its index alone, in uneven pieces.

    The indices in `gap` (seven or more) are left out, as those of a corrupt shard are.
    """

    source = "numbers"

    def __init__(self, length: int = 10_000, gap: range = range(0)) -> None:
        self.length, self.gap = length, gap

    def sequences(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(start, self.length, 7):
            kept = [i for i in range(first, min(first + 7, self.length)) if i not in self.gap]
            if kept:
                yield kept[0], np.stack([np.random.default_rng(i).integers(0, 256, CONTEXT) for i in kept])

    def eval_sequences(self, n: int) -> np.ndarray:
        return np.random.default_rng(99).integers(0, 256, (n, CONTEXT))

    def held_out_documents(self, n: int) -> None:
        return None

    def held_out_place(self, number: int) -> str:
        return f"held-out number {number}"

    def training_place(self, index: int) -> str:
        return f"number {index}"

    def require(self, train_tokens: int, n_eval: int) -> None:
        if train_tokens > self.length * CONTEXT:
            raise ValueError(f"{train_tokens} tokens asked of {self.length * CONTEXT}; choose a smaller budget")


@pytest.fixture(scope="module")
def lm() -> HostLM:
    torch.manual_seed(0)
    return HostLM("standin-small", build_model("standin-small"), HOST_LMS["standin-small"], None)


@pytest.fixture(autouse=True)
def toy_sources(lm: HostLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.sae.sources.open_lm", lambda cell, run, device, progress: lm)
    monkeypatch.setattr(train_module, "open_stream", lambda cell, run, tokenizer_dir=None, **how: Numbers())
    monkeypatch.setattr(train_module, "_SAVE_PAUSE", 0)


GRID = Grid(
    models=("standin-small",),
    depths=("early", "mid"),
    k=(4, 8),
    tokens=(320, 640),
    seeds=(0,),
    stream="embedded",
    context=CONTEXT,
    expansion=2,
    batch_tokens=32,
    shuffle_sequences=6,
    warmup_steps=3,
    dead_after_steps=5,
    eval_sequences=10,
)


def train(cells: list[SAECell], ledger: Ledger, **settings: Any) -> None:
    context = PackContext(
        ledger, RunSettings(**settings), threads=1, device="cpu", fingerprint=lambda cell: "f", place=Place("test")
    )
    train_module.train_pack(cells, context)


def fresh() -> Ledger:
    return Ledger(f"memory://{uuid.uuid4().hex}", "proxy_gap", "1")


def plan(grid: Grid = GRID) -> list[SAECell]:
    return list(SWEEP.plan(grid))


def assert_same(a: Ledger, b: Ledger, keys: list[str]) -> None:
    for key in keys:
        pd.testing.assert_frame_equal(a.read(key).rows, b.read(key).rows, check_exact=True)
        assert a.file(key, "sae/sae_weights.safetensors") == b.file(key, "sae/sae_weights.safetensors")
        assert a.file(key, "sequences.parquet") == b.file(key, "sequences.parquet")


@pytest.fixture(scope="module")
def packed(lm: HostLM) -> Ledger:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.sae.sources.open_lm", lambda cell, run, device, progress: lm)
        patch.setattr(train_module, "open_stream", lambda cell, run, tokenizer_dir=None, **how: Numbers())
        ledger = fresh()
        train(plan(), ledger)
        return ledger


def test_every_cell_is_published_with_the_contract_rows(packed: Ledger) -> None:
    assert packed.done() == {c.key for c in plan()}
    cell = packed.read(plan()[0].key)
    wanted = {"r2", "r2_legacy", "r2_energy", "ce_rec", "ce_rec_lo", "ce_rec_hi", "ce_loss_score", "swd", "nmse"}
    wanted |= {"r2_no_sinks", "pr_no_sinks", "sst_share_first", "sst_share_top1pct", "r2_constant_of_layer"}
    assert wanted <= set(cell.rows["metric"])
    assert {"train_loss", "train_grad_norm", "train_dead", "pr_of_layer"} <= set(cell.rows["metric"])
    assert "sae/cfg.json" in cell.files


def test_packed_is_alone(packed: Ledger) -> None:
    for cell in (plan()[1], plan()[6]):
        alone = fresh()
        train([cell], alone)
        assert_same(packed, alone, [cell.key])


def test_nested_budget_is_the_separate_run(packed: Ledger) -> None:
    short = [c for c in plan() if c.tokens == 320]
    separate = fresh()
    train(short, separate)
    assert_same(packed, separate, [c.key for c in short])


@pytest.mark.parametrize("calls", [5, 37, 70])
def test_crash_and_resume_is_the_uninterrupted_run(packed: Ledger, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    ledger = fresh()
    real, count = SparseTrainer.step, 0

    def failing(self: SparseTrainer, x: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise RuntimeError("power cut")
        return real(self, x)

    monkeypatch.setattr(SparseTrainer, "step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train(plan(), ledger, checkpoint_seconds=0.0)
    done = ledger.done()
    monkeypatch.setattr(SparseTrainer, "step", real)
    missing = [c for c in plan() if c.key not in done]
    assert missing
    train(missing, ledger, checkpoint_seconds=0.0)
    assert_same(packed, ledger, [c.key for c in plan()])
    assert ledger.store.names("_work") == []


def test_checkpoints_of_different_steps_meet_again(packed: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between two checkpoints of one round leaves SAEs at different steps; each joins where it stands."""
    ledger = fresh()
    from sweeps.ledger.checkpoints import WorkStore

    real, count = WorkStore.save, 0

    def failing(self: WorkStore, name: str, step: int, state: Any) -> None:
        nonlocal count
        count += 1
        if count == 14:
            raise RuntimeError("power cut")
        real(self, name, step, state)

    monkeypatch.setattr(WorkStore, "save", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train(plan(), ledger, checkpoint_seconds=0.0)
    monkeypatch.setattr(WorkStore, "save", real)
    train([c for c in plan() if c.key not in ledger.done()], ledger)
    assert_same(packed, ledger, [c.key for c in plan()])


def test_extension_trains_only_new_cells_and_changes_no_old_one(packed: Ledger) -> None:
    grid = replace(GRID, k=(4, 8, 16))
    new = [c for c in plan(grid) if c.key not in packed.done()]
    assert {c.k for c in new} == {16}
    train(new, packed)
    assert packed.done() == {c.key for c in plan(grid)}


def test_wsd_budgets_are_separate_runs_with_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = replace(GRID, schedule="wsd", decay_steps=4, k=(4,), depths=("mid",))
    together, apart = fresh(), fresh()
    train(plan(grid), together)
    for cell in plan(grid):
        train([cell], apart)
    assert_same(together, apart, [c.key for c in plan(grid)])

    real, count = SparseTrainer.step, 0

    def failing(self: SparseTrainer, x: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        if count > 14:  # inside the first decay branch: two trainers a step
            raise RuntimeError("power cut")
        return real(self, x)

    resumed = fresh()
    monkeypatch.setattr(SparseTrainer, "step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train(plan(grid), resumed, checkpoint_seconds=0.0)
    monkeypatch.setattr(SparseTrainer, "step", real)
    train([c for c in plan(grid) if c.key not in resumed.done()], resumed)
    assert_same(together, resumed, [c.key for c in plan(grid)])


@pytest.mark.parametrize("decay", [0, 4], ids=["constant", "wsd"])
def test_a_promoted_sae_continues_and_is_the_separately_trained_one(
    decay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = replace(GRID, k=(4,), schedule="wsd" if decay else "constant", decay_steps=decay)
    rungs = [plan(replace(grid, tokens=(tokens,))) for tokens in (256, 384, 640)]  # 8, 12 and 20 steps
    real_step, steps, blocks = SparseTrainer.step, [0], list[int]()
    real_block = train_module._PackRun._activations

    def counted(self: SparseTrainer, x: torch.Tensor) -> Any:
        steps[0] += 1
        return real_step(self, x)

    promoted, apart = fresh(), fresh()
    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "step", counted)
        patch.setattr(
            train_module._PackRun,
            "_activations",
            lambda self, tokens, block: blocks.append(block) or real_block(self, tokens, block),
        )
        for cells in rungs:
            train(cells, promoted, keep_checkpoints=True)
    for cells in rungs:
        train(cells, apart)
    assert_same(promoted, apart, [c.key for cells in rungs for c in cells])
    # both layers: the trunk to the end, or to where its last branch leaves it, and each branch
    assert steps[0] == 2 * (20 if not decay else 16 + 3 * decay)
    assert blocks == ([0, 1, 2, 2, 3, 3, 4, 5, 6] if not decay else [0, 1, 2, 1, 2, 3, 2, 3, 4, 5, 6])
    names = {SWEEP.checkpoint(c, grid, RunSettings()) for cells in rungs for c in cells}
    assert set(promoted.store.names("_work")) == names
    assert len(names) == 2
    assert apart.store.names("_work") == []


def train_until(step: int, cells: list[SAECell], ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the pack after `step` steps, with its checkpoint."""
    asked = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(PackContext, "stopping", lambda self: next(asked) == step)
        with pytest.raises(PackStopped, match=f"stopped at step {step}"):
            train(cells, ledger, checkpoint_seconds=1e9)


ONE = replace(GRID, k=(4,), depths=("mid",), tokens=(384,))


def test_resume_after_a_skipped_shard_is_the_uninterrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is three steps here: the checkpoints lie where the next begins and inside one."""
    gappy = Numbers(gap=range(10, 30))
    monkeypatch.setattr(train_module, "open_stream", lambda cell, run, tokenizer_dir=None, **how: gappy)
    whole = fresh()
    train(plan(ONE), whole)
    for step in (9, 10):
        ledger = fresh()
        train_until(step, plan(ONE), ledger, monkeypatch)
        train(plan(ONE), ledger)
        assert_same(whole, ledger, [c.key for c in plan(ONE)])


@pytest.mark.parametrize(("ask", "step"), [(1, 0), (7, 3)])
def test_a_stop_while_activations_are_collected_does_not_wait_for_the_block(
    ask: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two questions for each block of six sequences, two at a time, and one for each of its three steps."""
    monkeypatch.setattr(train_module, "_LM_BATCH", 2)
    whole, stopped = fresh(), fresh()
    train(plan(ONE), whole)
    asked = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(PackContext, "stopping", lambda self: next(asked) == ask)
        with pytest.raises(PackStopped, match=f"stopped at step {step}"):
            train(plan(ONE), stopped, checkpoint_seconds=1e9)
    assert next(asked) == ask + 1
    train(plan(ONE), stopped)
    assert_same(whole, stopped, [c.key for c in plan(ONE)])


def test_no_block_is_read_beyond_the_last_step(lm: HostLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = train_module._PackRun._activations
    monkeypatch.setattr(
        train_module._PackRun,
        "_activations",
        lambda self, tokens, block: read.append(block) or real(self, tokens, block),
    )
    train(plan(replace(ONE, tokens=(192,))), fresh())
    assert read == [0, 1]


@pytest.mark.parametrize(("step", "other"), [(7, 256), (10, 512)])
def test_wsd_grid_is_extended_in_the_middle(monkeypatch: pytest.MonkeyPatch, step: int, other: int) -> None:
    """A smaller budget that leaves the trunk before the checkpoint; a larger one, when the trunk has ended."""
    grid = replace(ONE, schedule="wsd", decay_steps=4)
    added = plan(replace(grid, tokens=(other,)))
    ledger, apart = fresh(), fresh()
    train_until(step, plan(grid), ledger, monkeypatch)
    train([*plan(grid), *added], ledger)
    train(added, apart)
    assert ledger.done() == {c.key for c in [*plan(grid), *added]}
    assert_same(apart, ledger, [c.key for c in added])


def test_tokens_left_out_are_neither_trained_on_nor_counted(packed: Ledger) -> None:
    cells = plan(replace(GRID, k=(4,), tokens=(320,), drop_positions=2, max_norm_multiple=1.05))
    together, alone = fresh(), fresh()
    train(cells, together)
    train(cells[:1], alone)
    assert_same(together, alone, [cells[0].key])
    for cell in cells:
        before = next(c for c in plan() if replace(c, drop_positions=2, max_norm_multiple=1.05) == cell)
        counted = pd.read_parquet(io.BytesIO(together.file(cell.key, "sequences.parquet")))["n_tokens"]
        assert counted.between(1, CONTEXT - 2).all()
        assert counted.sum() < 10 * (CONTEXT - 2)
        metrics = [
            ledger.read(c.key).rows.set_index("metric")["value"] for ledger, c in ((packed, before), (together, cell))
        ]
        assert metrics[0]["r2"] != metrics[1]["r2"]
        assert metrics[0]["pr"] == metrics[1]["pr"]  # the layer's, of all tokens
        assert metrics[1]["r2_no_first"] == pytest.approx(metrics[1]["r2"], rel=1e-9)


def test_another_part_measures_the_same_sae_on_the_next_held_out_sequences(packed: Ledger) -> None:
    ten, first, second = (
        plan(replace(GRID, k=(4,), depths=("mid",), tokens=(320,), eval_sequences=n, eval_part=part))
        for n, part in ((10, 0), (5, 0), (5, 1))
    )
    assert ten[0] in plan()
    ledger = fresh()
    for cells in (first, second):
        train(cells, ledger)
    loss = {
        c.key: pd.read_parquet(io.BytesIO(where.file(c.key, "sequences.parquet")))["loss_orig"].to_numpy()
        for where, c in ((packed, ten[0]), (ledger, first[0]), (ledger, second[0]))
    }
    np.testing.assert_allclose(np.concatenate([loss[first[0].key], loss[second[0].key]]), loss[ten[0].key], rtol=1e-6)
    assert loss[first[0].key].shape == (5,)
    weights = [ledger.file(c.key, "sae/sae_weights.safetensors") for c in (first[0], second[0])]
    assert weights[0] == weights[1]


def test_dropped_tokens_are_replaced_by_the_blocks_first_kept_ones() -> None:
    (cell,) = plan(replace(ONE, drop_positions=1, max_norm_multiple=3.0))
    norms = torch.tensor([[9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 4.0, 1.0]])
    kept = kept_tokens(norms, cell)
    assert kept.tolist() == [[False, True, True, True], [False, True, False, True]]
    values = torch.arange(8.0)[:, None]
    replace_dropped(values, kept.flatten())
    assert values.flatten().tolist() == [1, 1, 2, 3, 2, 5, 3, 7]
    with pytest.raises(UserError, match=r"leave no token of 2; choose fewer positions or a larger multiple"):
        kept_tokens(norms[:, :1], cell)


def test_keys_are_the_old_ones_where_no_token_is_left_out() -> None:
    """The keys of the presets' first and last cells before the options were there."""
    known = {
        "local": ("791841b672636c6e", "bc941895c4ce9b82"),
        "smollm2": ("e2f98f843561e6cf", "d6c4a9f6183a5fb4"),
        "fast2": ("393ab344c838efe7", "d15d84bcf876390c"),
        "bridge": ("393ab344c838efe7", "3ac16858eaf06d7d"),
    }
    planned = {name: plan(SWEEP.presets[name]) for name in known}
    assert {name: (cells[0].key, cells[-1].key) for name, cells in planned.items()} == known
    one = planned["fast2"][0]
    others = [one, replace(one, drop_positions=2), replace(one, max_norm_multiple=2.0)]
    assert len({c.key for c in others}) == len({c.trajectory() for c in others}) == 3
    assert replace(one, drop_positions=0, max_norm_multiple=0.0).key == one.key


def test_curve_reaches_the_budget(packed: Ledger) -> None:
    for cell in plan():
        rows = packed.read(cell.key).rows
        curve = rows[rows["metric"] == "train_loss"]
        assert 0.98 * cell.tokens <= curve["step"].max() <= cell.tokens
        assert curve["step"].is_monotonic_increasing


def test_short_stream_and_nan_are_one_line(lm: HostLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "open_stream", lambda cell, run, tokenizer_dir=None, **how: Numbers(length=30))
    with pytest.raises(UserError, match="640 tokens asked of 480; choose a smaller budget"):
        train(plan(), fresh())
    monkeypatch.setattr(train_module, "open_stream", lambda cell, run, tokenizer_dir=None, **how: Numbers())
    real = lm.activations

    def poisoned(tokens: torch.Tensor, layers: Any) -> dict[int, torch.Tensor]:
        out = real(tokens, layers)
        if len(layers) == 2:  # training, not the evaluation of every layer
            out[3][0, 0, 0] = float("nan")
        return out

    monkeypatch.setattr(lm, "activations", poisoned)
    with pytest.raises(UserError, match=r"layer 3: 1 of \d+ activations are NaN or inf at step 0"):
        train(plan(), fresh())


def test_text_of_another_tokenizer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(Numbers):
        def sequences(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
            return ((first, tokens + 100) for first, tokens in super().sequences(start))

    monkeypatch.setattr(train_module, "open_stream", lambda cell, run, tokenizer_dir=None, **how: Wide())
    with pytest.raises(UserError, match=r"token 3\d\d of numbers exceeds the vocabulary of standin-small, 257; choose"):
        train(plan(ONE), fresh())


@pytest.mark.parametrize(
    ("weight", "place"), [("gpt_neox.layers.2.mlp.dense_4h_to_h.bias", "layer 2"), ("lm_head.weight", "loss")]
)
def test_language_model_of_nan_is_one_line(
    lm: HostLM, monkeypatch: pytest.MonkeyPatch, weight: str, place: str
) -> None:
    broken = HostLM("standin-small", copy.deepcopy(lm.model), lm.spec, None)
    broken.model.get_parameter(weight).data.fill_(float("nan"))
    monkeypatch.setattr("sweeps.sae.sources.open_lm", lambda cell, run, device, progress: broken)
    with pytest.raises(UserError, match=rf"standin-small {place}: the held-out text gives NaN or inf; check the weig"):
        train(plan(ONE), fresh())


def test_an_sae_that_diverges_fails_alone() -> None:
    """Its one-step budget in the evaluation, its other one in the next gradient; the pack publishes the rest."""
    (good,) = plan(ONE)
    bad = [replace(good, lr=1e38, tokens=tokens) for tokens in (32, 384)]
    together, alone = fresh(), fresh()
    train([*bad, good], together)
    train([good], alone)
    assert together.done() == {good.key}
    assert_same(together, alone, [good.key])
    failures = together.failures(c.key for c in bad)
    assert "reconstructions hold NaN or inf; lower lr=1e+38" in failures[bad[0].key]["error"]
    assert "gradient norm is" in failures[bad[1].key]["error"]
    assert "lower lr=1e+38" in failures[bad[1].key]["error"]
    assert together.store.names("_work") == []
    kept = fresh()
    train([*bad, good], kept, keep_checkpoints=True)  # what diverged is not continued
    assert kept.store.names("_work") == [SWEEP.checkpoint(good, ONE, RunSettings())]
    train([*bad, good], together)  # a retry of the pack leaves what it knows to fail


def test_a_decay_branch_that_diverges_spares_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = plan(replace(ONE, schedule="wsd", decay_steps=4, tokens=(256, 384)))
    real = SparseTrainer.step

    def failing(self: SparseTrainer, x: torch.Tensor) -> Any:
        if self.decay_from == 4:
            raise FloatingPointError("gradient norm is nan")
        return real(self, x)

    monkeypatch.setattr(SparseTrainer, "step", failing)
    ledger = fresh()
    train(cells, ledger)
    assert ledger.done() == {cells[1].key}
    assert ledger.failures([cells[0].key])


def test_bad_grids_are_one_line() -> None:
    for change, line in (
        ({"k": (300,)}, "k=300 exceeds d_sae=128; choose k <= d_sae"),
        ({"layers": (9,)}, "layer=9 is out of range for standin-small; choose 0 to 5"),
        ({"tokens": (330,)}, "tokens=330 is not a multiple of batch_tokens=32; choose tokens=320 or 352"),
        ({"models": ("pythia-7m",)}, "model 'pythia-7m' is not known; did you mean pythia-70m"),
        ({"schedule": "cosine"}, "schedule='cosine' cannot serve nested budgets"),
        ({"depths": ("top",)}, "depth 'top' is not known; choose from early, mid, late"),
        ({"drop_positions": 16}, "drop_positions=16 leaves no token of context=16; choose 0 to 15"),
        ({"max_norm_multiple": 0.5}, "max_norm_multiple=0.5 would leave out half of the tokens; choose more than 1"),
        ({"shuffle_sequences": 7}, "shuffle_sequences=7 x context=16 is not a multiple of batch_tokens=32"),
    ):
        with pytest.raises(UserError) as caught:
            plan(replace(GRID, **change))
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "cells"), [("fast2", 36), ("fast3", 12), ("phase2", 48), ("budget_k32", 4), ("bridge", 486)]
)
def test_paper_presets_plan_the_study(preset: str, cells: int) -> None:
    planned = plan(SWEEP.presets[preset])
    assert len(planned) == cells
    assert len({c.key for c in planned}) == cells
    assert all(c.d_sae == 32 * HOST_LMS[c.model].d_model for c in planned)


def test_a_pack_that_is_told_to_stop_saves_first(packed: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = fresh()
    asked = iter(range(100))
    monkeypatch.setattr(PackContext, "stopping", lambda self: next(asked) == 6)
    with pytest.raises(PackStopped, match="stopped at step 7"):
        train(plan(), ledger, checkpoint_seconds=1e9)
    assert len(ledger.store.names("_work")) == 4
    missing = [c for c in plan() if c.key not in ledger.done()]
    train(missing, ledger)
    assert_same(packed, ledger, [c.key for c in plan()])
