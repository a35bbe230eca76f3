"""Shards read in order, in this process or through Ray Data; both give the same pieces.

Each shard yields `Sequences`, then one `ShardEnd` that carries its count and what went wrong, so that an error
surfaces at its place in the order rather than when a task ahead of the consumer meets it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data._launched import check
from data.token_shards import CorruptShard, Shards, StreamUnavailable

_BLOCK_BYTES = 2 * 2**20  # small, so that the first piece comes soon and a task holds little
_READ_TASKS = 2  # one is read while the other is consumed
_PAUSE_SECONDS = 0.05  # of Ray Data's loop after each turn, which takes 1 to 2 ms
_CPUS_PER_READ = 0.02  # reading mostly waits: it must not take a core from training


@dataclass(frozen=True)
class Sequences:
    """Training sequences ``rank``, rank+1, … of a shard; tokens int32 [S, T]."""

    shard: int
    rank: int
    tokens_ST: np.ndarray


@dataclass(frozen=True)
class ShardEnd:
    """After a shard's last piece: how many training sequences it has, and the error that cut it short."""

    shard: int
    n_train: int
    corrupt: str = ""
    unavailable: str = ""


Piece = Sequences | ShardEnd


def read_shard(shards: Shards, shard: int, rank: int) -> Iterator[Piece]:
    """The pieces of one shard from ``rank`` on; its errors travel in the ShardEnd."""
    n_train = 0
    try:
        n_train = shards.n_train(shard)
        for first, tokens_ST in shards.train(shard, rank):
            yield Sequences(shard, first, tokens_ST)
    except CorruptShard as error:
        yield ShardEnd(shard, n_train, corrupt=str(error))
    except StreamUnavailable as error:
        yield ShardEnd(shard, n_train, unavailable=str(error))
    else:
        yield ShardEnd(shard, n_train)


def in_process(shards: Shards, shard: int, rank: int, context: int) -> Generator[Piece]:
    """Pieces from (shard, rank) to the end of the stream, read here."""
    for s in range(shard, len(shards.names)):
        yield from read_shard(shards, s, rank if s == shard else 0)


def through_ray(shards: Shards, shard: int, rank: int, context: int) -> Generator[Piece]:
    """`in_process`, read by Ray Data: one task per shard, at most two running, order preserved.

    Memory: Ray holds a few blocks of 2 MiB per task; ``Dataset`` has neither skip nor iterator state, so restarting is
    the datasource's own (it makes no task for a shard before ``shard``).
    """
    if shard >= len(shards.names):
        return
    tables = _tables_in_order(
        [_ReadShard(shards, s, rank if s == shard else 0, context) for s in range(shard, len(shards.names))]
    )
    try:
        for table in tables:
            yield from _pieces(table)
    finally:
        close = getattr(tables, "close", None)
        if close is not None:
            close()


@dataclass(frozen=True)
class _ReadShard:
    shards: Shards
    shard: int
    rank: int
    context: int

    def __call__(self) -> Iterator[pa.Table]:
        check()
        for piece in read_shard(self.shards, self.shard, self.rank):
            yield _table(piece, self.context)


def _tables_in_order(reads: Sequence[_ReadShard]) -> Iterator[pa.Table]:
    """The tables of each read, in the order of `reads`, each read being one task of Ray Data."""
    import ray
    from ray.data import DataContext, Datasource, ReadTask
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data.block import BlockMetadata

    class ShardSource(Datasource):
        def get_name(self) -> str:
            return "TokenShards"

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            files = [(read.shards.names[read.shard],) for read in reads]
            return [
                ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=file, exec_stats=None))
                for read, file in zip(reads, files, strict=True)
            ]

    class Pause(ExecutionCallback):
        """Ray Data's loop takes a whole core of this process while read blocks wait to be consumed."""

        def on_execution_step(self, executor: Any) -> None:
            time.sleep(_PAUSE_SECONDS)

    settings = DataContext.get_current().copy()
    settings.execution_options.preserve_order = True
    settings.target_max_block_size = _BLOCK_BYTES
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    settings.custom_execution_callback_classes.append(Pause)
    settings.issue_detectors_config.detectors = []  # after 30 s one prints 18 lines on memory that is not reserved
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # these would announce that progress bars are off, and that nothing is left of the processors that the packs hold
    for name in ("progress", "execution.resource_manager"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)
    with DataContext.current(settings):
        dataset = ray.data.read_datasource(
            ShardSource(),
            override_num_blocks=len(reads),
            concurrency=min(_READ_TASKS, len(reads)),
            num_cpus=_CPUS_PER_READ,
        )
        return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))


def _table(piece: Piece, context: int) -> pa.Table:
    """One row per sequence; a ShardEnd is one row of zeros whose ``n_train`` is not −1."""
    if isinstance(piece, Sequences):
        tokens_ST = np.ascontiguousarray(piece.tokens_ST, dtype=np.int32)
        ranks = np.arange(piece.rank, piece.rank + len(tokens_ST), dtype=np.int64)
        n_train, corrupt, unavailable = -1, "", ""
    else:
        tokens_ST, ranks = np.zeros((1, context), np.int32), np.array([-1], dtype=np.int64)
        n_train, corrupt, unavailable = piece.n_train, piece.corrupt, piece.unavailable
    n = len(ranks)
    return pa.table(
        {
            "shard": pa.array(np.full(n, piece.shard, np.int32)),
            "rank": pa.array(ranks),
            "n_train": pa.array(np.full(n, n_train, np.int64)),
            "corrupt": pa.array([corrupt] * n, pa.string()),
            "unavailable": pa.array([unavailable] * n, pa.string()),
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens_ST.ravel()), context),
        }
    )


def _pieces(table: pa.Table) -> Iterator[Piece]:
    """Undo `_table`, whatever blocks Ray has merged or cut."""
    table = table.combine_chunks()
    shard, rank, n_train = (table.column(name).to_numpy() for name in ("shard", "rank", "n_train"))
    column = table.column("tokens").combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    tokens_ST = column.flatten().to_numpy().reshape(len(shard), -1)
    jumps = np.flatnonzero((np.diff(shard) != 0) | (np.diff(rank) != 1) | (n_train[1:] >= 0)) + 1
    for start, stop in zip([0, *jumps], [*jumps, len(shard)], strict=True):
        if n_train[start] >= 0:
            corrupt, unavailable = (table.column(c)[int(start)].as_py() for c in ("corrupt", "unavailable"))
            yield ShardEnd(int(shard[start]), int(n_train[start]), corrupt, unavailable)
        else:
            yield Sequences(int(shard[start]), int(rank[start]), tokens_ST[start:stop])
