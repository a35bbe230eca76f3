"""Shards of token sequences: Parquet rows cut to the context, or embedded text packed to it.

A shard is read by one task, from any rank, without touching the ones before it. Its training sequences are ranked
0, 1, …; which rows train and which are held out depends on identity (shard name and row, or document name) alone.

Shape suffixes: N rows, T context length.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import embedded_text
from data._content import content_of
from data._listing import skipped_line, visible
from data._places import CorruptShard, StreamUnavailable, filesystem_of, is_local, named_errors
from data.document_coder import Coder, coder_of
from data.token_ids import LARGEST_ID, bad_id, is_list

__all__ = [
    "DOCUMENT",
    "CorruptShard",
    "EmbeddedShards",
    "ParquetShards",
    "Shards",
    "StreamUnavailable",
    "embedded_order",
    "held_out_rows",
    "is_local",
    "middle_documents",
]

BLOCK_ROWS = 512
DOCUMENT = "document"
"""Column of a tokenised text's shards: the document of each sequence's middle token."""


class Shards(Protocol):
    """What a `data.token_stream.TokenStream` reads; picklable, so that a task can carry it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Shards in stream order."""

    @property
    def hidden(self) -> tuple[str, ...]:
        """Files with a shard's ending whose names exclude them (`data._listing`)."""

    def n_train(self, shard: int) -> int:
        """Training sequences of ``shard``."""

    def n_held_out(self, shard: int) -> int:
        """Held-out sequences of ``shard``."""

    def train(self, shard: int, rank: int) -> Iterator[tuple[int, np.ndarray]]:
        """(rank of the first, tokens int32 [n, T]) of the training sequences from ``rank`` on, in order."""

    def held_out(self, shard: int) -> Iterator[np.ndarray]:
        """Held-out sequences of ``shard``, int32 [n, T], in their fixed order."""

    def documents(self, shard: int) -> np.ndarray | None:
        """Of each held-out sequence of ``shard`` the document that its middle token is of, by a number (int64 [n]) that
        does not depend on the tokenizer; None where the shard does not tell."""

    def place(self, shard: int, rank: int, *, held_out: bool = False) -> str:
        """In words, where the training (or held-out) sequence ``rank`` of ``shard`` lies."""

    def fingerprint(self, cache: Path | None) -> str:
        """What the token sequences depend on, hashed; ``cache`` is a folder that keeps digests of files."""


def held_out_rows(shard_name: str, n_rows: int, every: int) -> np.ndarray:
    """bool [N]: the rows of a shard that are held out, one in ``every`` by hash of (shard name, row).

    The hash is SplitMix64 (Steele, Lea & Flood 2014) of the row, seeded by BLAKE2 of the name.
    """
    seed = int.from_bytes(hashlib.blake2b(shard_name.encode(), digest_size=8).digest(), "big")
    step = 0x9E3779B97F4A7C15
    z = np.uint64(seed) + np.arange(1, n_rows + 1, dtype=np.uint64) * np.uint64(step)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) % np.uint64(every) == 0


@dataclass(frozen=True)
class ParquetShards:
    """Parquet files with a column ``tokens`` (list<int32>); a sequence is a row's first ``context`` tokens.

    ``hidden`` are files whose names exclude them (`data._listing`). With ``by_column`` a column ``held_out`` (bool)
    says which rows are held out, in place of the hash (`data.text_shards` splits by document).
    """

    root: str
    names: tuple[str, ...]
    context: int
    holdout_every: int
    endpoint: str | None = None
    hidden: tuple[str, ...] = ()
    by_column: bool = False

    @classmethod
    def open(cls, source: str, context: int, holdout_every: int) -> ParquetShards:
        """List the shards of ``source`` (a directory, or any fsspec URI such as ``hf://datasets/…``)."""
        endpoint = os.environ.get("HF_ENDPOINT") if source.startswith("hf://") else None
        with named_errors(source):
            filesystem, root = filesystem_of(source, endpoint)
            found = sorted(path for path in filesystem.find(root) if path.endswith(".parquet"))
        names, hidden = visible(path[len(root) :].lstrip("/") for path in found)
        if not names:
            skipped = f" ({skipped_line(hidden, 'shard')})" if hidden else ""
            raise ValueError(f"stream {source} holds no *.parquet shard{skipped}; give the directory that does")
        return cls(source, tuple(names), context, holdout_every, endpoint, tuple(hidden))

    def n_train(self, shard: int) -> int:
        return int((~self._held_out_rows(shard)).sum())

    def n_held_out(self, shard: int) -> int:
        return int(self._held_out_rows(shard).sum())

    def train(self, shard: int, rank: int) -> Iterator[tuple[int, np.ndarray]]:
        rows = np.flatnonzero(~self._held_out_rows(shard))
        if rank < len(rows):
            for first_row, tokens_NT in self._rows(shard, int(rows[rank])):
                wanted = rows[rank : np.searchsorted(rows, first_row + len(tokens_NT))]
                if len(wanted):
                    yield rank, tokens_NT[wanted - first_row]
                    rank += len(wanted)

    def held_out(self, shard: int) -> Iterator[np.ndarray]:
        mask = self._held_out_rows(shard)
        for first_row, tokens_NT in self._rows(shard, 0):
            yield tokens_NT[mask[first_row : first_row + len(tokens_NT)]]

    def documents(self, shard: int) -> np.ndarray | None:
        if not self.by_column:  # ready-made tokens
            return None
        with named_errors(self.root, self.names[shard]), self.open_shard(shard) as file:
            if DOCUMENT not in file.schema_arrow.names:  # tokenised before there was this column
                return None
            document_N = file.read([DOCUMENT]).column(0).to_numpy()
        return document_N[self._held_out_rows(shard)]

    def place(self, shard: int, rank: int, *, held_out: bool = False) -> str:
        rows = np.flatnonzero(self._held_out_rows(shard) == held_out)
        return f"row {rows[rank]} of {self.names[shard]}"

    def fingerprint(self, cache: Path | None) -> str:
        filesystem, root = filesystem_of(self.root, self.endpoint)
        lines = [f"parquet {self.context} {self.holdout_every}"]
        for name in self.names:
            with named_errors(self.root, name):
                lines.append(f"{name} {content_of(filesystem, f'{root}/{name}', cache)}")
        identity = "\n".join(lines)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _held_out_rows(self, shard: int) -> np.ndarray:
        if self.by_column:
            return _held_out_column(self, shard)
        return held_out_rows(self.names[shard], _n_rows(self, shard), self.holdout_every)

    def open_shard(self, shard: int) -> pq.ParquetFile:
        """The shard's footer, read by byte ranges; nothing else is fetched yet."""
        filesystem, root = filesystem_of(self.root, self.endpoint)
        file = pq.ParquetFile(filesystem.open(f"{root}/{self.names[shard]}", "rb"), pre_buffer=False)
        if "tokens" not in file.schema_arrow.names:
            raise CorruptShard(
                f"shard {self.names[shard]} of {self.root} has no column tokens (it has "
                f"{', '.join(file.schema_arrow.names)}); expected tokens: list<int32>"
            )
        return file

    def _rows(self, shard: int, row: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, tokens [n, T]) from ``row`` on; row groups before it are not fetched."""
        with named_errors(self.root, self.names[shard]), self.open_shard(shard) as file:
            starts = np.cumsum([0] + [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
            group = int(np.searchsorted(starts, row, side="right")) - 1
            at = int(starts[group])
            batches = file.iter_batches(
                BLOCK_ROWS, row_groups=range(group, file.num_row_groups), columns=["tokens"], use_threads=False
            )
            for batch in batches:
                stop = at + batch.num_rows
                if stop > row:
                    skip = max(0, row - at)
                    tokens_NT = self._cut(batch.column(0)[skip:], shard, at + skip)
                    yield at + skip, tokens_NT
                at = stop

    def _cut(self, column: Any, shard: int, first_row: int) -> np.ndarray:
        where = f"shard {self.names[shard]} of {self.root}"
        if not is_list(column.type):
            raise CorruptShard(f"{where} has tokens of type {column.type}; expected a list of integers a row")
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            column = column.cast(pa.large_list(column.type.value_type))
        if column.null_count:
            empty = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise CorruptShard(f"{where} row {first_row + empty} has an empty cell in tokens; expected lists")
        offsets = column.offsets.to_numpy()
        short = np.flatnonzero(np.diff(offsets) < self.context)
        if len(short):
            length = int(np.diff(offsets)[short[0]])
            raise CorruptShard(
                f"{where} row {first_row + int(short[0])} has {length} tokens; context={self.context} needs as many: "
                "choose a shorter context or another stream"
            )
        places_NT = offsets[:-1, None] + np.arange(self.context)
        values = column.values
        if pa.types.is_integer(values.type) and not values.null_count:
            tokens_NT = values.to_numpy()[places_NT]
            if not tokens_NT.size or (tokens_NT.min() >= 0 and tokens_NT.max() <= LARGEST_ID):
                return tokens_NT.astype(np.int32, copy=False)
        # an empty or foreign value after the cut is no fault: only what is used is checked
        kept = values.take(pa.array(places_NT.ravel()))
        if wrong := bad_id(kept):
            row = first_row + wrong[0] // self.context
            raise CorruptShard(f"{where} row {row} has {wrong[1]}; token ids are integers of 0 … {LARGEST_ID}")
        return kept.to_numpy().reshape(places_NT.shape).astype(np.int32)


@lru_cache(maxsize=1024)
def _n_rows(shards: ParquetShards, shard: int) -> int:
    with named_errors(shards.root, shards.names[shard]), shards.open_shard(shard) as file:
        return file.metadata.num_rows


@lru_cache(maxsize=1024)
def _held_out_column(shards: ParquetShards, shard: int) -> np.ndarray:
    with named_errors(shards.root, shards.names[shard]), shards.open_shard(shard) as file:
        return file.read(["held_out"]).column(0).to_numpy().astype(bool)


@dataclass(frozen=True)
class EmbeddedShards:
    """`data.embedded_text` packed to ``context``: documents of one side of the split, separated, cut, shuffled.

    ``tokenizer`` is "byte" or a directory with tokenizer.json; where that begins every text with a token of its own
    (BOS), each sequence begins with it. The last, incomplete sequence of a shard is dropped.
    Sequences of a shard (some thirty documents) are permuted in a fixed way, so that neighbours in the stream
    are not neighbours in a file.
    """

    tokenizer: str
    context: int

    @property
    def hidden(self) -> tuple[str, ...]:
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"embedded-{i:02d}" for i in range(embedded_text.N_SHARDS))

    def n_train(self, shard: int) -> int:
        return len(_packed(self, shard)[0])

    def n_held_out(self, shard: int) -> int:
        return len(_packed(self, None)[0]) if shard == 0 else 0

    def train(self, shard: int, rank: int) -> Iterator[tuple[int, np.ndarray]]:
        tokens_NT, _ = _packed(self, shard)
        for first in range(rank, len(tokens_NT), BLOCK_ROWS):
            yield first, tokens_NT[first : first + BLOCK_ROWS]

    def held_out(self, shard: int) -> Iterator[np.ndarray]:
        if shard == 0:
            yield _packed(self, None)[0]

    def documents(self, shard: int) -> np.ndarray | None:
        return _packed(self, None)[1] if shard == 0 else np.empty(0, np.int64)

    def place(self, shard: int, rank: int, *, held_out: bool = False) -> str:
        return f"{'held-out' if held_out else 'training'} sequence {rank} of {self.names[shard]}"

    def fingerprint(self, cache: Path | None) -> str:
        digest = coder_of(self.tokenizer).digest
        identity = f"embedded {embedded_text.fingerprint()} {digest} {self.context}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def _packed(shards: EmbeddedShards, shard: int | None) -> tuple[np.ndarray, np.ndarray]:
    """All sequences [N, T] of a training shard, or of the whole held-out side (None), permuted, and of each the
    document that its middle token is of (near-duplicates are one document)."""
    documents = embedded_text.split(held_out=shard is None)
    if shard is not None:
        documents = tuple(d for d in documents if d.shard == shard)
    coder, groups = coder_of(shards.tokenizer), embedded_text.duplicate_groups()
    parts = coder.encode([d.text for d in documents])
    rows_NT = coder.packed(parts, shards.context)
    document_N = middle_documents(coder, parts, [groups[d.name] for d in documents], shards.context)
    order = embedded_order(len(rows_NT), shard)
    packed_NT = rows_NT[order]
    packed_NT.flags.writeable = False
    return packed_NT, document_N[order]


def middle_documents(coder: Coder, parts: Sequence[np.ndarray], numbers: Sequence[int], context: int) -> np.ndarray:
    """int64 [N]: of each packed sequence the number of the document that its middle token is of."""
    owners = [np.full(len(ids), number, np.int64) for ids, number in zip(parts, numbers, strict=True)]
    return coder.packed(owners, context, first=-1)[:, context // 2].astype(np.int64)


def embedded_order(n: int, shard: int | None) -> np.ndarray:
    """In which order the n packed sequences of a training shard, or of the held-out side (None), stand."""
    return np.random.default_rng(0 if shard is None else shard + 1).permutation(n)
