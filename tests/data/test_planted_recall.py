"""The planted recall task, and token sets that no audio was coded for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.codec_shards import open_tokens
from data.planted_recall import RecallSpec, Symbols, recall_clip, recall_tokens
from data.token_batches import TokenClips

SPEC = RecallSpec(n_symbols=5, n_streams=3, segment=4, n_segments=3)


def test_the_answer_is_the_first_segment_and_nothing_later_tells_it() -> None:
    clips = np.stack([recall_clip(SPEC, i) for i in range(400)]).astype(int)
    assert clips.shape == (400, 3, SPEC.n_frames)
    body, query, answer = clips[..., :12].reshape(400, 3, 3, 4), clips[..., 12], clips[..., 13]
    assert (body == body[..., :1]).all()
    assert (query == SPEC.n_symbols).all()
    assert (answer == body[:, :, 0, 0]).all()
    for later in (1, 2):  # other segments agree with it by chance alone
        assert abs((answer == body[:, :, later, 0]).mean() - 1 / 5) < 0.05
    assert np.array_equal(recall_clip(SPEC, 7), recall_clip(SPEC, 7))
    with pytest.raises(ValueError, match="would not lie a segment back"):
        RecallSpec(n_segments=1)


def test_tokens_read_back_and_subsets_nest(tmp_path: Path) -> None:
    made = recall_tokens(SPEC, 60, str(tmp_path / "tokens"))
    assert open_tokens(made.folder).manifest == made.manifest
    assert made.manifest["n_tokens"] == 60 * 3 * SPEC.n_frames
    assert "planted" in made.manifest["codec"]["caveat"]
    clips = TokenClips(made, "train", holdout=0.2)
    for c in range(len(clips)):
        np.testing.assert_array_equal(clips.codes(c), recall_clip(SPEC, int(clips.clip_ids[c].split("-")[1])))
    small, large = clips.take(10), clips.take(25)
    assert set(small.clip_ids) < set(large.clip_ids) < set(clips.clip_ids)
    assert [small.codes(c).tolist() for c in range(10)] == [
        clips.codes(clips.clip_ids.index(name)).tolist() for name in small.clip_ids
    ]
    assert len(clips) == len(clips.take(len(clips))) > 40
    with pytest.raises(ValueError, match=f"this side has {len(clips)}"):
        clips.take(61)


def test_symbols_have_no_audio() -> None:
    codec = Symbols(SPEC)
    with pytest.raises(ValueError, match="nothing to decode"):
        codec.decode(recall_clip(SPEC, 0)[None])
    with pytest.raises(ValueError, match="nothing to encode"):
        codec.encode(np.zeros((1, 4), np.float32), 1)
