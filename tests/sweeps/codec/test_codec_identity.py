"""Recorded audio is known by its sound: other bytes are other data, in every ledger, cache and checkpoint."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from data.split import side_of
from data.token_batches import TokenClips
from sweeps.codec import corpora
from sweeps.codec.presets import PRESETS
from sweeps.codec.report import _published, tokens_of_one_codec
from sweeps.codec.sweep import SWEEP
from sweeps.codec.tokens import banner, check, check_same_audio, fingerprint, open_source, tokens_folder
from sweeps.core.cells import Row, UserError
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.ledger.ledger import Ledger
from tests.sweeps.codec.test_codec_data import layout, quiet, study_at


def forget() -> None:
    """As in a new process."""
    for known in (corpora.listed, corpora.with_content, corpora.recorded_origin):
        known.cache_clear()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    forget()


def test_recordings_replaced_in_place_are_other_data(tmp_path: Path) -> None:
    a, b, same = (layout(tmp_path / n, seed=s, side=t) for n, s, t in [("a", 0, ""), ("b", 1, "train"), ("c", 0, "")])
    study = study_at(a)
    cell = SWEEP.plan(study)[0]
    before, folder = fingerprint(cell, study), tokens_folder(study)
    assert (fingerprint(cell, study_at(same)), tokens_folder(study_at(same))) == (before, folder)
    assert fingerprint(cell, study_at(b)) != before
    assert tokens_folder(study_at(b)) != folder

    ledger = Ledger(f"memory://{uuid.uuid4().hex}", SWEEP.name, SWEEP.version)
    ledger.publish(cell, [Row("x", 1.0)], {}, {"fingerprint": before})
    ledger.verify({cell.key: before})
    for wav in (b / "wavs").iterdir():
        (a / "wavs" / wav.name).write_bytes(wav.read_bytes())
    forget()
    assert fingerprint(cell, study) == fingerprint(cell, study_at(b))
    with pytest.raises(UserError, match="its data, weights or code differ") as caught:
        ledger.verify({cell.key: fingerprint(cell, study)})
    assert "\n" not in str(caught.value)
    check_same_audio(cell, study, fingerprint(cell, study))
    with pytest.raises(UserError, match="is not what the launch read"):
        check_same_audio(cell, study, before)


def test_tokens_are_never_those_of_other_audio(tmp_path: Path) -> None:
    study = study_at(layout(tmp_path / "a"))
    first = open_source(study, "cpu", quiet)
    for wav in (layout(tmp_path / "b", seed=1, side="train") / "wavs").iterdir():
        (tmp_path / "a" / "wavs" / wav.name).write_bytes(wav.read_bytes())
    forget()
    second = open_source(study, "cpu", quiet)
    assert second.tokens.computed == 1
    assert first.content != second.content
    assert first.codec.weights_hash != second.codec.weights_hash


def test_copies_never_sit_on_both_sides(tmp_path: Path) -> None:
    root = layout(tmp_path / "a")
    wavs = sorted((root / "wavs").iterdir())
    train = [w for w in wavs if side_of(w.stem, holdout=0.3) == "train"]
    held = [w for w in wavs if w not in train]
    held[0].write_bytes(train[0].read_bytes())
    train[-1].write_bytes(held[-1].read_bytes())
    tokens = open_source(study_at(root), "cpu", quiet).tokens
    sides = [TokenClips(tokens, side, holdout=0.3) for side in ("train", "validation")]
    assert set(sides[0].recording_ids).isdisjoint(sides[1].recording_ids)
    for pair in ((held[0], train[0]), (held[-1], train[-1])):
        homes = {s for s, clips in enumerate(sides) for w in pair if f"{w.stem}#0" in clips.clip_ids}
        units = {
            u
            for c in sides
            for n, u in zip(c.clip_ids, c.recording_ids, strict=True)
            if n[:-2] in {w.stem for w in pair}
        }
        assert len(homes) == len(units) == 1
    assert tokens.manifest["odd"]["copy (kept on its original's side)"] == 2


def test_a_checkpoint_of_other_audio_is_not_continued(tmp_path: Path) -> None:
    cell = SWEEP.plan(study_at(tmp_path))[0]
    ledger = Ledger(f"memory://{uuid.uuid4().hex}", SWEEP.name, SWEEP.version)
    notes: list[str] = []

    def context(data: str) -> PackContext:
        def report(state: dict) -> None:
            notes.extend(state.get("notes", []))

        return PackContext(
            ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda _cell: data, report=report
        )

    def again(data: str) -> dict | None:
        there = context(data)
        return there.work.load(cell.key, origin=there.fingerprint(cell))

    context("old").work.save(cell.key, 7, {"step": 7}, origin="old")
    assert again("old") is not None
    assert again("new") is None
    assert any("step 7 was made with other code or data" in n for n in notes)
    context("old").work.save(cell.key, 8, {"step": 8})  # as older versions wrote them
    assert again("old") is None


def test_the_banner_names_what_is_known_of_a_path(tmp_path: Path) -> None:
    asterisk = PRESETS["asterisk"]
    assert "asterisk-core-sounds-en" in banner(asterisk)[0]
    for preset in ("asterisk", "text_asterisk", "speech_a100", "music_a100"):
        (line, *_) = banner(replace(PRESETS[preset], audio_path=str(tmp_path)))
        assert str(tmp_path) in line
        assert "asterisk" not in line.replace(str(tmp_path), "")
        assert "layout" in line
    assert "lasts 0.3 h, LJ Speech 23.9 h" in str(_published(PRESETS["speech_a100"], 1_000.0))


def test_nothing_readable_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    root = layout(tmp_path / "a")
    for wav in (root / "wavs").iterdir():
        wav.write_bytes(b"no audio")
    with pytest.raises(
        UserError, match=r"no recording at .* can be read: 24 unreadable \(skipped\), first r00"
    ) as caught:
        check(study_at(root))
    assert "\n" not in str(caught.value)
    (root / "metadata.csv").write_text("a,one\nb|two\n", encoding="utf-8")
    forget()
    with pytest.raises(UserError) as caught:
        check(study_at(root))
    text = str(caught.value)
    assert "2 entries were read" in text
    assert "1 missing (skipped), first b (wavs/b.wav)" in text
    assert "first a,one (no id|text: 'a,one')" in text
    (tmp_path / "a.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is not a zip archive"):
        check(study_at(tmp_path / "a.zip"))


def test_cells_of_several_codecs_are_refused_in_words() -> None:
    ledger = Ledger(f"memory://{uuid.uuid4().hex}", SWEEP.name, SWEEP.version)
    cells = SWEEP.plan(PRESETS["local"])[:2]
    for i, cell in enumerate(cells):
        tokens = f'{{"codec": {{"weights_hash": "h{i}"}}}}'.encode()
        ledger.publish(cell, [Row("x", 1.0)], {"tokens.json": tokens}, {})
    published = ledger.read_many([c.key for c in cells])
    with pytest.raises(UserError, match="tokens of 2 different codecs"):
        tokens_of_one_codec(published)
    assert len(tokens_of_one_codec(published[:1])) == 1
