"""Token ids are integers in range or refused with file, row and value; what lies after the cut is not checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.token_ids import bad_id
from data.token_stream import CorruptShard, TokenStream

GOOD = [list(range(12))] * 5


def stream_of(folder: Path, rows: list[Any], kind: pa.DataType) -> TokenStream:
    pq.write_table(pa.table({"tokens": pa.array(rows, kind)}), folder / "s-0.parquet")
    return TokenStream(source=str(folder), context=8, holdout_every=2**60)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (2**32 + 5, pa.int64(), "token 4294967301; token ids are integers"),
        (2**63 + 1, pa.uint64(), "token 9223372036854775809;"),
        (-3, pa.int32(), "token -3;"),
        (3.7, pa.float64(), "token 3.7 of type double"),
        (float("nan"), pa.float32(), "token nan of type float"),
        ("5", pa.string(), "token '0' of type string"),
        (None, pa.int32(), "an empty token"),
    ],
)
@pytest.mark.parametrize("length", [-1, 12])
def test_an_id_that_is_no_integer_in_range_is_refused_with_file_row_and_value(
    tmp_path: Path, value: Any, kind: pa.DataType, said: str, length: int
) -> None:
    odd = [0, 1, 2, 3, value, *range(5, 12)]
    rows = [*GOOD, odd]
    row = 5
    if pa.types.is_string(kind):
        rows, row = [[str(v) for v in r] for r in rows], 0
    stream = stream_of(tmp_path, rows, pa.list_(kind, length))
    with pytest.raises(CorruptShard) as caught:
        list(stream.sequences(use_ray=False))
    assert f"s-0.parquet of {tmp_path} row {row} has {said}" in str(caught.value)
    lenient = TokenStream(source=str(tmp_path), context=8, holdout_every=2**60, on_corrupt="skip")
    with pytest.warns(UserWarning, match="skipped: shard s-0"):
        assert not list(lenient.sequences(use_ray=False))


def test_integers_stored_as_floats_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(CorruptShard, match=r"row 0 has token 0\.0 of type double"):
        next(stream_of(tmp_path, GOOD, pa.list_(pa.float64())).sequences(use_ray=False))


def test_scalars_and_empty_cells_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptShard, match=r"s-0\.parquet of .* has tokens of type int64; expected a list"):
        next(stream_of(tmp_path, [1, 2], pa.int64()).sequences(use_ray=False))
    with pytest.raises(CorruptShard, match="row 5 has an empty cell"):
        next(stream_of(tmp_path, [*GOOD, None], pa.list_(pa.int32())).sequences(use_ray=False))


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint16(), pa.int32()])
def test_every_integer_type_gives_the_same_ids_and_the_rest_of_a_row_is_not_judged(
    tmp_path: Path, kind: pa.DataType
) -> None:
    rows = [[*range(10), None, 7], *GOOD]
    _, tokens_ST = next(stream_of(tmp_path, rows, pa.list_(kind)).sequences(use_ray=False))
    assert tokens_ST.dtype == np.int32
    assert np.array_equal(tokens_ST, np.tile(np.arange(8), (6, 1)))


def test_bad_id_of_the_limit_itself() -> None:
    assert bad_id(pa.array([0, 1023]), 1023) is None
    assert bad_id(pa.array([0, 1024, 9999]), 1023) == (1, "token 1024")
    assert bad_id(pa.array([], pa.float64())) is None
