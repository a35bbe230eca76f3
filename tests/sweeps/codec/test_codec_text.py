"""The text study: the same clips for all models, texts by step, resume, the published rows, the report, sampling."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.token_batches import TokenClips
from sweeps.codec import corpora, tokens
from sweeps.codec.cells import LMCell
from sweeps.codec.presets import PRESETS
from sweeps.codec.report import write
from sweeps.codec.run import run_pack
from sweeps.codec.sample import main as sample_main
from sweeps.codec.sweep import SWEEP
from sweeps.codec.texts import after_dropout, arm_name, shuffled_texts, with_own_text
from sweeps.core.cells import UserError
from sweeps.launch.context import PackContext
from sweeps.ledger.ledger import Ledger
from tests.sweeps.codec.test_codec_lm import TINY, context_on, killed_and_continued

STUDY = replace(TINY, architectures=("transformer",), text=("none", "bytes"), text_dropout=0.5, sample_s=0.0)


@pytest.fixture(scope="module")
def finished(codec_cache: Path) -> Iterator[tuple[PackContext, list[LMCell]]]:
    """A transformer without and with texts, trained over memory:// from a token cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_CACHE", str(codec_cache))
        context = context_on(f"memory://{uuid.uuid4().hex}")
        cells = list(SWEEP.plan(STUDY))
        run_pack(cells, STUDY, context)
        yield context, cells


def final(ledger: Ledger, cell: LMCell, metric: str) -> float:
    rows = ledger.read(cell.key).rows
    return rows.loc[(rows["metric"] == metric) & (rows["weights"] == "ema"), "value"].item()


def test_both_kinds_are_scored_on_the_same_clips_and_texts_are_read(
    finished: tuple[PackContext, list[LMCell]],
) -> None:
    context, cells = finished
    plain, spoken = cells
    assert [arm_name(c.identity()) for c in cells] == ["transformer", "transformer_text"]
    tables = [pd.read_parquet(io.BytesIO(context.ledger.file(c.key, "clips.parquet"))) for c in cells]
    assert "text" not in tables[0]
    ema = tables[1][tables[1]["weights"] == "ema"].pivot(index="clip_id", columns="text", values="nll")
    none = tables[0][tables[0]["weights"] == "ema"].set_index("clip_id")
    assert set(ema.columns) == {"right", "shuffled", "no_text"}
    assert set(ema.index) == set(none.index)
    assert (ema["right"] != ema["shuffled"]).all()
    for metric, column in {"": "right", "_shuffled": "shuffled", "_no_text": "no_text"}.items():
        value = final(context.ledger, spoken, f"final_val_nll{metric}")
        assert value == pytest.approx(ema[column].sum() / none["tokens"].sum())
    assert "left_out" in json.loads(context.ledger.file(plain.key, "tokens.json"))


def test_the_report_answers_in_words(finished: tuple[PackContext, list[LMCell]], tmp_path: Path) -> None:
    context, cells = finished
    lines = write(context.ledger.read_many([c.key for c in cells]), "text_local", STUDY, tmp_path)
    assert any(line.startswith("text         ") for line in lines)
    assert any("SYNTHETIC" in line for line in lines)
    report = (tmp_path / "report.md").read_text()
    for words in (
        "## Does the transcript help?",
        "right - shuffled",
        "transformer_text",
        "clips left out for all models",
    ):
        assert words in report
    effects = pd.read_csv(tmp_path / "texts.csv").set_index("contrast")
    gap = final(context.ledger, cells[1], "final_val_nll") - final(context.ledger, cells[0], "final_val_nll")
    assert effects.loc["text - none", "difference"] == pytest.approx(gap)
    one_model = effects.loc[["right - shuffled", "right - no text"]]  # of one seed: nothing follows for two trainings
    assert (one_model["lo"] < one_model["difference"]).all()
    assert effects.loc[["text - none", "no text - none"], ["lo", "hi", "p_holm"]].isna().all(axis=None)
    assert "needs ≥ 2 seeds" in report
    assert (tmp_path / "texts.png").stat().st_size > 2000


def test_a_killed_cell_continues_to_the_same_rows(finished: tuple[PackContext, list[LMCell]]) -> None:
    context, cells = finished
    killed_and_continued(cells[1], STUDY, context.ledger)


def test_sampling_says_what_it_is_given(
    finished: tuple[PackContext, list[LMCell]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context, cells = finished
    plain, spoken = (f"{context.ledger.store.uri}/{c.key}" for c in cells)

    def sample(place: str, out: str, *more: str) -> int:
        return sample_main(["--sample", place, "--seconds", "0.4", "--n", "1", "--out", str(tmp_path / out), *more])

    assert sample(spoken, "a", "--text", "hello world") == 0
    assert "text: hello world" in capsys.readouterr().out
    assert sample(spoken, "b") == 0
    assert "no --text: the model samples without a text" in capsys.readouterr().out
    waves = [(tmp_path / name / "transformer_text-seed0-00.wav").read_bytes() for name in ("a", "b")]
    assert waves[0] != waves[1]
    assert sample(plain, "c", "--text", "hello") == 2
    assert "--text 'hello': this model has no text conditioning" in capsys.readouterr().err
    assert sample(spoken, "d", "--text", "a" * 200) == 2
    assert "a text of 200 bytes (UTF-8) exceeds max_bytes=128" in capsys.readouterr().err


def clips_of(**columns: list) -> TokenClips:
    """Clips without codes, whole recordings of 2 s with texts unless said."""
    n = len(next(iter(columns.values())))
    clips = object.__new__(TokenClips)
    clips.clip_ids = clips.recording_ids = [f"r{i}" for i in range(n)]
    clips.texts = columns.get("texts", [f"text {i}" for i in range(n)])
    clips.shard_C = clips._row_C = np.zeros(n, dtype=int)
    clips.n_frames_C = np.array(columns.get("frames", [100] * n))
    clips.n_chunks_C = np.array(columns.get("chunks", [1] * n))
    clips.duration_s_C = np.array(columns.get("seconds", [2.0] * n))
    return clips


def test_clips_without_a_text_of_their_own_are_left_out_and_counted() -> None:
    clips = clips_of(
        texts=["one", "two", " ", "é" * 5, "four", "five", "six", "seven"],
        chunks=[1, 2, 2, 1, 1, 1, 1, 1],
        seconds=[2.0, 2.0, 2.0, 2.0, 8.0, 2.0, 2.0, 2.0],
        frames=[100, 100, 100, 100, 100, 900, 100, 100],
    )
    kept, counts = with_own_text(clips, chunk_s=8.0, max_frames=500, max_bytes=9)
    assert kept.texts == ["one", "six", "seven"]
    assert counts == {
        "pieces of longer recordings": 2,
        "of a chunk's full length, perhaps cut": 1,
        "longer than the context": 1,
        "with a text of more than 9 bytes": 1,
    }
    with pytest.raises(UserError, match=r"0 of 3 clips of a side have a text of their own \(2 pieces .* 1 without a"):
        with_own_text(clips_of(texts=["a", "b", ""], chunks=[2, 3, 1]), chunk_s=8.0, max_frames=500, max_bytes=9)


def test_shuffled_texts_are_another_clips_wherever_that_can_be() -> None:
    clips = clips_of(texts=[f"t{i // 2}" for i in range(12)])  # each text twice
    given = shuffled_texts(clips)
    assert sorted(given) == sorted(clips.texts)
    assert all(a != b for a, b in zip(given, clips.texts, strict=True))


def test_dropout_is_a_function_of_seed_and_step_and_drops_its_share() -> None:
    texts = ["words"] * 50
    draws = [after_dropout(texts, 0.2, seed, step) for seed in (0, 1) for step in range(20)]
    assert draws[3] == after_dropout(texts, 0.2, 0, 3)
    assert len({tuple(d) for d in draws}) == len(draws)
    assert np.mean([t == "" for d in draws for t in d]) == pytest.approx(0.2, abs=0.03)
    assert after_dropout(texts, 0.0, 0, 0) == texts


def test_texts_enter_a_cells_fingerprint_and_nothing_else_changes_without(tmp_path: Path) -> None:
    (tmp_path / "wavs").mkdir()
    for name in ("a", "b"):
        (tmp_path / "wavs" / f"{name}.wav").write_bytes(b"")
    study = replace(PRESETS["text_asterisk"], audio_path=str(tmp_path), codec="encodec", codec_weights="random")
    prints = []
    for said in ("one", "two"):
        (tmp_path / "metadata.csv").write_text(f"a|{said}|{said}\nb|x|x\n")
        corpora.listed.cache_clear()
        corpora.recorded_origin.cache_clear()
        prints.append({text: tokens.fingerprint(cell, s) for text, s, cell in prints_of(study)})
    assert prints[0]["plain"] == prints[1]["plain"]
    assert prints[0]["text"] != prints[1]["text"]
    (tmp_path / "metadata.csv").write_text("a||\nb| | \n")
    corpora.listed.cache_clear()
    with pytest.raises(UserError, match=r"none of 2 recordings at .* has a text, and text=none,bytes needs"):
        tokens.check(study)


def prints_of(study):  # type: ignore[no-untyped-def]
    for name, s in {"text": study, "plain": replace(study, text=())}.items():
        yield name, s, SWEEP.plan(s)[0]


def test_a_cell_without_text_is_what_it_was() -> None:
    pinned = replace(PRESETS["local"], lr=(4e-3,), steps=80, eval_every=40, sample_n=16)
    cell = SWEEP.plan(pinned)[0]
    assert (cell.key, SWEEP.plan(PRESETS["speech_a100"])[0].key) == PINNED_KEYS
    assert tokens.fingerprint(cell, pinned)[:16] == PINNED_FINGERPRINT
    assert set(SWEEP.plan(STUDY)[0].identity()) - set(cell.identity()) == {"text", "text_dropout"}


PINNED_KEYS = ("2f266de9df3f066a", "cfb456a2972a3c8f")
PINNED_FINGERPRINT = "af3630ebe905dc49"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ("words",)}, "text='words' is not known; kinds: none, bytes"),
        ({"text_dropout": 1.0}, r"text_dropout=1\.0 must lie in 0\.\.1, below 1"),
        ({"rungs": (2,)}, "learning rates do not compete in a text study"),
        ({"scale": "music"}, "scale='music' has no text conditioning"),
    ],
)
def test_bad_settings_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SWEEP.plan(replace(STUDY, **changes))
