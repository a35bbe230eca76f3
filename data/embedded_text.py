"""The embedded corpus: Python's own documentation and standard-library source, present on every machine.

A document is one help topic of ``pydoc_data.topics`` or one ``.py`` file of the standard library (tests and
machine-generated configuration excluded). Its name is its identity: a hash of the name alone decides the split
and the order, so that neither depends on which other files the machine happens to have.

Shape suffixes: N tokens in a row, T context length, S sequences.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

SEPARATOR = 256
"""Token between documents in the byte vocabulary; ids 0..255 are the bytes themselves."""

BYTE_VOCAB = 257
N_SHARDS = 24
HOLDOUT_EVERY = 10
"""One document in ten, by hash of its name, is never trained on."""

_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # generated on each machine, full of its paths


@dataclass(frozen=True)
class Document:
    """One text with the name that identifies it (``topic:assert`` or ``stdlib:json/decoder.py``)."""

    name: str
    text: str

    @property
    def identity(self) -> int:
        """64-bit hash of the name; decides split, shard and order."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "big")

    @property
    def held_out(self) -> bool:
        return self.identity % HOLDOUT_EVERY == 0

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
    return tuple(d for d in documents() if d.held_out == held_out)


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Hash of every document's name and text: differs between Python releases, and says so."""
    digest = hashlib.sha256()
    for document in documents():
        digest.update(document.name.encode() + b"\0")
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()[:16]


def encode_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes of ``text`` as int32 ids 0..255, shape [N]."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def encode_documents(documents: Sequence[Document], tokenizer: str) -> list[np.ndarray]:
    """int32 ids [N] of each document, its separator first.

    ``tokenizer`` is "byte", or a directory that holds a Hugging Face tokenizer.json; its separator is
    ``<|endoftext|>``, the id that GPT-NeoX and SmolLM2 were pretrained with between documents.
    """
    if tokenizer == "byte":
        return [np.concatenate([[SEPARATOR], encode_bytes(d.text)]).astype(np.int32) for d in documents]
    fast = _fast_tokenizer(tokenizer)
    separator = fast.token_to_id("<|endoftext|>")
    if separator is None:
        raise ValueError(f"tokenizer {tokenizer} has no <|endoftext|> to separate documents; choose another")
    encodings = fast.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    return [np.array([separator, *e.ids], dtype=np.int32) for e in encodings]


@lru_cache(maxsize=2)
def _fast_tokenizer(directory: str) -> Any:
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer={directory} holds no tokenizer.json; give a Hugging Face directory or byte")
    return Tokenizer.from_file(str(path))


def byte_corpus() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens [N] (uint16) of the byte vocabulary, a SEPARATOR before each document."""
    sides = [np.concatenate(encode_documents(split(held_out=side), "byte")).astype(np.uint16) for side in (False, True)]
    return sides[0], sides[1]
