"""The embedded corpus: Python's own documentation and standard-library source, present on every machine.

A document is one help topic of ``pydoc_data.topics`` or one ``.py`` file of the standard library (tests and
machine-generated configuration excluded). Its name is its identity: a hash of the name alone decides order and
shard. The split keeps near-duplicates on one side (`near_duplicates`), so it depends on the texts as well.

Shape suffixes: N tokens in a row, T context length, S sequences, G documents, W windows.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from data.document_coder import coder_of

N_SHARDS = 24
HOLDOUT_EVERY = 6
"""One group of near-duplicates in six, by hash of its first name, is held out where its text occurs nowhere else;
some groups do not qualify, so that about a tenth of the documents is never trained on."""

SHINGLE = 64
"""Bytes of a window; two documents share text where they share a window of this length."""

SAME_TEXT = 0.05
"""Documents are near-duplicates from this share of the smaller one's windows on."""

VERBATIM = 0.01
"""A group is trained on when more of its windows than this share occur in documents of other groups, too."""

_SAMPLE = 8  # one window in so many is compared, chosen by its own hash, so that copies are chosen together
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, its bits without a pattern: 2**64 over the golden ratio
_SPLIT = b"near-duplicates together"  # in the fingerprint: what the split depends on besides names and texts

_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # generated on each machine, full of its paths


@dataclass(frozen=True)
class Document:
    """One text with the name that identifies it (``topic:assert`` or ``stdlib:json/decoder.py``)."""

    name: str
    text: str

    @property
    def identity(self) -> int:
        """64-bit hash of the name; decides order and shard."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "big")

    @property
    def shard(self) -> int:
        return (self.identity // HOLDOUT_EVERY) % N_SHARDS


def _is_source(relative: Path) -> bool:
    return not any(part in _EXCLUDED_FOLDERS or part.startswith(_EXCLUDED_PREFIXES) for part in relative.parts)


@lru_cache(maxsize=1)
def documents() -> tuple[Document, ...]:
    """Every document of the corpus in its fixed order (by hash of the name).

    Raises RuntimeError when neither the help topics nor the library source are installed.
    """
    found: list[Document] = []
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some minimal distributions strip it
        topics = {}
    found += [Document(f"topic:{name}", text) for name, text in topics.items()]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if _is_source(relative) and relative.parts[0] != "pydoc_data":
            text = path.read_bytes().decode("utf-8", errors="replace")
            if text.strip():
                found.append(Document(f"stdlib:{relative.as_posix()}", text))
    if not found:
        raise RuntimeError(
            f"no embedded text: neither pydoc_data.topics nor *.py under {library}; "
            "install Python's standard library sources or use a Parquet stream"
        )
    return tuple(sorted(found, key=lambda d: (d.identity, d.name)))


def split(*, held_out: bool) -> tuple[Document, ...]:
    """The documents of one side of the split, in corpus order."""
    return tuple(d for d, out in zip(documents(), _held_out(), strict=True) if out == held_out)


@lru_cache(maxsize=1)
def _held_out() -> tuple[bool, ...]:
    """Which of `documents()` are never trained on."""
    first_G, alone_G = _groups()
    return tuple((np.array([first % HOLDOUT_EVERY == 0 for first in first_G]) & alone_G).tolist())


def duplicate_groups() -> dict[str, int]:
    """A number for each document by its name, equal for near-duplicates and otherwise in no order: 63 bits."""
    return {d.name: first >> 1 for d, first in zip(documents(), _groups()[0], strict=True)}


@lru_cache(maxsize=1)
def _groups() -> tuple[tuple[int, ...], np.ndarray]:
    """(smallest identity in each document's group of near-duplicates, whether the group is alone) of `documents()`."""
    group_G, alone_G = near_duplicates(documents())
    first: dict[int, int] = {}
    for group, document in zip(group_G.tolist(), documents(), strict=True):
        first[group] = min(document.identity, first.get(group, document.identity))
    return tuple(first[group] for group in group_G.tolist()), alone_G


def near_duplicates(documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Groups of documents that share text, and which groups share next to none with the others.

    Windows of SHINGLE bytes are compared by hash, one in eight of them by their own hash (the sampling of Manber 1994,
    "Finding similar files in a large file system"). Two documents are near-duplicates when they share SAME_TEXT of
    the smaller one's windows; groups are the connected components (Broder et al. 1997).

    Returns (group int [G]: the number of each document's group, alone bool [G]: at most VERBATIM of the windows of the
    document's group stand in other groups). Neither depends on the machine or on the documents' order.
    """
    hashes = [_window_hashes(d.text.encode()) for d in documents]
    counts_G = np.array([len(h) for h in hashes])
    n = len(documents)
    document_W = np.repeat(np.arange(n), counts_G)
    _, window_W = np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]), return_inverse=True)
    shape = (n, int(window_W.max(initial=-1)) + 1)
    times_GW = csr_array((np.ones(len(window_W)), (document_W, window_W)), shape=shape)  # repeats add up
    has_GW = csr_array((np.ones_like(times_GW.data), times_GW.indices, times_GW.indptr), shape=shape)
    shared = (has_GW @ has_GW.T).tocoo()
    distinct_G = has_GW.sum(axis=1)
    smaller = np.minimum(distinct_G[shared.row], distinct_G[shared.col])
    close = (shared.data >= SAME_TEXT * smaller).astype(np.int8)
    links_GG = csr_array((close, (shared.row, shared.col)), shape=(n, n))
    links_GG.eliminate_zeros()
    n_groups, group_G = connected_components(links_GG, directed=False)
    to_group = csr_array((np.ones(n), (group_G, np.arange(n))), shape=(n_groups, n))
    in_groups_W = ((to_group @ has_GW) > 0).sum(axis=0)  # groups that each window stands in
    copied = np.bincount(group_G, weights=times_GW @ (in_groups_W > 1), minlength=n_groups)
    windows = np.bincount(group_G, weights=counts_G, minlength=n_groups)
    return group_G, (copied <= VERBATIM * windows)[group_G]


def _window_hashes(text: bytes) -> np.ndarray:
    """uint64 hashes of a text's windows of SHINGLE bytes, one in _SAMPLE; a shorter text counts as padded."""
    hash_W = np.frombuffer(text.ljust(SHINGLE, b"\0"), np.uint8).astype(np.uint64) + np.uint64(1)
    width = 1
    while width < SHINGLE:  # the polynomial of 2w bytes from those of its halves, modulo 2**64
        hash_W = hash_W[:-width] * np.uint64(pow(_MULTIPLIER, width, 2**64)) + hash_W[width:]
        width *= 2
    mixed_W = hash_W ^ (hash_W >> np.uint64(29))  # the low bits of a product depend on few bytes
    mixed_W *= np.uint64(_MULTIPLIER)
    return mixed_W[mixed_W < np.uint64(2**64 // _SAMPLE)]


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Hash of the rule of the split and of every document's name and text: differs between Python releases."""
    digest = hashlib.sha256(_SPLIT)
    for document in documents():
        digest.update(document.name.encode() + b"\0")
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()[:16]


def encode_documents(documents: Sequence[Document], tokenizer: str) -> list[np.ndarray]:
    """int32 ids [N] of each document, its separator first (`data.document_coder`)."""
    return coder_of(tokenizer).encode([d.text for d in documents])


def byte_corpus() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens [N] (uint16) of the byte vocabulary, a SEPARATOR before each document."""
    sides = [np.concatenate(encode_documents(split(held_out=side), "byte")).astype(np.uint16) for side in (False, True)]
    return sides[0], sides[1]
