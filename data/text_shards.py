"""A text data set tokenised for one model, kept as shards of token sequences that `data.token_shards` reads.

Documents are taken in their order and cut into shards by the size of their texts alone, so that models of different
tokenizers read the same documents shard by shard. In a shard the documents of each side of the split are put one after
another and packed to the context. Shards are made as far as they are needed; a longer need adds shards and changes
none. A stopped run continues after the last whole shard.

Shape suffixes: T context length, S sequences.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from data._atomic import write_whole
from data.document_coder import Coder, coder_of
from data.documents import TEXT_RULE, DocumentSource, document_number, held_out
from data.token_shards import DOCUMENT, middle_documents

SHARD_CHARACTERS = 2**22
_STATE = "tokens.json"
_ROW_GROUP = 512


@dataclass(frozen=True)
class TokenisedText:
    """The tokens of ``source`` for a tokenizer and context, in a folder below ``root`` that their content names.

    ``identity`` names the source's content: its fingerprint, or its commit on the hub.
    """

    source: DocumentSource
    identity: str
    tokenizer: str
    context: int
    root: str

    @property
    def folder(self) -> Path:
        coder = coder_of(self.tokenizer)
        named = f"{TEXT_RULE} {SHARD_CHARACTERS} {self.identity} {self.source.column} {coder.digest} {coder.separator}"
        key = hashlib.sha256(f"{named} {coder.bos} {self.context}".encode()).hexdigest()[:16]
        return Path(self.root) / f"text-{key}"

    def state(self) -> dict[str, Any]:
        """What is there: counts per shard, where the next one begins, whether the text has ended."""
        try:
            return dict(json.loads((self.folder / _STATE).read_bytes()))
        except (OSError, ValueError):
            return {"shards": [], "next": [0, 0], "ended": False}

    def extend(self, n_train: int, n_held_out: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Make shards until there are as many sequences of each side, or the text has ended; returns the state.

        Another process that wants the same waits and finds them made. Raises as `DocumentSource.documents`.
        """
        state = self.state()
        if _enough(state, n_train, n_held_out):
            return state
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            state = self.state()
            if not _enough(state, n_train, n_held_out):
                self._make(state, n_train, n_held_out, say)
        return state

    def _make(self, state: dict[str, Any], n_train: int, n_held_out: int, say: Callable[[str], None]) -> None:
        coder = coder_of(self.tokenizer)
        for texts, following in stacks(self.source, *state["next"]):
            name = f"text-{len(state['shards']):05d}.parquet"
            data, counts = _shard(texts, coder, self.context)
            write_whole(self.folder / name, data)
            state["shards"].append([name, *counts])
            state["next"], state["ended"] = following or state["next"], following is None
            write_whole(self.folder / _STATE, json.dumps(state).encode())
            train, held = _counts(state)
            say(f"tokenised: {train:,} training and {held:,} held-out sequences (shard {len(state['shards'])})")
            if _enough(state, n_train, n_held_out):
                return
        if not state["ended"]:  # a text without any document
            state["ended"] = True
            write_whole(self.folder / _STATE, json.dumps(state).encode())


def _counts(state: dict[str, Any]) -> tuple[int, int]:
    return sum(s[1] for s in state["shards"]), sum(s[2] for s in state["shards"])


def _enough(state: dict[str, Any], n_train: int, n_held_out: int) -> bool:
    train, held = _counts(state)
    return bool(state["ended"]) or (train >= n_train and held >= n_held_out)


def stacks(source: DocumentSource, file: int, row: int) -> Iterator[tuple[list[str], list[int] | None]]:
    """(the texts of a shard, where the next one begins; None at the end of the text)."""
    texts: list[str] = []
    size = 0
    for number, at, text in source.documents(file, row):
        if size >= SHARD_CHARACTERS:
            yield texts, [number, at]
            texts, size = [], 0
        texts.append(text)
        size += len(text)
    if texts:
        yield texts, None


def _shard(texts: list[str], coder: Coder, context: int) -> tuple[bytes, tuple[int, int]]:
    """(a Parquet file of tokens, held_out and DOCUMENT, (training, held-out sequences))."""
    out = [held_out(text) for text in texts]
    parts = coder.encode(texts)
    own = [
        [(p, document_number(t)) for t, p, o in zip(texts, parts, out, strict=True) if o == s] for s in (False, True)
    ]
    sides = [coder.packed([ids for ids, _ in some], context) for some in own]
    documents = [middle_documents(coder, [ids for ids, _ in some], [n for _, n in some], context) for some in own]
    tokens_ST = np.concatenate(sides)
    table = pa.table(
        {
            "tokens": pa.ListArray.from_arrays(
                pa.array(np.arange(len(tokens_ST) + 1) * context, pa.int32()), pa.array(tokens_ST.ravel(), pa.int32())
            ),
            "held_out": pa.array(np.repeat([False, True], [len(side) for side in sides])),
            DOCUMENT: pa.array(np.concatenate(documents), pa.int64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=_ROW_GROUP)
    return buffer.getvalue(), (len(sides[0]), len(sides[1]))
