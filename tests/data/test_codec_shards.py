from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from data import codec_shards
from data.audio_io import AudioSet
from data.codec import CodecSpec
from data.codec_shards import Actors, open_tokens, tokenise
from data.ljspeech import open_ljspeech
from data.melvq import MelVQ, MelVQSpec
from data.synthetic_speech import SpeechSpec, write_ljspeech

HOW = {"chunk_s": 1.0, "min_s": 0.5, "recordings_per_shard": 3}


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> CodecSpec:
    generator = torch.Generator().manual_seed(0)
    model = MelVQ(MelVQSpec(n_mels=20, n_codebooks=3, codebook_size=32), torch.zeros(20),
                  torch.randn(3, 32, 20, generator=generator))  # fmt: skip
    return CodecSpec(name="melvq", weights=str(model.save(tmp_path_factory.mktemp("codec") / "m.npz")))


@pytest.fixture
def audio(tmp_path: Path) -> AudioSet:
    root = write_ljspeech(SpeechSpec(min_s=0.9, max_s=2.8), 8, tmp_path / "lj")
    (root / "wavs" / "SYN000-00004.wav").write_bytes(b"broken")
    soundfile.write(root / "wavs" / "unlisted.wav", np.zeros(16_000), 16_000)
    return open_ljspeech(root, nominal_rate=16_000)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "shards").iterdir())}


def test_tokens_are_what_the_codec_gives_and_odd_files_are_listed(
    audio: AudioSet, codec: CodecSpec, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    tokens = tokenise(audio, codec, str(out), actors=None, **HOW)
    assert tokens.computed == 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(tokens.manifest)) == open_tokens(str(out)).manifest
    assert manifest["odd"] == {"metadata (skipped)": 1, "unreadable (skipped)": 1}
    assert {o.recording_id for o in tokens.oddities} == {"SYN000-00004", "unlisted"}
    loaded = codec.load()
    assert manifest["codec"]["weights_hash"] == loaded.weights_hash
    assert "stand-in" in manifest["codec"]["caveat"]
    wave, _ = soundfile.read(audio.files.root / "wavs" / "SYN000-00001.wav", dtype="float32")
    table = pq.read_table(out / manifest["shards"][0]["file"]).to_pylist()
    rows = [r for r in table if r["recording_id"] == "SYN000-00001"]
    for row in rows:
        piece = wave[row["chunk"] * 16_000 : (row["chunk"] + 1) * 16_000]
        expected = loaded.encode(piece[None], 16_000)[0]
        assert np.array_equal(np.array(row["codes"]).reshape(3, -1), expected)
        assert row["n_frames"] == expected.shape[1]
        assert row["duration_s"] == len(piece) / 16_000
        assert row["n_chunks"] == len(rows)
    assert manifest["n_frames"] == sum(s["n_frames"] for s in manifest["shards"])
    assert manifest["n_tokens"] == 3 * manifest["n_frames"]


def test_a_killed_run_continues_and_computes_only_what_is_missing(
    audio: AudioSet, codec: CodecSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    tokenise(audio, codec, str(whole), actors=None, **HOW)

    out = tmp_path / "out"
    real = codec_shards.make_shard
    made: list[str] = []

    def dies_at_the_second(*args: object) -> bytes:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(args[1].file)  # type: ignore[attr-defined]
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(codec_shards, "make_shard", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        tokenise(audio, codec, str(out), actors=None, **HOW)
    with pytest.raises(FileNotFoundError, match="to its end"):
        open_tokens(str(out))
    first = (out / made[0]).stat().st_mtime_ns
    monkeypatch.setattr(codec_shards, "make_shard", real)
    assert tokenise(audio, codec, str(out), actors=None, **HOW).computed == 2
    assert (out / made[0]).stat().st_mtime_ns == first
    assert shard_bytes(out) == shard_bytes(whole)
    assert tokenise(audio, codec, str(out), actors=None, **HOW).computed == 0


def test_a_full_disk_leaves_no_partial_shard(
    audio: AudioSet, codec: CodecSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tokenise(audio, codec, str(tmp_path / "out"), actors=None, **HOW)
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_new_recordings_add_a_shard_and_keep_the_others(audio: AudioSet, codec: CodecSpec, tmp_path: Path) -> None:
    fewer = replace(audio, recordings=audio.recordings[:6])
    tokenise(fewer, codec, str(tmp_path / "t"), actors=None, **HOW)
    assert tokenise(audio, codec, str(tmp_path / "t"), actors=None, **HOW).computed == 1


def test_another_codec_or_chunking_needs_another_folder(audio: AudioSet, codec: CodecSpec, tmp_path: Path) -> None:
    out = str(tmp_path / "t")
    tokenise(audio, codec, out, actors=None, **HOW)
    with pytest.raises(ValueError, match=r"another chunk_s \(chunk_s: 1\.0 not 0\.8\); choose another folder"):
        tokenise(audio, codec, out, actors=None, **{**HOW, "chunk_s": 0.8})
    model = MelVQ.load(str(codec.weights))
    other = MelVQ(model.spec, model.mean_M + 1, model.centroids_KVM).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="another codec"):
        tokenise(audio, CodecSpec(name="melvq", weights=str(other)), out, actors=None, **HOW)


def test_damage_and_emptiness_are_named(audio: AudioSet, codec: CodecSpec, tmp_path: Path) -> None:
    out = tmp_path / "t"
    tokens = tokenise(audio, codec, str(out), actors=None, **HOW)
    (out / tokens.manifest["shards"][1]["file"]).write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"00001-.*is damaged.*delete it"):
        tokenise(audio, codec, str(out), actors=None, **HOW)
    with pytest.raises(ValueError, match="lists no recordings"):
        tokenise(replace(audio, recordings=()), codec, str(tmp_path / "u"), actors=None, **HOW)
    with pytest.raises(ValueError, match="shorter than one frame"):
        tokenise(audio, codec, str(tmp_path / "u"), actors=None, chunk_s=1.0, min_s=0.001)


def test_an_object_store_holds_the_same_shards(audio: AudioSet, codec: CodecSpec, tmp_path: Path) -> None:
    tokens = tokenise(audio, codec, "memory://tokens", actors=None, **HOW)
    local = tokenise(audio, codec, str(tmp_path / "t"), actors=None, **HOW)
    assert tokens.manifest == local.manifest
    file = local.manifest["shards"][0]["file"]
    assert codec_shards.Folder("memory://tokens").read(file) == (tmp_path / "t" / file).read_bytes()


@pytest.mark.slow
def test_ray_actors_make_the_same_bytes(audio: AudioSet, codec: CodecSpec, tmp_path: Path) -> None:
    import ray

    plain = tokenise(audio, codec, str(tmp_path / "plain"), actors=None, **HOW)
    ray.init(address="local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False)
    try:
        tokens = tokenise(audio, codec, str(tmp_path / "ray"), actors=Actors(2), **HOW)
    finally:
        ray.shutdown()
    assert tokens.computed == 3
    assert tokens.manifest == plain.manifest
    assert shard_bytes(tmp_path / "ray") == shard_bytes(tmp_path / "plain")
