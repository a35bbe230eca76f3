"""Which recording each held-out clip was cut from reaches the tables that intervals are drawn from."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from analysis.codec.scores import CodebookScores
from data.audio_io import recording_of
from data.codec import MelVQCodec
from data.codec_shards import save_codes
from data.melvq import MelVQ, MelVQSpec
from data.token_batches import TokenClips
from sweeps.codec.clip_tables import clip_table, with_recordings


def test_a_clip_names_its_recording() -> None:
    assert recording_of("LJ001-0001#0") == "LJ001-0001"
    assert recording_of("a#1#12") == "a#1"
    assert recording_of("recall-000001") == "recall-000001"
    assert recording_of("no#number") == "no#number"


def test_published_clips_carry_their_recording(tmp_path: Path) -> None:
    codec = MelVQCodec(
        MelVQ(MelVQSpec(n_mels=8, n_codebooks=2, codebook_size=16), torch.zeros(8), torch.zeros(2, 16, 8))
    )
    codes = {f"c{i}": np.zeros((2, 9 - i), dtype=np.uint16) for i in range(4)}
    clips = TokenClips(save_codes("made up", codec, codes, str(tmp_path / "t")), None)
    clips.recording_ids = ["r0", "r1", "r0", "r1"]
    scores = CodebookScores(2)
    scores.add({name: np.ones((4, 2)) for name in ("nll", "uniform", "count", "top1", "top5")})
    table = pd.read_parquet(io.BytesIO(clip_table({"ema": scores}, clips, 4, {"shuffled": scores})))
    assert dict(zip(table["clip_id"], table["recording_id"], strict=True)) == dict(
        zip(clips.clip_ids, clips.recording_ids, strict=True)
    )
    assert with_recordings(table) is table


def test_ledgers_from_before_are_read() -> None:
    old = pd.DataFrame({"clip_id": ["a#0", "a#1", "b#0"], "nll": 1.0})
    assert list(with_recordings(old)["recording_id"]) == ["a", "a", "b"]
