from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.codec_shards import Tokens
from data.pack import (
    SpecialTokens,
    TokenClips,
    epoch_batches,
    evaluation_batches,
    plan_epoch,
    planned_efficiency,
    token_batches,
)
from data.split import side_of


def write_tokens(folder: Path, lengths: list[list[int]], k: int = 2, v: int = 16, worst: int | None = None) -> Tokens:
    """Shards whose codes tell where they come from: codebook 0 holds the clip number mod v, codebook 1 the frame."""
    (folder / "shards").mkdir(parents=True)
    shards, number = [], 0
    for s, some in enumerate(lengths):
        rows = []
        for n in some:
            codes = np.stack([np.full(n, number % v), np.arange(n) % v]).astype(np.uint16)
            if worst is not None and number == 0:
                codes[0, 0] = worst
            rows.append(
                {"clip_id": f"r{number // 2}#{number % 2}", "recording_id": f"r{number // 2}", "text": f"t{number}",
                 "n_frames": n, "duration_s": n / 50, "chunk": number % 2, "n_chunks": 2, "codes": codes.ravel()}
            )  # fmt: skip
            number += 1
        table = pa.Table.from_pylist(rows)
        table = table.replace_schema_metadata({b"plumbline": b"{}"})
        pq.write_table(table, folder / "shards" / f"{s}.parquet")
        shards.append({"file": f"shards/{s}.parquet"})
    codec = {"codebook_size": v, "n_codebooks": k, "frame_rate_hz": 50.0}
    return Tokens(str(folder), {"codec": codec, "shards": shards, "n_clips": number})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    rng = np.random.default_rng(0)
    return write_tokens(tmp_path_factory.mktemp("t"), [rng.integers(5, 120, 30).tolist() for _ in range(7)])


@pytest.fixture(scope="module")
def clips(tokens: Tokens) -> TokenClips:
    return TokenClips(tokens, None)


def test_special_tokens_follow_the_codes() -> None:
    special = SpecialTokens(1024)
    assert (special.pad, special.bos, special.eos, special.vocabulary) == (1024, 1025, 1026, 1027)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=120), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99)
)
def test_every_clip_is_in_exactly_one_batch(lengths: list[int], batch_size: int, window: int, seed: int) -> None:
    length_C = np.array(lengths)
    group_C = np.arange(len(lengths)) // 10
    plan = plan_epoch(length_C, group_C, batch_size, seed=seed, epoch=1, window=window)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert max(len(b) for b in plan) <= batch_size
    n_windows = -(-len(np.unique(group_C)) // window)
    assert sum(len(b) < batch_size for b in plan) <= n_windows


def test_epochs_differ_and_repeat(clips: TokenClips) -> None:
    def key(**how: int) -> list[list[int]]:
        return [b.tolist() for b in epoch_batches(clips, 8, **how)]

    assert key(seed=1, epoch=2) == key(seed=1, epoch=2)
    assert len({str(key(seed=s, epoch=e)) for s in (0, 1) for e in (0, 1, 2)}) == 6


def test_batches_hold_the_clips_trimmed_and_padded(clips: TokenClips) -> None:
    seen = []
    for batch in token_batches(clips, 8, seed=3):
        assert batch.codes_BKT.shape[2] == int(batch.length_B.max())
        assert batch.real_tokens == 2 * int(batch.length_B.sum())
        assert batch.efficiency == batch.real_tokens / batch.codes_BKT.numel()
        for b, clip_id in enumerate(batch.clip_ids):
            clip = clips.clip_ids.index(clip_id)
            n = int(batch.length_B[b])
            assert n == clips.n_frames_C[clip]
            assert torch.equal(batch.codes_BKT[b, :, :n], torch.from_numpy(clips.codes(clip).astype(np.int64)))
            assert bool((batch.codes_BKT[b, :, n:] == 16).all())
            assert batch.texts[b] == clips.texts[clip]
        assert abs(batch.seconds - int(batch.length_B.sum()) / 50) < 1e-9
        seen += batch.clip_ids
    assert sorted(seen) == sorted(clips.clip_ids)


@pytest.mark.parametrize("start", [1, 7, 20])
def test_resuming_gives_the_rest_exactly(tokens: Tokens, start: int) -> None:
    whole = list(token_batches(TokenClips(tokens, None), 8, seed=5, epoch=1, max_frames=40))
    rest = list(token_batches(TokenClips(tokens, None), 8, seed=5, epoch=1, start=start, max_frames=40))
    assert len(rest) == len(whole) - start
    for a, b in zip(whole[start:], rest, strict=True):
        assert a.index == b.index
        assert a.clip_ids == b.clip_ids
        assert torch.equal(a.codes_BKT, b.codes_BKT)


def test_ranks_share_an_epoch_and_may_change_in_number(clips: TokenClips) -> None:
    alone = list(token_batches(clips, 8, seed=2))
    ranks = [list(token_batches(clips, 8, seed=2, rank=r, world_size=3)) for r in range(3)]
    assert len({len(r) for r in ranks}) == 1
    together = sorted((b for r in ranks for b in r), key=lambda b: b.index)
    assert [b.clip_ids for b in together] == [b.clip_ids for b in alone[: len(together)]]
    resumed = [b.index for r in range(2) for b in token_batches(clips, 8, seed=2, start=9, rank=r, world_size=2)]
    assert sorted(resumed) == list(range(9, 9 + len(resumed)))
    assert len(alone) - 9 - len(resumed) in (0, 1)


def test_bucketing_wastes_little_where_random_batches_waste_a_third(tokens: Tokens) -> None:
    rng = np.random.default_rng(1)
    length_C = rng.integers(80, 610, 3_000)
    plan = plan_epoch(length_C, np.arange(3_000) // 64, 24, seed=0, epoch=0)
    shuffled = rng.permutation(3_000)
    naive = [shuffled[a : a + 24] for a in range(0, 3_000, 24)]
    assert planned_efficiency(length_C, plan) > 0.9
    assert planned_efficiency(length_C, naive) < 0.65
    widths = [length_C[b].max() for b in plan]
    assert np.abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.25  # not from short to long


def test_long_clips_are_cropped_inside_themselves(clips: TokenClips) -> None:
    first, second = (list(token_batches(clips, 8, seed=0, epoch=e, max_frames=10)) for e in (0, 1))
    assert max(b.codes_BKT.shape[2] for b in first) == 10
    for batch in first:
        for b in range(len(batch.clip_ids)):
            frames = batch.codes_BKT[b, 1, : int(batch.length_B[b])]
            assert torch.equal(frames, (frames[0] + torch.arange(len(frames))) % 16)
    where = [{i: int(b.codes_BKT[j, 1, 0]) for b in e for j, i in enumerate(b.clip_ids)} for e in (first, second)]
    assert where[0] != where[1]


def test_sides_partition_by_recording(tokens: Tokens) -> None:
    train, validation = TokenClips(tokens, "train", holdout=0.3), TokenClips(tokens, "validation", holdout=0.3)
    assert set(train.recording_ids).isdisjoint(validation.recording_ids)
    assert sorted(train.clip_ids + validation.clip_ids) == sorted(TokenClips(tokens, None).clip_ids)
    assert {side_of(r, holdout=0.3) for r in validation.recording_ids} == {"validation"}


def test_evaluation_is_fixed_and_a_subset_does_not_depend_on_order(clips: TokenClips) -> None:
    some = [i for b in evaluation_batches(clips, 8, n_clips=20) for i in b.clip_ids]
    assert len(some) == len(set(some)) == 20
    assert some == [i for b in evaluation_batches(clips, 3, n_clips=20) for i in b.clip_ids]
    every = [i for b in evaluation_batches(clips, 8) for i in b.clip_ids]
    assert sorted(every) == sorted(clips.clip_ids)
    lengths = [int(n) for b in evaluation_batches(clips, 8) for n in b.length_B]
    assert lengths == sorted(lengths)


def test_errors_say_what_to_do(tokens: Tokens, clips: TokenClips, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token 16 in shards/0\.parquet is outside the codebook of 16"):
        TokenClips(write_tokens(tmp_path / "bad", [[9, 9]], worst=16), None).codes(1)
    with pytest.raises(ValueError, match=r"no clip of .* is in validation"):
        TokenClips(tokens, "validation", holdout=0.0)
    with pytest.raises(ValueError, match="cannot feed 50 workers"):
        next(token_batches(clips, 24, world_size=50))
    with pytest.raises(ValueError, match="rank=2"):
        next(token_batches(clips, 8, rank=2, world_size=2))
    with pytest.raises(ValueError, match="max_frames=0"):
        next(token_batches(clips, 8, max_frames=0))
    with pytest.raises(ValueError, match="batch_size=0"):
        next(token_batches(clips, 0))
    with pytest.raises(ValueError, match="batch_size=0"):
        next(evaluation_batches(clips, 0))
