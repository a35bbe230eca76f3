"""Copies of shards: those under hidden names are no data, held-out rows that are trained on are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.token_stream import HeldOutText, TokenStream
from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings
from sweeps.sae import preflight
from sweeps.sae.presets import PRESETS
from sweeps.sae.sweep import SWEEP
from sweeps.sae.text import TextCheck

ROWS, LENGTH, T = 400, 24, 8


def write(path: Path, tokens_NL: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"tokens": pa.array(list(tokens_NL.astype(np.int32)), pa.list_(pa.int32()))}), path)
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path / "text" / "train-0.parquet", np.random.default_rng(0).integers(0, 999, (ROWS, LENGTH)))


def open_(folder: Path, **fields: int) -> TokenStream:
    from data import token_shards, token_stream

    token_stream._open.cache_clear()
    token_shards._n_rows.cache_clear()
    return TokenStream(source=str(folder), **{"context": T, "holdout_every": 4, **fields})  # type: ignore[arg-type]


def test_hidden_copies_are_no_shards_and_are_counted(shard: Path) -> None:
    folder = shard.parent
    alone = open_(folder)
    before = alone.fingerprint(), alone.n_train(), alone.eval_sequences(50)
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(shard, folder / ".ipynb_checkpoints" / "train-0-checkpoint.parquet")
    (folder / "._train-0.parquet").write_bytes(b"\0\5\x16\7 no parquet")
    (folder / "_temporary").mkdir()
    shutil.copy(shard, folder / "_temporary" / "part.parquet")
    stream = open_(folder)
    assert (stream.fingerprint(), stream.n_train()) == before[:2]
    assert np.array_equal(stream.eval_sequences(50), before[2])
    (line,) = SWEEP.remarks(PRESETS["fast2"], RunSettings(stream_path=str(folder)))
    assert line.startswith("stream_path: skipped 3 shards whose path has a part that begins with . or _: ._train-0")
    assert SWEEP.remarks(PRESETS["local"], RunSettings(stream_path=str(folder))) == []
    shard.unlink()
    with pytest.raises(ValueError, match=r"holds no \*\.parquet shard \(skipped 3 shards"):
        open_(folder).n_train()


def test_training_rows_that_are_held_out_elsewhere_are_told_exactly() -> None:
    held_out_ST = np.array([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    text = HeldOutText(held_out_ST)
    assert text.among(np.array([[1, 2, 4], [4, 5, 6], [4, 5, 6]])) == {1: 1}
    assert text.among(np.array([[9, 9, 9], [1, 2, 3]], np.int32)) == {0: 1, 2: 1}
    assert text.among(np.empty((0, 3), np.int32)) == {}


def test_a_copied_shard_ends_the_launch_before_any_pack_and_names_both_places(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(shard, shard.with_name("train-1.parquet"))
    stream = open_(shard.parent)
    check = TextCheck(stream, stream.eval_sequences(50), {"m": 999})
    with pytest.raises(UserError) as caught:
        preflight._read_once(stream, check, stream.n_train())
    line = str(caught.value)
    assert "held-out sequences of" in line
    assert "stand word for word in the training text (row " in line
    assert "of train-0.parquet is row " in line
    assert "of train-1.parquet)" in line
    assert "remove the shard that is a copy" in line


def test_few_repeats_are_counted_and_rows_that_are_not_trained_on_do_not_matter(shard: Path) -> None:
    alone = open_(shard.parent)
    held_out_ST, n_alone = alone.eval_sequences(60), alone.n_train()
    late = np.random.default_rng(1).integers(0, 999, (200, LENGTH))
    late[150:, :T] = held_out_ST[0]
    write(shard.with_name("train-1.parquet"), late)
    stream = open_(shard.parent)
    for sequences, line in ((n_alone, ""), (stream.n_train(), "1 of 60 held-out sequences of")):
        check = TextCheck(stream, held_out_ST, {"m": 999})
        preflight._read_once(stream, check, sequences)
        assert check.line().startswith(line)
        assert bool(check.line()) == bool(line)


def test_an_id_beyond_the_vocabulary_is_named_by_shard_and_row(shard: Path) -> None:
    tokens_NL = np.random.default_rng(2).integers(0, 999, (ROWS, LENGTH))
    tokens_NL[301, 3] = 1000
    write(shard, tokens_NL)
    stream = open_(shard.parent)
    with pytest.raises(
        UserError, match=r"token 1000 of .* exceeds the vocabulary of m, 999; choose .* row 301 of train-0"
    ):
        preflight._read_once(stream, TextCheck(stream, stream.eval_sequences(200 // 4), {"m": 999}), ROWS)
