"""`--sample`: a checkpoint that stands alone, prompts, and every kind of bad input in one line."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from data.codec import Codec, CodecSpec, MelVQCodec
from data.melvq import MelVQ, MelVQSpec
from models.codec.model import build_codec_lm
from models.codec.presets import scale_config
from models.codec.sampling import Sampling, generate
from sweeps.codec.cells import LMCell
from sweeps.codec.checkpoint import FORMAT, checkpoint_facts, load_codec, load_model, read_checkpoint
from sweeps.codec.presets import PRESETS
from sweeps.codec.sample import main
from sweeps.codec.sweep import SWEEP
from sweeps.core.cells import UserError
from sweeps.ledger.storage import Store

SPEC = MelVQSpec(sample_rate=8_000, hop=128, n_mels=20, codebook_size=1024)
CONFIG = replace(scale_config("local", "mc_la"), d_model=16, n_layers=2, n_heads=2, d_ff=16, context=200)


def small_codec(seed: int = 0) -> MelVQCodec:
    g = torch.Generator().manual_seed(seed)
    centroids = 0.3 * torch.randn(8, 1024, 20, generator=g)
    return MelVQCodec(MelVQ(SPEC, torch.full((20,), -3.0), centroids))


def cell() -> LMCell:
    (first, *_) = SWEEP.plan(replace(PRESETS["local"], architectures=("mc_la",)))
    return first


def contents(codec: Codec | None = None, **changes: Any) -> bytes:
    models = {name: build_codec_lm(CONFIG, seed=seed).state_dict() for seed, name in enumerate(("raw", "ema"))}
    state = {"config": json.dumps(asdict(CONFIG)), **checkpoint_facts(cell(), codec or small_codec()), **models}
    sink = io.BytesIO()
    torch.save({name: value for name, value in (state | changes).items() if value is not None}, sink)
    return sink.getvalue()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "kept.pt"
    path.write_bytes(contents())
    return path


def run(checkpoint: Path, out: Path, *more: str) -> int:
    return main(["--sample", str(checkpoint), "--seconds", "0.32", "--n", "2", "--out", str(out), *more])


def test_a_bare_file_holds_model_and_codec(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, tmp_path / "a") == 0
    assert "stand-in" in capsys.readouterr().out
    state = read_checkpoint(checkpoint.read_bytes(), "x")
    codec = load_codec(state, "")
    assert codec.weights_hash == small_codec().weights_hash
    model = load_model(state, "ema")
    for name, p in build_codec_lm(CONFIG, seed=1).state_dict().items():
        assert torch.equal(model.state_dict()[name], p)
    assert torch.equal(load_model(state, "best").embedding, model.embedding)
    assert not torch.equal(load_model(state, "raw").embedding, model.embedding)
    waves = [soundfile.read(f)[0] for f in sorted((tmp_path / "a").glob("*.wav"))]
    assert [len(w) for w in waves] == [20 * 128] * 2
    made = generate(model, 20, batch=2, sampling=Sampling(temperature=0.9, top_k=100))
    assert np.abs(codec.decode(made.codes.numpy())[0].clip(-1, 1) - waves[0]).max() < 1e-3


def test_a_folder_on_any_storage(tmp_path: Path) -> None:
    store = Store("memory://samples-test")
    store.replace("KEY/model.pt", contents())
    for place in ("memory://samples-test/KEY", "memory://samples-test/KEY/", "memory://samples-test/KEY/model.pt"):
        assert main(["--sample", place, "--seconds", "0.1", "--n", "1", "--out", str(tmp_path / "b")]) == 0


OPTIONS = {
    "--temperature": "0",
    "--top-p": "0.5",
    "--repetition-penalty": "1.5",
    "--best-of": "3",
    "--top-k": "0",
    "--weights": "raw",
    "--seed": "1",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_samples(checkpoint: Path, tmp_path: Path, option: str) -> None:
    assert run(checkpoint, tmp_path / "plain") == run(checkpoint, tmp_path / "other", option, OPTIONS[option]) == 0
    plain, other = (sorted((tmp_path / name).glob("*.wav")) for name in ("plain", "other"))
    assert [len(soundfile.read(a)[0]) for a in other] == [20 * 128] * 2
    assert [a.read_bytes() for a in plain] != [b.read_bytes() for b in other]


def test_a_prompt_is_continued_at_the_codecs_rate(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tone = 0.3 * np.sin(np.arange(16_000) * 0.2)
    soundfile.write(tmp_path / "p16.wav", tone, 16_000)
    assert run(checkpoint, tmp_path / "c", "--prompt", str(tmp_path / "p16.wav")) == 0
    assert "prompt resampled from 16000 to 8000 Hz" in capsys.readouterr().out
    waves = [soundfile.read(f)[0] for f in sorted((tmp_path / "c").glob("*.wav"))]
    assert [len(w) for w in waves] == [(63 + 20) * 128] * 2
    assert not np.array_equal(waves[0][-20 * 128 :], waves[1][-20 * 128 :])


def bad_inputs(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    kept = tmp_path / "kept.pt"
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 8_000)
    soundfile.write(tmp_path / "long.wav", np.zeros(8_000 * 4), 8_000)
    (tmp_path / "text.wav").write_text("no audio")
    files = {
        "old": contents(format=None),
        "newer": contents(format="99"),
        "foreign": contents(config=json.dumps(asdict(replace(CONFIG, d_ff=24)))),
        "unknown": contents(config=json.dumps(asdict(CONFIG) | {"rotor": 1})),
        "other_codec": contents(melvq=None),
        "no_model": contents(raw=None),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
    (tmp_path / "bytes.pt").write_bytes(b"\0" * 50)
    return {
        "prompt longer than the context": (
            [str(kept), "--prompt", str(tmp_path / "long.wav")],
            "prompt of 250 frames plus 20 new ones exceed the context of 200 steps, which holds 193 frames",
        ),
        "too long": ([str(kept), "--seconds", "60"], "exceed the context of 200 steps"),
        "no length": ([str(kept), "--seconds", "0"], "seconds=0.0 gives no frame"),
        "prompt shorter than a frame": (
            [str(kept), "--prompt", str(tmp_path / "short.wav")],
            "clip of 100 samples is shorter than one frame of melvq (128 samples, 16.0 ms)",
        ),
        "prompt without audio": ([str(kept), "--prompt", str(tmp_path / "text.wav")], "text.wav"),
        "no prompt": ([str(kept), "--prompt", str(tmp_path / "absent.wav")], "absent.wav"),
        "another version": ([str(tmp_path / "old.pt")], f"of VERSION 1, this code reads VERSION {FORMAT}"),
        "a later version": ([str(tmp_path / "newer.pt")], f"of VERSION 99, this code reads VERSION {FORMAT}"),
        "another architecture": ([str(tmp_path / "foreign.pt")], "of another architecture than its configuration says"),
        "unknown architecture": ([str(tmp_path / "unknown.pt")], "fields rotor are not known"),
        "missing codec": ([str(tmp_path / "other_codec.pt")], "give that file with --codec-weights FILE"),
        "wrong codec": ([str(kept), "--codec-weights", str(tmp_path / "melvq.npz")], "here they are"),
        "absent codec": ([str(kept), "--codec-weights", str(tmp_path / "absent.npz")], "absent.npz does not exist"),
        "no checkpoint": ([str(tmp_path / "bytes.pt")], "is no checkpoint of this program"),
        "half a checkpoint": ([str(tmp_path / "no_model.pt")], "holds no model of codec_lm"),
        "nothing there": ([str(tmp_path / "nowhere")], "neither a checkpoint file nor a published cell"),
        "temperature": ([str(kept), "--temperature", "-1"], "temperature=-1.0"),
    }


def test_bad_input_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_codec(seed=5).model.save(tmp_path / "melvq.npz")
    for name, (arguments, message) in bad_inputs(tmp_path).items():
        seconds = [] if "--seconds" in arguments else ["--seconds", "0.32"]
        assert main(["--sample", *arguments, *seconds, "--n", "1", "--out", str(tmp_path / "o")]) == 2, name
        error = capsys.readouterr().err
        assert message in error, name
        assert error.count("\n") == 1, name


def test_random_weights_of_a_real_codec_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = CodecSpec(name="encodec", weights="random").load()
    state = read_checkpoint(contents(codec), "x")
    assert "melvq" not in state
    assert load_codec(state, "").weights_hash == codec.weights_hash
    with pytest.raises(UserError, match=r"absent\.th"):
        load_codec(state, "absent.th")
    described = json.loads(state["codec"]) | {"weights": "package"}

    def no_download(*arguments: Any, **options: Any) -> Any:
        raise OSError("no route")

    monkeypatch.setattr("encodec.EncodecModel.encodec_model_24khz", no_download)
    with pytest.raises(UserError, match=r"no weights for encodec .*--codec-weights FILE"):
        load_codec(state | {"codec": json.dumps(described)}, "")
