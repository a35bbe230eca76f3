"""Token streams a sweep trains and evaluates on: exact order, exact restart, held-out rows by identity.

A `TokenStream` describes one stream; two equal descriptions give the same sequences in the same order on any
machine that has the same source. Training sequences are numbered 0, 1, 2, … through the shards in name order.
Starting at a number reads no more than the footers of the shards before it. A shard skipped as corrupt leaves a gap
in the numbers; it never renumbers the rest.

Shape suffixes: T context length, S sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from data import shard_reader
from data.token_shards import CorruptShard, EmbeddedShards, ParquetShards, Shards, StreamUnavailable, is_local

__all__ = [
    "EMBEDDED",
    "PILE_HUB",
    "CorruptShard",
    "HeldOutText",
    "SequenceReader",
    "StreamUnavailable",
    "TokenStream",
]

EMBEDDED = "embedded"
PILE_HUB = "hf://datasets/NeelNanda/pile-small-tokenized-2b/data"
"""The source study's stream: 89 Parquet shards, ``tokens`` of 1,024 GPT-NeoX ids per row."""


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """One stream of token sequences; frozen and picklable, identity only.

    source
        ``EMBEDDED``; ``PILE_HUB`` or another ``hf://datasets/…`` folder; a local directory or fsspec URI of
        ``*.parquet`` with a column ``tokens`` (list<int32>). The Hugging Face endpoint follows $HF_ENDPOINT.
    context
        T. A Parquet row gives its first T tokens (the study's "cut"); embedded documents are packed to T.
    tokenizer
        Embedded text only: ``"byte"`` or a directory with tokenizer.json.
    holdout_every
        Parquet only: one row in so many, by hash of (shard name, row), is held out. (Embedded text holds out
        about a tenth of its documents, near-duplicates together: `data.embedded_text`.)
    shards
        Parquet only: that many shards, in name order, of which a column ``held_out`` says what is held out: a text
        that `data.text_shards` tokenised so far. 0: all shards, held out by hash.
    on_corrupt
        ``"raise"`` stops at a corrupt shard and names it; ``"skip"`` warns, lists it and goes on.
    """

    source: str
    context: int = 256
    tokenizer: str | None = None
    holdout_every: int = 32
    shards: int = 0
    on_corrupt: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"context={self.context} leaves nothing to predict; choose context >= 2")
        if self.holdout_every < 2:
            raise ValueError(f"holdout_every={self.holdout_every} leaves nothing to train on; choose >= 2")
        if self.on_corrupt not in ("raise", "skip"):
            raise ValueError(f"on_corrupt={self.on_corrupt} is unknown; choose raise or skip")
        if (self.source == EMBEDDED) != (self.tokenizer is not None):
            raise ValueError(
                f"source={self.source} with tokenizer={self.tokenizer}: embedded text needs a tokenizer "
                "(byte or a directory), a Parquet stream is tokenized already"
            )

    def fingerprint(self, cache: Path | None = None) -> str:
        """Hash of what the sequences depend on: names and content of shards, or the embedded text and its tokenizer.

        Local shards are read whole for it, those in a bucket are named by their ETags. ``cache`` is a folder that keeps
        the digests of local files until they change. Raises CorruptShard where one cannot be read.
        """
        return self._shards().fingerprint(cache)

    def sequences(self, start: int = 0, *, use_ray: bool = True) -> SequenceReader:
        """Training sequences from number ``start`` on, as (first index, tokens int32 [S, T]) in order.

        ``use_ray`` reads through Ray Data, one task per shard, two at a time, on 0.02 CPU each, so that it runs at the
        same time as a trial that holds nearly all of the node. Without it this process reads the same blocks.
        Raises CorruptShard (named) unless ``on_corrupt="skip"``, StreamUnavailable without network.
        """
        shard, rank = self._place(start)
        return SequenceReader(self, self._shards(), shard, rank, start - rank, use_ray=use_ray)

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, rank within it) of training sequence ``index``; one past the last has a place, too."""
        if index < 0:
            raise ValueError(f"start={index} is negative; sequences are numbered from 0")
        first = 0
        shards = self._shards()
        for shard in range(len(shards.names)):
            count = self._count(shard) if index > first else 1
            if index < first + count:
                return shard, index - first
            first += count
        if index == first:
            return len(shards.names), 0
        raise ValueError(f"start={index} is past the end of {self.source}, which has {first:,} training sequences")

    def n_train(self) -> int:
        """Number of training sequences (Parquet: from the footers; embedded text: by tokenizing it)."""
        return sum(self._count(shard) for shard in range(len(self._shards().names)))

    def eval_sequences(self, n: int) -> np.ndarray:
        """The first ``n`` held-out sequences, int32 [n, T]: prefixes nest, training never sees them."""
        taken: list[np.ndarray] = []
        for _, _, block_ST in self._held_out():
            taken.append(block_ST[: n - sum(map(len, taken))])
            if sum(map(len, taken)) == n:
                return np.concatenate(taken)
        raise ValueError(
            f"stream {self.source} holds out {sum(map(len, taken)):,} sequences of {self.context} tokens, "
            f"fewer than the {n:,} asked for; use more shards or fewer evaluation sequences"
        )

    def held_out_documents(self, n: int) -> np.ndarray | None:
        """Of the first ``n`` of `eval_sequences` the document that each one's middle token is of, int64 [n].

        Numbers do not depend on the tokenizer. None where the stream does not tell: ready-made tokens, and shards that
        were tokenised before they held it.
        """
        shards, taken, count = self._shards(), [], 0
        for shard in range(len(shards.names)):
            document_N = shards.documents(shard)
            if document_N is None:
                return None
            taken.append(document_N)
            count += len(document_N)
            if count >= n:
                break
        return np.concatenate(taken)[:n]

    def held_out_place(self, number: int) -> str:
        """In words, where the held-out sequence ``number`` (from 0) of `eval_sequences` lies."""
        before = 0
        for shard, rank, block_ST in self._held_out():
            if number < before + len(block_ST):
                return self._shards().place(shard, rank + number - before, held_out=True)
            before += len(block_ST)
        raise ValueError(f"held-out sequence {number} of {self.source} does not exist; it has {before:,}")

    def training_place(self, index: int) -> str:
        """In words, where the training sequence ``index`` lies."""
        return self._shards().place(*self._place(index))

    def hidden(self) -> tuple[str, ...]:
        """Files below the source with a shard's ending whose names exclude them (`data._listing`)."""
        return self._shards().hidden

    @property
    def local(self) -> bool:
        """Whether its files lie on a disk of this machine, so that reading them all costs no requests."""
        return self.source == EMBEDDED or is_local(self.source)

    def _held_out(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(shard, number in it of the first sequence, tokens) of the held-out sequences."""
        shards = self._shards()
        for shard in range(len(shards.names)):
            rank = 0
            try:
                for block_ST in shards.held_out(shard):
                    yield shard, rank, block_ST
                    rank += len(block_ST)
            except CorruptShard:
                if self.on_corrupt == "raise":
                    raise

    def require(self, train_tokens: int, n_eval: int) -> None:
        """ValueError in one line when the stream is shorter than ``train_tokens`` plus ``n_eval`` sequences.

        Looks at no more shards than it needs.
        """
        needed = -(-train_tokens // self.context)
        train = held_out = 0
        shards = self._shards()
        for shard in range(len(shards.names)):
            train += self._count(shard)
            held_out += shards.n_held_out(shard) if self._count(shard) else 0
            if train >= needed and held_out >= n_eval:
                return
        raise ValueError(
            f"stream {self.source} has {train * self.context:,} training tokens and {held_out:,} held-out sequences of "
            f"{self.context}; the plan needs {train_tokens:,} and {n_eval:,}: lower the budget or add shards"
        )

    def _shards(self) -> Shards:
        return _open(self)

    def _count(self, shard: int) -> int:
        try:
            return self._shards().n_train(shard)
        except CorruptShard:
            if self.on_corrupt == "raise":
                raise
            return 0


@lru_cache(maxsize=8)
def _open(stream: TokenStream) -> Shards:
    if stream.source == EMBEDDED:
        assert stream.tokenizer is not None
        return EmbeddedShards(stream.tokenizer, stream.context)
    found = ParquetShards.open(stream.source, stream.context, stream.holdout_every)
    return replace(found, names=found.names[: stream.shards], by_column=True) if stream.shards else found


class HeldOutText:
    """Held-out sequences [S, T] by content, looked for among training sequences of the same T: exact, token for token.

    The memory is that of the held-out sequences; a training sequence costs one look-up.
    """

    def __init__(self, tokens_ST: np.ndarray) -> None:
        self._numbers: dict[bytes, list[int]] = {}
        for number, row_T in enumerate(np.ascontiguousarray(tokens_ST, np.int32)):
            self._numbers.setdefault(row_T.tobytes(), []).append(number)

    def among(self, tokens_nT: np.ndarray) -> dict[int, int]:
        """{number of a held-out sequence: row of ``tokens_nT`` that is the same}."""
        met: dict[int, int] = {}
        for row, row_T in enumerate(np.ascontiguousarray(tokens_nT, np.int32)):
            for number in self._numbers.get(row_T.tobytes(), ()):
                met.setdefault(number, row)
        return met


class SequenceReader(Iterator[tuple[int, np.ndarray]]):
    """Iterates a stream once, from sequence ``rank`` of a shard whose first sequence is number ``first``."""

    def __init__(
        self, stream: TokenStream, shards: Shards, shard: int, rank: int, first: int, *, use_ray: bool
    ) -> None:
        self._stream, self._first_of_shard = stream, {shard: first}
        self.corrupt: list[str] = []
        """One message per shard that was skipped."""
        pieces = shard_reader.through_ray if use_ray else shard_reader.in_process
        self._pieces = pieces(shards, shard, rank, stream.context)
        self._blocks: Generator[tuple[int, np.ndarray]] = self._read()

    def __next__(self) -> tuple[int, np.ndarray]:
        return next(self._blocks)

    def close(self) -> None:
        """Stop reading (a Ray pipeline is shut down at once, not when garbage is collected)."""
        self._blocks.close()
        self._pieces.close()

    def __enter__(self) -> SequenceReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> Generator[tuple[int, np.ndarray]]:
        for piece in self._pieces:
            first = self._first_of_shard[piece.shard]
            if isinstance(piece, shard_reader.Sequences):
                yield first + piece.rank, piece.tokens_ST
                continue
            self._first_of_shard[piece.shard + 1] = first + piece.n_train
            if piece.unavailable:
                raise StreamUnavailable(piece.unavailable)
            if piece.corrupt:
                if self._stream.on_corrupt == "raise":
                    raise CorruptShard(piece.corrupt)
                self.corrupt.append(piece.corrupt)
                warnings.warn(f"skipped: {piece.corrupt}", stacklevel=3)
