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
from data.split import side_of
from data.token_batches import (
    SpecialTokens,
    TokenBatch,
    TokenClips,
    collate,
    epoch_batches,
    evaluation_batches,
    plan_epoch,
)


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


def batches(clips: TokenClips, seed: int, *, epoch: int = 0, frames: int | None = None) -> list[TokenBatch]:
    plan = epoch_batches(clips, 8, seed=seed, epoch=epoch)
    return [collate(clips, chosen.tolist(), i, frames, seed + epoch) for i, chosen in enumerate(plan)]


def test_special_tokens_follow_the_codes() -> None:
    special = SpecialTokens(1024)
    assert (special.pad, special.bos, special.vocabulary) == (1024, 1025, 1027)


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
    for batch in batches(clips, 3):
        assert batch.codes_BKT.shape[2] == int(batch.length_B.max())
        assert batch.real_tokens == 2 * int(batch.length_B.sum())
        for b, clip_id in enumerate(batch.clip_ids):
            clip = clips.clip_ids.index(clip_id)
            n = int(batch.length_B[b])
            assert n == clips.n_frames_C[clip]
            assert torch.equal(batch.codes_BKT[b, :, :n], torch.from_numpy(clips.codes(clip).astype(np.int64)))
            assert bool((batch.codes_BKT[b, :, n:] == 16).all())
            assert batch.texts[b] == clips.texts[clip]
        seen += batch.clip_ids
    assert sorted(seen) == sorted(clips.clip_ids)


def test_bucketing_wastes_little_where_random_batches_waste_a_third(tokens: Tokens) -> None:
    rng = np.random.default_rng(1)
    length_C = rng.integers(80, 610, 3_000)
    plan = plan_epoch(length_C, np.arange(3_000) // 64, 24, seed=0, epoch=0)
    shuffled = rng.permutation(3_000)
    naive = [shuffled[a : a + 24] for a in range(0, 3_000, 24)]
    computed = [sum(length_C[b].max() * len(b) for b in some) for some in (plan, naive)]
    assert length_C.sum() / computed[0] > 0.9
    assert length_C.sum() / computed[1] < 0.65
    widths = [length_C[b].max() for b in plan]
    assert np.abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.25  # not from short to long


def test_long_clips_are_cropped_inside_themselves(clips: TokenClips) -> None:
    first, second = (batches(clips, 0, epoch=e, frames=10) for e in (0, 1))
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
    for kind, value, said in (
        (pa.float64(), 3.7, r"token 3\.7 of type double in"),
        (pa.int32(), -1, "token -1 in"),
        (pa.int64(), 2**32 + 5, "token 4294967301 in"),
        (pa.int16(), None, "an empty token in"),
    ):
        odd = write_tokens(tmp_path / said, [[9, 9]])
        path = tmp_path / said / "shards" / "0.parquet"
        table = pq.read_table(path)
        codes = [[1] * 17 + [value], [1] * 18]
        at = table.schema.get_field_index("codes")
        pq.write_table(table.set_column(at, "codes", pa.array(codes, pa.list_(kind))), path)
        with pytest.raises(ValueError, match=rf"{said} shards/0\.parquet is outside the codebook of 16 \(row 0\)"):
            TokenClips(odd, None).codes(1)
    with pytest.raises(ValueError, match=r"no clip of .* is in validation"):
        TokenClips(tokens, "validation", holdout=0.0)
    with pytest.raises(ValueError, match="batch_size=0"):
        epoch_batches(clips, 0)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(evaluation_batches(clips, 0))
