"""Where tokens come from: real audio with a codec trained on its training side, and what is said when it is absent."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from analysis.codec.published import Published
from data import codec_shards
from data.audio_io import AudioSet, sample_rates
from data.codec import CODECS, CodecSpec, MelVQCodec
from data.codec_shards import ShardPlan
from data.ljspeech import open_ljspeech
from data.melvq import MelVQ, MelVQSpec
from data.split import side_of
from data.token_batches import TokenClips
from sweeps.codec import codec_choice, tokenise
from sweeps.codec import tokens as tokens_module
from sweeps.codec.cell_run import TrainingStream
from sweeps.codec.cells import CURVE_CLIPS, Study
from sweeps.codec.presets import PRESETS
from sweeps.codec.report import _missing, _published, _resampled
from sweeps.codec.sweep import SWEEP
from sweeps.core.cells import PublishedCell, UserError
from sweeps.core.settings import RunSettings
from sweeps.launch.command import parser

RATE = 4_000
N_CLIPS = 24


class SmallStudy(Study):
    def melvq(self) -> MelVQSpec:
        return MelVQSpec(sample_rate=16_000, hop=256, n_mels=8, n_codebooks=2, codebook_size=16)


def layout(root: Path, *, seed: int = 0, side: str = "", rate: int = RATE) -> Path:
    """Noise bursts laid out like LJ Speech; recordings of `side` come from another seed."""
    (root / "wavs").mkdir(parents=True)
    lines = []
    for i in range(N_CLIPS):
        name = f"r{i:02d}"
        rng = np.random.default_rng([seed if side_of(name, holdout=0.3) == side else 0, i])
        wave = rng.standard_normal(round(1.2 * rate)) * np.repeat(rng.uniform(0, 0.3, 12), round(0.1 * rate))
        soundfile.write(root / "wavs" / f"{name}.wav", wave, rate)
        lines.append(f"{name}|text {i}|text {i}\n")
    (root / "metadata.csv").write_text("".join(lines))
    return root


def study_at(path: Path) -> Study:
    fields = {**vars(PRESETS["asterisk"]), "audio_path": str(path), "holdout": 0.3, "chunk_s": 2.0}
    return SmallStudy(**fields)


def quiet(line: str) -> None:
    pass


def test_the_codec_is_trained_on_the_training_side_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {}
    for name, side in {"plain": "", "other held-out audio": "validation", "other training audio": "train"}.items():
        monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache" / name))
        study = study_at(layout(tmp_path / name, seed=1, side=side))
        hashes[name] = tokens_module.open_source(study, "cpu", quiet).codec.weights_hash
    assert hashes["plain"] == hashes["other held-out audio"]
    assert hashes["plain"] != hashes["other training audio"]


def test_a_launch_without_a_gpu_lets_actors_code_on_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    spec = MelVQSpec(sample_rate=RATE, hop=64, n_mels=8, n_codebooks=2, codebook_size=16)
    model = MelVQ(spec, torch.zeros(8), torch.zeros(2, 16, 8))
    loaded_on, actors_on = set(), []

    def load(spec: CodecSpec) -> MelVQCodec:
        loaded_on.add(spec.device)
        return MelVQCodec(model)

    def actors(audio: AudioSet, codec: CodecSpec, facts: dict, out: str, plans: list[ShardPlan], *_: float) -> None:
        actors_on.append(codec.device)
        for plan in plans:
            codec_shards.Folder(out).publish(plan.file, codec_shards.make_shard(audio, plan, MelVQCodec(model), facts))

    monkeypatch.setitem(CODECS, "on_a_gpu", load)
    monkeypatch.setattr(codec_shards, "_make_with_ray", actors)
    study = replace(study_at(layout(tmp_path / "a")), codec="on_a_gpu", codec_weights="random")
    tokens_module.open_source(study, "cuda", quiet, actors=1, gpus_per_actor=1)
    assert loaded_on == {"cpu"}
    assert actors_on == ["cuda"]


def test_a_batch_follows_from_its_step_alone(tmp_path: Path) -> None:
    spec = MelVQSpec(n_mels=8, n_codebooks=2, codebook_size=16)
    codec = MelVQCodec(MelVQ(spec, torch.zeros(8), torch.zeros(2, 16, 8)))
    rng = np.random.default_rng(0)
    codes = {f"c{i}": rng.integers(0, 16, (2, 20 + i)).astype(np.uint16) for i in range(11)}
    clips = TokenClips(codec_shards.save_codes("made up", codec, codes, str(tmp_path / "t")), None)
    cell = replace(SWEEP.plan(PRESETS["local"])[0], batch_size=4)
    config = replace(cell.lm_config(), n_codebooks=2, codebook_size=16, context=25)
    walked = TrainingStream(clips, cell, config, "cpu")
    batches = [walked(step) for step in range(9)]  # three epochs, with clips longer than the context
    jumped = TrainingStream(clips, cell, config, "cpu")
    for step in (7, 2, 8, 0):
        assert torch.equal(jumped(step).inputs_BKT, batches[step].inputs_BKT)
        assert torch.equal(jumped(step).targets_BKT, batches[step].targets_BKT)
    assert len({str(b.targets_BKT) for b in batches}) == 9
    tokens = sum(2 * min(c.shape[1], config.max_frames) for c in codes.values())
    assert [sum(b.real_tokens for b in batches[e : e + 3]) for e in (0, 3, 6)] == [tokens] * 3


def test_audio_is_never_raised_to_a_higher_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    low, high = (layout(tmp_path / str(rate), rate=rate) for rate in (RATE, 32_000))
    source = tokens_module.open_source(study_at(low), "cpu", quiet)
    assert (source.codec.sample_rate, source.codec.hop, source.codec.frame_rate_hz) == (RATE, 64, 62.5)
    assert dict(source.source_rates) == {RATE: N_CLIPS}
    assert source.tokens.manifest["odd"] == {"sample rate (converted)": N_CLIPS}  # not the prompts' 8 kHz
    spec = codec_choice.melvq_spec(study_at(high), open_ljspeech(high))
    assert (spec.sample_rate, spec.hop) == (16_000, 256)
    assert tokens_module.open_source(study_at(low), "cpu", quiet).tokens.computed == 0


def test_tokens_are_kept_apart_by_all_that_decides_them(tmp_path: Path) -> None:
    study = study_at(layout(tmp_path / "a"))
    changed = [
        {"holdout": 0.2},
        {"chunk_s": 1.0},
        {"min_s": 0.5},
        {"audio_path": str(layout(tmp_path / "b", rate=8_000))},
    ]
    folders = {tokens_module.tokens_folder(s) for s in (study, *(replace(study, **c) for c in changed))}
    assert len(folders) == 1 + len(changed)
    (cell, *_) = SWEEP.plan(study)
    prints = {SWEEP.fingerprint(cell, s, RunSettings()) for s in (study, replace(study, **changed[3]))}
    assert len(prints) == 2


def test_absent_audio_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        SWEEP.preflight([], PRESETS["asterisk"], RunSettings())
    text = str(caught.value)
    assert f"python benchmarks/fetch_test_audio.py {tmp_path / 'audio'} --only ljspeech" in text
    assert "--set audio_path=PATH" in text
    assert "\n" not in text
    layout(tmp_path / "audio" / "ljspeech", rate=8_000)
    SWEEP.preflight([], PRESETS["asterisk"], RunSettings())


def test_too_little_audio_for_the_codec_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    study = replace(PRESETS["asterisk"], audio_path=str(layout(tmp_path / "a", rate=8_000)), holdout=0.6)
    with pytest.raises(UserError, match=r"cannot train melvq: .* frames cannot train codebook_size=1024"):
        tokens_module.open_source(study, "cpu", quiet)


def test_rates_come_from_readable_headers(tmp_path: Path) -> None:
    root = layout(tmp_path / "a")
    (root / "wavs" / "r00.wav").write_bytes(b"broken")
    (root / "wavs" / "r01.wav").unlink()
    soundfile.write(root / "wavs" / "r02.wav", np.zeros(100), 8_000)
    assert sample_rates(open_ljspeech(root)) == {RATE: N_CLIPS - 3, 8_000: 1}
    shutil.rmtree(root / "wavs")
    (root / "wavs").mkdir()
    (root / "wavs" / "r00.wav").write_bytes(b"broken")
    assert sample_rates(open_ljspeech(root)) == {}


def test_paths_are_absolute_in_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = replace(PRESETS["asterisk"], audio_path="speech", codec_weights="w.npz")
    assert (study.audio_path, study.codec_weights) == (str(tmp_path / "speech"), os.path.abspath("w.npz"))
    assert replace(study, codec_weights="random").codec_weights == "random"


def test_codec_weights_as_the_codecs_spell_it() -> None:
    for line in (parser(SWEEP), tokenise.parser()):
        given = ["--tokenise"] if "--tokenise" in line.format_usage() else ["--plan"]
        assert line.parse_args([*given, "--codec-weights", "random"]).set == ["codec_weights=random"]
        assert line.parse_args(["--codec-weights=a=b", *given, "--set", "seed=1"]).set == [
            "codec_weights=a=b",
            "seed=1",
        ]
        assert line.parse_args([*given, "--preset", "local"]).set == []


def caveat(study: Study) -> str:
    found = _published(study)
    assert found is not None
    return found.caveat


def test_published_numbers_only_beside_their_own_setting() -> None:
    speech = PRESETS["speech_a100"]
    assert _published(speech) == Published("speech", "", CURVE_CLIPS)
    assert "random weights" in caveat(replace(speech, codec_weights="random"))
    assert "coded by dac" in caveat(replace(speech, codec="dac"))
    assert _published(PRESETS["asterisk"]) is None
    music = PRESETS["music_a100"]
    assert _published(music) == Published("music")
    assert "DAC has random weights" in caveat(replace(music, codec_weights="random"))
    assert "coded by encodec is not FMA coded by DAC" in caveat(replace(music, codec="encodec"))


def test_resampling_is_said() -> None:
    assert _resampled({8_000: 64}, 8_000) == ", no resampling"
    assert _resampled({44_100: 64}, 24_000) == ", resampled"
    assert "above 4,000 Hz it holds nothing where files are at 8,000 Hz" in _resampled({22_050: 3, 8_000: 1}, 24_000)
    assert _resampled({}, 24_000) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "speach_a100"], "preset 'speach_a100' is not known; did you mean speech_a100?"),
        (["--actors", "0"], "actors=0 code nothing"),
        (["--preset", "speech_a100"], "--set audio_path=PATH"),
    ],
)
def test_tokenising_refuses_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenise.main(["--tokenise", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_incomplete_grid_is_said() -> None:
    study = replace(PRESETS["asterisk"], architectures=("la", "gdn"), lr=(1e-3, 2e-3), seeds=(0, 1))
    identities = [c.identity() for c in SWEEP.plan(study)]
    cells = [PublishedCell(str(i), identity, pd.DataFrame(), (), "", {}) for i, identity in enumerate(identities)]
    assert _missing(cells, study) == []
    assert _missing([c for c in cells if (c.identity["lr"], c.identity["seed"]) != (2e-3, 1)], study) == [
        "la at lr 0.002",
        "gdn at lr 0.002",
    ]
    assert _missing([], replace(study, rungs=(20,))) == []
