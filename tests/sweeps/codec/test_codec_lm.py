"""The codec language-model sweep: end to end on a tiny corpus, bitwise resume, anomalies, plans, bad input."""

from __future__ import annotations

import errno
import math
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data.synthetic_speech import SpeechSpec, write_ljspeech
from models.codec.delay import training_pair
from models.codec.model import CodecLM, build_codec_lm
from models.codec.presets import LOCAL
from sweeps.codec import codec_choice, tokens
from sweeps.codec.cell_run import CellRun
from sweeps.codec.cells import LMCell, Study
from sweeps.codec.checkpoint import load_model, read_checkpoint
from sweeps.codec.loop import AnomalyError, Batch, Owner, Pace, StepStats, TrainConfig, Trainer, train
from sweeps.codec.presets import PRESETS
from sweeps.codec.report import write
from sweeps.codec.run import run_pack
from sweeps.codec.sample import main as sample_main
from sweeps.codec.sweep import SWEEP
from sweeps.core.cells import UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.stop import PackStopped
from sweeps.ledger.ledger import Ledger

MACHINE = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=8 * 2**30, hardware="test")
TINY = replace(
    PRESETS["local"],
    architectures=("transformer", "la"),
    lr=(3e-3,),
    corpus_clips=40,
    chunk_s=1.5,
    min_s=1.0,
    holdout=0.3,
    steps=6,
    batch_size=2,
    warmup_steps=2,
    eval_every=3,
    eval_clips=3,
    sample_s=1.2,
    sample_n=2,
)
CONFIG = replace(LOCAL, d_model=16, n_layers=2, n_heads=2, d_ff=16, n_codebooks=2, codebook_size=11, context=32)


def context_on(storage: str, run: RunSettings | None = None) -> PackContext:
    ledger = Ledger(storage, "codec_lm", "1")
    return PackContext(ledger, run or RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f")


@pytest.fixture(scope="module")
def finished(codec_cache: Path) -> Iterator[tuple[Ledger, list[LMCell]]]:
    """Two architectures trained over memory:// from a token cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_CACHE", str(codec_cache))
        context = context_on(f"memory://{uuid.uuid4().hex}")
        cells = list(SWEEP.plan(TINY))
        for pack in SWEEP.pack(cells, TINY, MACHINE, RunSettings()):
            assert len({c.architecture for c in pack.cells if isinstance(c, LMCell)}) == 1
            assert pack.workers == 1
            run_pack([c for c in pack.cells if isinstance(c, LMCell)], TINY, context)
        yield context.ledger, cells


def test_end_to_end(finished: tuple[Ledger, list[LMCell]], tmp_path: Path) -> None:
    ledger, cells = finished
    keys = [c.key for c in cells]
    assert ledger.done() == set(keys)
    published = ledger.read_many(keys)
    for cell in published:
        assert {"model.pt", "sample.wav", "reference.wav", "spectrogram.png", "tokens.json", "clips.parquet"} <= set(
            cell.files
        )
        rows = cell.rows
        final = {
            (r["metric"], r["weights"]): r["value"]
            for r in rows[rows["weights"].notna() & rows["step"].isna() & rows["codebook"].isna()].to_dict("records")
        }
        for weights in ("raw", "ema"):
            nll = final["final_val_nll", weights]
            assert final["perplexity", weights] == pytest.approx(np.exp(nll))
            assert final["bits_per_second", weights] == pytest.approx(nll / np.log(2) * 8 * 62.5)
            assert final["final_val_nll_lo", weights] < nll < final["final_val_nll_hi", weights]
            last = rows[(rows["metric"] == "val_nll") & (rows["step"] == 6) & (rows["weights"] == weights)]
            assert last["value"].item() == pytest.approx(nll, rel=1e-12)
        assert abs(final["final_val_nll", "raw"] - np.log(1027)) < 0.7  # six steps are near the uniform distribution
        assert final["final_val_nll", "raw"] != final["final_val_nll", "ema"]
    lines = write(published, "local", TINY, tmp_path)
    assert any("SYNTHETIC" in line for line in lines)
    report = (tmp_path / "report.md").read_text()
    assert "SYNTHETIC" in report
    assert "stand-in" in report
    table = pd.read_parquet(tmp_path / "cells.parquet")
    assert table["n_parameters"].max() / table["n_parameters"].min() < 1.02
    for name in ("curves.png", "codebooks.png", "transformer.png", "transformer-0.wav"):
        assert (tmp_path / name).stat().st_size > 2000


def killed_and_continued(cell: LMCell, study: Study, whole: Ledger) -> PackContext:
    """Train a cell that dies after the checkpoint of step 4, continue it: its rows are those of `whole`."""
    context = context_on(f"memory://{uuid.uuid4().hex}", RunSettings(checkpoint_steps=2))
    save = context.work.save

    def save_and_die(name: str, step: int, state: dict, kind: str = "latest", origin: str = "") -> None:
        save(name, step, state, kind, origin)
        if step == 4:
            raise KeyboardInterrupt

    context.work.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_pack([cell], study, context)
    assert context.work.step(cell.key) == 4
    context.work.save = save  # type: ignore[method-assign]
    run_pack([cell], study, context)
    found = [ledger.read(cell.key).rows for ledger in (whole, context.ledger)]
    same = [rows[rows["metric"] != "tokens_per_second"] for rows in found]
    pd.testing.assert_frame_equal(same[0], same[1], check_exact=True)
    return context


def test_a_killed_cell_continues_to_the_same_rows(finished: tuple[Ledger, list[LMCell]]) -> None:
    ledger, (cell, *_) = finished
    context = killed_and_continued(cell, TINY, ledger)
    assert ledger.file(cell.key, "sample.wav") == context.ledger.file(cell.key, "sample.wav")
    assert context.work.step(cell.key) == 0


def test_a_diverging_cell_fails_in_one_line_and_keeps_its_batch(finished: tuple[Ledger, list[LMCell]]) -> None:
    context = context_on(f"memory://{uuid.uuid4().hex}")
    study = replace(TINY, lr=(50.0,), warmup_steps=0, architectures=("transformer",))
    cells = list(SWEEP.plan(study))
    run_pack(cells, study, context)
    record = context.ledger.failures([cells[0].key])[cells[0].key]
    assert "choose a lower lr (now 50)" in record["error"]
    kept = context.work.load(f"{cells[0].key}-anomaly")
    assert kept is not None
    assert kept["inputs"].shape == kept["targets"].shape


def test_samples_of_a_published_cell(
    finished: tuple[Ledger, list[LMCell]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import soundfile

    ledger, cells = finished
    cell = f"{ledger.store.uri}/{cells[1].key}"
    assert sample_main(["--sample", cell, "--seconds", "0.4", "--n", "2", "--out", str(tmp_path)]) == 0
    assert "stand-in" in capsys.readouterr().out
    files = sorted(tmp_path.glob("*.wav"))
    assert [f.name for f in files] == ["la-seed0-00.wav", "la-seed0-01.wav"]
    waves = [soundfile.read(f)[0] for f in files]
    assert len(waves[0]) == 25 * 256
    assert not np.array_equal(waves[0], waves[1])
    assert sample_main(["--sample", cell, "--seconds", "60", "--out", str(tmp_path)]) == 2
    assert "exceed the context of 1024 steps" in capsys.readouterr().err
    assert sample_main(["--sample", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "neither a checkpoint file nor a published cell" in capsys.readouterr().err


@pytest.mark.slow
def test_real_layout_and_codec_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    speech = SpeechSpec(sample_rate=22_050, min_s=1.0, max_s=1.5)
    folder = write_ljspeech(speech, 12, tmp_path / "LJSpeech-1.1")
    (folder / "wavs" / "SYN000-00003.wav").write_bytes(b"broken")
    study = replace(
        TINY,
        corpus="ljspeech",
        corpus_clips=0,
        audio_path=str(folder),
        codec="encodec",
        codec_weights="random",
        architectures=("transformer",),
        holdout=0.4,
        precision="bfloat16",
        micro_batch=1,
    )
    cells = list(SWEEP.plan(study))
    other = replace(study, corpus="synthetic_speech", codec="melvq", codec_weights="")
    prints = {SWEEP.fingerprint(cells[0], s, RunSettings()) for s in (study, other, replace(other, corpus_clips=9))}
    assert len(prints) == 3
    context = context_on(f"memory://{uuid.uuid4().hex}")
    context._fingerprint = lambda cell: SWEEP.fingerprint(cell, study, RunSettings())
    run_pack(cells, study, context)
    lines = write(context.ledger.read_many([cells[0].key]), "speech", study, tmp_path / "report")
    assert any("RANDOM weights" in line for line in lines)
    assert "75 Hz with 8 codebooks" in (tmp_path / "report" / "report.md").read_text()
    assert '"unreadable (skipped)": 1' in context.ledger.file(cells[0].key, "tokens.json").decode()


def random_batch(seed: int, clips: int = 4) -> Batch:
    codes = torch.randint(0, CONFIG.codebook_size, (clips, 2, 12), generator=torch.Generator().manual_seed(seed))
    codes[0, :, 7:] = CONFIG.pad
    inputs, targets = training_pair(codes, pad=CONFIG.pad, bos=CONFIG.bos)
    return Batch(inputs, targets, int((targets != CONFIG.pad).sum()))


def trainer(model: CodecLM | None = None, **changes: object) -> Trainer:
    config = TrainConfig(**{"steps": 30, "lr": 1e-2, "lr_end": 1e-3, "warmup_steps": 3, **changes})  # type: ignore[arg-type]
    return Trainer(model or build_codec_lm(CONFIG, seed=1), config)


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    norms = [trainer(micro_batch=m).step(random_batch(0)).group_norms for m in (0, 1, 3)]
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-5)
    total = trainer().step(random_batch(0))
    assert sum(v**2 for v in total.group_norms.values()) ** 0.5 == pytest.approx(total.grad_norm, rel=1e-6)


@pytest.mark.parametrize("instructions", [True, False])
def test_bfloat16_on_a_processor_that_emulates_it_is_told(monkeypatch, recwarn, instructions) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": instructions})
    trainer(precision="bfloat16")
    told = [str(w.message) for w in recwarn if "choose precision=float32" in str(w.message)]
    assert len(told) == (not instructions)


def test_learning_rate_and_average_follow_their_formulas() -> None:
    t = trainer(ema_decay=0.5)
    expected: dict[str, torch.Tensor] = {}
    for step in range(3):
        t.step(random_batch(step))
        for name, p in t.model.named_parameters():
            old = expected.get(name)
            expected[name] = p.detach().clone() if old is None else 0.5 * old + 0.5 * p.detach()
    for name, p in t.ema.named_parameters():
        torch.testing.assert_close(p, expected[name])
    c = t.config
    assert [c.lr_at(s) for s in (0, 1, 2)] == pytest.approx([c.lr / 3, 2 * c.lr / 3, c.lr])
    assert c.lr_at(3) == pytest.approx(c.lr)
    assert c.lr_at(30) == pytest.approx(c.lr_end)
    assert t.optimizer.param_groups[0]["lr"] == pytest.approx(c.lr)


def test_training_learns_one_batch_and_reports_it() -> None:
    t = trainer(label_smoothing=0.0, weight_decay=0.0, steps=120)
    batch, seen = random_batch(0), []

    class Watching(Owner):
        def evaluate(self, model: CodecLM) -> dict[str, float]:
            return {"val_nll": model.loss(batch.inputs_BKT, batch.targets_BKT, label_smoothing=0.0).loss.item()}

        def report(self, trainer: Trainer, stats: StepStats, rate: float) -> None:
            seen.append(stats.loss)

    train(t, lambda step: batch, Watching(), Pace(eval_every=60))
    assert seen[0] > 2.4
    assert seen[-1] < 0.3
    assert [s for m, s, _ in t.curve if m == "val_nll/raw"] == [60, 120]
    assert t.real_tokens == 120 * batch.real_tokens


def test_anomalies_stop_before_any_weight_changes() -> None:
    t = trainer(max_loss_jump=0.5)
    for step in range(6):
        t.step(random_batch(step))
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.running["loss"] = 0.1
    with pytest.raises(AnomalyError, match=r"exceeds its running mean 0\.100 by more than 0\.5 at step 7"):
        t.step(random_batch(9))
    for name, p in t.model.named_parameters():
        assert torch.equal(p, before[name])
    with torch.no_grad():
        t.model.norm.weight[0] = torch.nan
    with pytest.raises(AnomalyError, match="loss nan at step 7") as caught:
        t.step(random_batch(9))
    assert torch.equal(caught.value.batch.inputs_BKT, random_batch(9).inputs_BKT)


def test_a_spike_is_laid_to_its_group() -> None:
    t = trainer(spike_factor=3.0, warmup_steps=0)
    for step in range(22):
        t.step(random_batch(step))
    with torch.no_grad():
        t.model.heads.mul_(40)
    t.config = replace(t.config, max_loss_jump=1e9)
    t.step(random_batch(99))
    assert sum(t.spikes.values()) == 1


def test_foreign_checkpoints_are_refused() -> None:
    state = trainer().state()
    with pytest.raises(ValueError, match="another training configuration"):
        trainer(lr=2e-2).restore(state)
    with pytest.raises(ValueError, match=r"another architecture: d_ff=16 \(here 24\)"):
        trainer(build_codec_lm(replace(CONFIG, d_ff=24), seed=0)).restore(state)
    with pytest.raises(ValueError, match="is of an unnamed version, this is codec_lm version 1; remove it"):
        Trainer(build_codec_lm(CONFIG, seed=1), trainer().config, maker="codec_lm version 1").restore(state)
    trainer(micro_batch=1).restore(state)  # changes no more than rounding


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(
    finished: tuple[Ledger, list[LMCell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, cells = finished
    context = context_on(f"memory://{uuid.uuid4().hex}", RunSettings(checkpoint_steps=2))
    said: list[str] = []
    monkeypatch.setattr(context, "note", said.append)
    replace_file, full = context.work.store.replace, True

    def limited(name: str, data: bytes) -> None:
        if full and "latest-" in name and "latest-000000000002" not in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(name, data)

    monkeypatch.setattr(context.work.store, "replace", limited)
    steps = iter(range(1, 100))
    monkeypatch.setattr(context, "stopping", lambda: next(steps) == 6)  # asked once before the first step
    with pytest.raises(PackStopped, match="stopped at step 5"):
        run_pack(cells[:1], TINY, context)
    assert [line.split(" could not")[0].split("checkpoint of ")[1] for line in said] == ["step 4", "step 5"]
    assert "No space left on device" in said[0]
    assert "that of step 2 stays and training goes on" in said[0]
    state = context.work.load(cells[0].key)
    assert state is not None
    assert state["step"] == 2
    files = [n for n in context.work.store.names(f"_work/{cells[0].key}") if n.endswith(".pt")]
    assert len(files) <= 2
    full = False
    run_pack(cells[:1], TINY, context)
    whole, resumed = (place.read(cells[0].key).rows for place in (ledger, context.ledger))
    same = [rows[rows["metric"] != "tokens_per_second"] for rows in (whole, resumed)]
    pd.testing.assert_frame_equal(same[0], same[1], check_exact=True)


def test_the_best_measurement_is_kept_published_and_sampled(
    finished: tuple[Ledger, list[LMCell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cells = finished
    context = context_on(f"memory://{uuid.uuid4().hex}")
    values = iter((3.0, 3.0, 4.0, 4.0))  # raw and averaged weights at steps 3 and 6
    monkeypatch.setattr(CellRun, "evaluate", lambda self, model: {"val_nll": next(values)})
    kept: dict[str, torch.Tensor] = {}
    save = context.work.save

    def watch(name: str, step: int, state: dict, kind: str = "latest", origin: str = "") -> None:
        assert (kind, step) == ("best", 3)
        kept.update({n: t.clone() for n, t in state["ema"].items()})
        save(name, step, state, kind, origin)

    monkeypatch.setattr(context.work, "save", watch)
    run_pack(cells[:1], replace(TINY, sample_s=0.0), context)
    cell = context.ledger.read(cells[0].key)
    state = read_checkpoint(context.ledger.file(cells[0].key, "model.pt"), "model.pt")
    assert state["best_step"] == 3
    assert all(torch.equal(t, kept[n]) for n, t in state["best"].items())
    assert any(not torch.equal(t, kept[n]) for n, t in state["ema"].items())
    assert torch.equal(load_model(state, "best").heads, kept["heads"])
    rows = cell.rows
    assert rows.loc[rows["metric"] == "best_step", "value"].item() == 3
    final = rows[rows["metric"] == "final_val_nll"].set_index("weights")["value"]
    assert len({final["raw"], final["ema"], final["best"]}) == 3


def test_without_a_better_earlier_measurement_the_last_weights_are_the_best(
    finished: tuple[Ledger, list[LMCell]],
) -> None:
    ledger, cells = finished
    state = read_checkpoint(ledger.file(cells[0].key, "model.pt"), "model.pt")
    rows = ledger.read(cells[0].key).rows
    assert rows.loc[rows["metric"] == "best_step", "value"].item() == TINY.steps
    assert "best" not in state
    assert torch.equal(load_model(state, "best").heads, load_model(state, "ema").heads)


def test_the_optimizer_clips_and_decays_matrices_alone() -> None:
    t = trainer(grad_clip=1e-3)
    stats = t.step(random_batch(0))
    assert stats.grad_norm > 0.1  # before clipping
    clipped = torch.nn.utils.get_total_norm([p.grad for p in t.model.parameters() if p.grad is not None])
    assert float(clipped) == pytest.approx(1e-3, rel=1e-3)
    decayed, rest = ({id(p) for p in g["params"]} for g in t.optimizer.param_groups)
    assert [g["weight_decay"] for g in t.optimizer.param_groups] == [t.config.weight_decay, 0.0]
    names = {n for n, p in t.model.named_parameters() if id(p) in rest}
    assert all(t.model.get_parameter(n).dim() == 1 or n.endswith(("A_log", "dt_bias", ".D")) for n in names)
    assert id(t.model.heads) in decayed
    assert all(g["fused"] for g in t.optimizer.param_groups)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    losses = {p: trainer(precision=p).step(random_batch(0)).loss for p in ("float32", "bfloat16")}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    t = trainer(precision="bfloat16")
    t.step(random_batch(0))
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}


def test_checkpoints_by_time_by_steps_and_never_of_the_last() -> None:
    batch = random_batch(0)

    def saves(save_seconds: float, save_steps: int) -> list[int]:
        found: list[int] = []

        class Keeping(Owner):
            def save(self, trainer: Trainer) -> None:
                found.append(trainer.step_count)

        pace = Pace(eval_every=6, save_seconds=save_seconds, save_steps=save_steps)
        train(trainer(steps=6), lambda step: batch, Keeping(), pace)
        return found

    assert saves(1e9, 0) == []
    assert saves(1e9, 2) == [2, 4]
    assert saves(0.0, 0)[-1] == 5


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_can_be_planned(preset: str) -> None:
    study = PRESETS[preset]
    cells = SWEEP.plan(study)
    grid = (study.architectures, study.seeds, study.lr, study.text or ("none",))
    assert len({c.key for c in cells}) == len(cells) == math.prod(map(len, grid))
    estimate = SWEEP.estimate(cells, study, MACHINE, RunSettings())
    assert estimate.flops > 0
    assert estimate.seconds > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ("transfomer",)}, "architecture='transfomer' is not one of"),
        ({"architectures": ("hybrid_1_7",)}, "choose a larger scale"),
        ({"corpus": "libri"}, "corpus 'libri' is not known"),
        ({"codec": "encodec"}, "synthetic_speech goes with its own melvq"),
        ({"warmup_steps": 50}, "warmup_steps=50 leaves no step of 50"),
        ({"lr": (0.0,)}, "lr=0.0 must be positive"),
        ({"precision": "int8"}, "precision='int8' is not known"),
        ({"eval_clips": 1}, "eval_clips=1 gives no interval"),
    ],
)
def test_bad_settings_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        SWEEP.plan(replace(PRESETS["local"], **changes))
    assert "\n" not in str(caught.value)


def test_real_presets_say_what_they_miss(tmp_path: Path) -> None:
    speech = PRESETS["speech_a100"]
    with pytest.raises(UserError, match="--set audio_path=PATH"):
        tokens.check(speech)
    with pytest.raises(UserError, match=r"no metadata\.csv"):
        tokens.check(replace(speech, audio_path=str(tmp_path)))
    with pytest.raises(UserError, match="needs_gpu=false"):
        run_pack(list(SWEEP.plan(speech)), speech, context_on(f"memory://{uuid.uuid4().hex}"))
    with pytest.raises(UserError, match="codec_weights"):
        codec_choice.weights_identity("encodec", str(tmp_path / "absent.pt"))
