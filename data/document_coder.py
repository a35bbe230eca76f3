"""Documents as token ids, and ids packed to the context of a language model.

Shape suffixes: N tokens in a row, T context length, S sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

SEPARATOR = 256
"""Token between documents in the byte vocabulary; ids 0..255 are the bytes themselves."""

BYTE_VOCAB = 257
_END_OF_TEXT = "<|endoftext|>"  # what GPT-2, GPT-NeoX, Qwen and SmolLM2 were pretrained with between documents


@dataclass(frozen=True)
class Coder:
    """A tokenizer with what it puts between documents and at the start of a sequence.

    separator: id before each document. bos: id that the tokenizer begins every text with, so that the model expects it
    at the first position; None for tokenizers that begin with the text. digest: SHA-256 of the tokenizer.
    """

    separator: int
    bos: int | None
    digest: str
    tokenizer: Any = None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids [N] of each text, the separator first."""
        if self.tokenizer is None:
            return [np.concatenate([[self.separator], encode_bytes(text)]).astype(np.int32) for text in texts]
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([self.separator, *e.ids], dtype=np.int32) for e in encodings]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode`, and the characters [start, end) of the text that each id stands for, int32 [N, 2].

        The separator stands for none. Ids that share a character of several bytes all stand for it.
        """
        if self.tokenizer is None:
            lengths = [np.array([len(c.encode()) for c in text], np.int64) for text in texts]
            spans: list[np.ndarray] = [np.repeat(np.arange(len(n_C)), n_C)[:, None] + [0, 1] for n_C in lengths]
            ids = self.encode(texts)
        else:
            encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            spans = [np.array(e.offsets, np.int64).reshape(-1, 2) for e in encodings]
            ids = [np.array([self.separator, *e.ids], dtype=np.int32) for e in encodings]
        with_separator = [np.concatenate([[[0, 0]], span_N2]).astype(np.int32) for span_N2 in spans]
        return list(zip(ids, with_separator, strict=True))

    def packed(self, parts: Sequence[np.ndarray], context: int, first: int | None = None) -> np.ndarray:
        """The parts one after another, cut into sequences [S, T], each begun with BOS where there is one.

        The last, incomplete sequence is dropped. `first` is what stands at the place of BOS where the parts hold
        something else about each token than its id. Type: that of the parts, int32 where there is none.
        """
        flat_N = np.concatenate(parts) if parts else np.empty(0, np.int32)
        width = context - (self.bos is not None)
        rows_SW = flat_N[: len(flat_N) // width * width].reshape(-1, width)
        if self.bos is None:
            return rows_SW
        start = self.bos if first is None else first
        return np.concatenate([np.full((len(rows_SW), 1), start, rows_SW.dtype), rows_SW], axis=1)


def encode_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes of ``text`` as int32 ids 0..255, shape [N]."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


@lru_cache(maxsize=4)
def coder_of(tokenizer: str) -> Coder:
    """The coder of "byte", or of a directory that holds a Hugging Face tokenizer.json.

    Documents are separated by ``<|endoftext|>``, else by the end-of-text token that tokenizer_config.json names, else
    by BOS. Raises ValueError where there is no tokenizer or none of these.
    """
    if tokenizer == "byte":
        return Coder(SEPARATOR, None, hashlib.sha256(b"byte").hexdigest())
    from tokenizers import Tokenizer

    path = Path(tokenizer) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer={tokenizer} holds no tokenizer.json; give a Hugging Face directory or byte")
    fast: Any = Tokenizer.from_file(str(path))
    options = _options(path.with_name("tokenizer_config.json"))
    with_special, without = (fast.encode("a", add_special_tokens=flag).ids for flag in (True, False))
    bos = with_special[0] if with_special[:1] != without[:1] else None
    if bos is None and options.get("add_bos_token"):
        bos = fast.token_to_id(_content(options.get("bos_token")))
    names = (_END_OF_TEXT, _content(options.get("eos_token")))
    separator = next((found for name in names if (found := fast.token_to_id(name)) is not None), bos)
    if separator is None:
        raise ValueError(f"tokenizer {tokenizer} has no {_END_OF_TEXT} to separate documents; choose another")
    return Coder(separator, bos, hashlib.sha256(path.read_bytes()).hexdigest(), fast)


def _options(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it only adds what tokenizer.json does not say
        return {}
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    """A special token's text: given as such, or as the fields of an added token."""
    return str(token.get("content", "")) if isinstance(token, dict) else token if isinstance(token, str) else ""
