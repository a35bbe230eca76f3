"""Token streams: exact order and restart, hold-out by identity, errors that name the place."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import embedded_text, shard_reader
from data._content import content_of
from data.token_shards import held_out_rows
from data.token_stream import EMBEDDED, PILE_HUB, CorruptShard, StreamUnavailable, TokenStream

ROW_LENGTH, T, ROWS = 24, 8, (70, 1, 130)


def write_shards(folder: Path, rows=ROWS, seed: int = 0) -> list[np.ndarray]:
    """Parquet shards of the hub's schema; returns each shard's tokens [N, ROW_LENGTH]."""
    rng = np.random.default_rng(seed)
    shards = []
    for i, n in enumerate(rows):
        tokens_NL = rng.integers(0, 50304, (n, ROW_LENGTH), dtype=np.int32)
        table = pa.table({"tokens": pa.array(list(tokens_NL), pa.list_(pa.int32()))})
        pq.write_table(table, folder / f"train-{i:05d}-of-{len(rows):05d}.parquet", row_group_size=17)
        shards.append(tokens_NL)
    return shards


@pytest.fixture
def parquet(tmp_path) -> tuple[TokenStream, list[np.ndarray]]:
    shards = write_shards(tmp_path)
    return TokenStream(source=str(tmp_path), context=T, holdout_every=4), shards


def read(stream: TokenStream, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(index of each sequence, tokens) by the plain iterator."""
    indices, blocks = [np.empty(0, np.int64)], [np.empty((0, stream.context), np.int32)]
    for first, tokens_ST in stream.sequences(start, use_ray=False):
        assert tokens_ST.dtype == np.int32
        indices.append(np.arange(first, first + len(tokens_ST)))
        blocks.append(tokens_ST)
    return np.concatenate(indices), np.concatenate(blocks)


def test_training_and_held_out_are_the_rows_cut_and_split_by_identity(parquet):
    stream, shards = parquet
    masks = [held_out_rows(f"train-{i:05d}-of-00003.parquet", len(s), 4) for i, s in enumerate(shards)]
    train = np.concatenate([s[~m, :T] for s, m in zip(shards, masks, strict=True)])
    held_out = np.concatenate([s[m, :T] for s, m in zip(shards, masks, strict=True)])
    indices, tokens_ST = read(stream)
    assert np.array_equal(indices, np.arange(stream.n_train()))
    assert np.array_equal(tokens_ST, train)
    assert np.array_equal(stream.eval_sequences(len(held_out)), held_out)
    assert np.array_equal(stream.eval_sequences(5), held_out[:5])
    assert 0.1 < len(held_out) / sum(ROWS) < 0.4


def test_hold_out_depends_on_shard_name_and_row_not_on_what_is_there(parquet, tmp_path):
    stream, _ = parquet
    before = stream.eval_sequences(10)
    few = tmp_path / "few"
    few.mkdir()
    for name in ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"):
        (few / name).symlink_to(tmp_path / name)
    assert np.array_equal(TokenStream(source=str(few), context=T, holdout_every=4).eval_sequences(10), before)
    rows = held_out_rows("a", 4000, 8)
    assert np.array_equal(held_out_rows("a", 100, 8), rows[:100])
    assert not np.array_equal(held_out_rows("b", 4000, 8), rows)
    assert abs(rows.mean() - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 4000) ** 0.5


def test_restart_at_every_index_gives_the_exact_tail(parquet):
    stream, _ = parquet
    _, whole = read(stream)
    for start in range(0, len(whole) + 1, 7):
        indices, tail = read(stream, start)
        assert np.array_equal(tail, whole[start:])
        assert not len(indices) or indices[0] == start
    assert len(read(stream, len(whole))[1]) == 0
    with pytest.raises(ValueError, match=f"start={len(whole) + 1} is past the end"):
        stream.sequences(len(whole) + 1)
    with pytest.raises(ValueError, match="start=-1 is negative"):
        stream.sequences(-1)


def test_row_groups_before_the_start_are_not_read(parquet, monkeypatch):
    stream, _ = parquet
    asked: list[list[int]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, row_groups, **kwargs):
        asked.append(list(row_groups))
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    start = stream.n_train() - 2
    assert len(read(stream, start)[1]) == 2
    assert asked == [[7]]  # 130 rows in groups of 17: the last two training rows are in the last group


def test_fingerprint_follows_the_data_not_the_place(parquet, tmp_path_factory):
    stream, _ = parquet
    elsewhere = tmp_path_factory.mktemp("copy")
    write_shards(elsewhere)
    copy = TokenStream(source=str(elsewhere), context=T, holdout_every=4)
    assert copy.fingerprint() == stream.fingerprint()
    other = TokenStream(source=str(elsewhere), context=T - 1, holdout_every=4)
    assert other.fingerprint() != stream.fingerprint()


def test_fingerprint_follows_every_byte_and_reads_a_file_once(parquet, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    stream, _ = parquet
    opened: list[str] = []
    real = LocalFileSystem.open
    monkeypatch.setattr(
        LocalFileSystem, "open", lambda self, path, *a, **k: opened.append(path) or real(self, path, *a, **k)
    )
    cache = tmp_path / "cache"
    before = stream.fingerprint(cache)
    assert len(opened) == 3
    assert stream.fingerprint(cache) == before == stream.fingerprint()
    assert len(opened) == 6  # without a cache they are read again
    shard = tmp_path / "train-00002-of-00003.parquet"
    data, age = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    data[100] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(age + 1_000_000, age + 1_000_000))
    assert stream.fingerprint(cache) != before
    assert len(opened) == 7


def test_content_is_named_by_the_store_where_it_can():
    class Listing:
        def __init__(self, **info: object) -> None:
            self.info = lambda path: {"size": 3, **info}

        def open(self, path: str, mode: str) -> None:
            raise AssertionError("the file was read")

    assert content_of(Listing(ETag='"5d41-2"', mtime=1.0), "bucket/a") == 'etag "5d41-2"'
    assert content_of(Listing(etag="x"), "bucket/a") == "etag x"
    assert content_of(Listing(lfs={"sha256": "ab", "size": 3}), "hub/a") == "sha256 ab"


@pytest.mark.parametrize("damage", ["footer", "page", "column", "short", "null"])
def test_corrupt_shard_is_named_or_skipped_with_a_gap(parquet, tmp_path, damage):
    stream, _ = parquet
    _, whole = read(stream)
    path = tmp_path / "train-00000-of-00003.parquet"
    n_first = stream.n_train() - int(
        sum((~held_out_rows(f"train-{i:05d}-of-00003.parquet", ROWS[i], 4)).sum() for i in (1, 2))
    )
    data = bytearray(path.read_bytes())
    if damage == "footer":
        path.write_bytes(data[:-40])
    elif damage == "page":
        data[4:200] = b"\xff" * 196
        path.write_bytes(data)
    elif damage == "column":
        pq.write_table(pa.table({"text": ["a"]}), path)
    else:
        cell = [1, 2] if damage == "short" else None
        rows = [list(range(ROW_LENGTH))] * 30 + [cell]
        pq.write_table(pa.table({"tokens": pa.array(rows, pa.list_(pa.int32()))}), path)
    fatal = TokenStream(source=str(tmp_path), context=T, holdout_every=4)
    from data import token_shards, token_stream

    token_stream._open.cache_clear()
    token_shards._n_rows.cache_clear()
    with pytest.raises(CorruptShard, match="train-00000-of-00003"):
        read(fatal)
    lenient = TokenStream(source=str(tmp_path), context=T, holdout_every=4, on_corrupt="skip")
    reader = lenient.sequences(use_ray=False)
    with pytest.warns(UserWarning, match="skipped: shard train-00000-of-00003"):
        got = np.concatenate([tokens_ST for _, tokens_ST in reader])
    assert len(reader.corrupt) == 1
    assert "train-00000-of-00003" in reader.corrupt[0]
    assert np.array_equal(got[len(got) - (len(whole) - n_first) :], whole[n_first:])
    with pytest.warns(UserWarning, match="skipped"):
        indices, _ = read(lenient)
    if damage == "page":  # the footer still counts the rows: what follows keeps its numbers
        assert np.array_equal(indices[-(len(whole) - n_first) :], np.arange(n_first, len(whole)))
    assert lenient.eval_sequences(3).shape == (3, T)


def test_stream_too_short_says_by_how_much(parquet):
    stream, _ = parquet
    n = stream.n_train()
    stream.require(n * T, 10)
    with pytest.raises(
        ValueError, match=rf"has {n * T:,} training tokens and \d+ held-out.*needs {n * T + 1:,} and 10"
    ):
        stream.require(n * T + 1, 10)
    with pytest.raises(ValueError, match="needs 8 and 5,000"):
        stream.require(8, 5000)
    with pytest.raises(ValueError, match="fewer than the 5,000 asked for"):
        stream.eval_sequences(5000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(source="x", context=1), "context=1"),
        (dict(source="x", holdout_every=1), "holdout_every=1"),
        (dict(source="x", on_corrupt="ignore"), "on_corrupt=ignore"),
        (dict(source=EMBEDDED), "embedded text needs a tokenizer"),
        (dict(source="x", tokenizer="byte"), "tokenized already"),
    ],
)
def test_bad_descriptions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenStream(**fields)


def test_missing_or_empty_directory_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.parquet|does not exist"):
        TokenStream(source=str(tmp_path / "nowhere")).n_train()
    with pytest.raises(ValueError, match=r"holds no \*\.parquet"):
        TokenStream(source=str(tmp_path)).n_train()


def test_hub_without_network_names_the_preset_that_works(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StreamUnavailable, match="--preset local"):
        TokenStream(source=PILE_HUB).n_train()


def test_embedded_bytes_hold_exactly_the_training_documents():
    stream = TokenStream(source=EMBEDDED, tokenizer="byte", context=64)
    _, tokens_ST = read(stream)
    train_N, heldout_N = embedded_text.byte_corpus()
    assert 0 <= len(train_N) - tokens_ST.size < 64 * embedded_text.N_SHARDS
    kept = np.bincount(tokens_ST.ravel(), minlength=257)
    assert (kept <= np.bincount(train_N, minlength=257)).all()
    for start in (0, 1, 777, len(tokens_ST) - 5, len(tokens_ST)):
        assert np.array_equal(read(stream, start)[1], tokens_ST[start:])
    held = {row.tobytes() for row in heldout_N[: len(heldout_N) // 64 * 64].astype(np.int32).reshape(-1, 64)}
    assert {row.tobytes() for row in stream.eval_sequences(50)} <= held
    assert np.array_equal(stream.eval_sequences(50)[:20], stream.eval_sequences(20))


def test_embedded_text_with_a_hugging_face_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = {chr(c): c - 31 for c in range(32, 127)} | {"<|endoftext|>": 0}
    words = Tokenizer(models.WordLevel(characters, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.save(str(tmp_path / "tokenizer.json"))
    stream = TokenStream(source=EMBEDDED, tokenizer=str(tmp_path), context=32)
    first, tokens_ST = next(stream.sequences(5, use_ray=False))
    assert first == 5
    assert tokens_ST.shape[1] == 32
    assert tokens_ST.max() < 96
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    same = TokenStream(source=EMBEDDED, tokenizer=str(copy), context=32)
    assert same.fingerprint() == stream.fingerprint()
    assert TokenStream(source=EMBEDDED, tokenizer="byte", context=32).fingerprint() != stream.fingerprint()


def test_ray_data_prints_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars, and no advice on memory that reading tasks do not reserve: the screen is the launch's."""
    import ray.data

    class Nothing:
        def iter_batches(self, **how: object) -> list[object]:
            return []

    seen = []
    monkeypatch.setattr(
        ray.data, "read_datasource", lambda source, **how: seen.append(ray.data.DataContext.get_current()) or Nothing()
    )
    assert list(shard_reader._tables_in_order([])) == []
    (settings,) = seen
    assert settings.issue_detectors_config.detectors == []
    assert not settings.enable_progress_bars
    assert len(settings.custom_execution_callback_classes) == 1  # the pause of its loop
    assert ray.data.DataContext.get_current().issue_detectors_config.detectors  # other pipelines keep theirs
