"""Documents of a text data set (Parquet, JSON lines or plain text; local or on the hub) in one fixed order.

A document is a row's text, a line's text, or a stretch of a plain text file. Its identity is its text: a hash of that
alone decides whether it is held out, so equal documents lie on one side, whatever tokenizer reads them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data._content import content_of
from data._listing import visible
from data._places import CorruptShard, TextColumnMissing, filesystem_of, named_errors

TEXT_RULE = "documents 1"
"""Part of fingerprints: changes when the same files would give other documents, another order or another split."""

HOLDOUT_EVERY = 32
STRETCH = 2**16
"""Characters after which a plain text file is cut, at the next blank line."""

_KINDS = (".parquet", ".jsonl", ".txt")  # the first kind that a folder has is read, so that a README is no document
_BATCH = 256  # rows of Parquet read at once


def text_source(name: str) -> str:
    """A path or URI: ``name`` itself, or ``hf://datasets/…`` for OWNER/NAME[/FOLDER] that is no local path."""
    if "://" in name or Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(/[\w./-]+)?", name):
        return name
    return f"hf://datasets/{name}"


def held_out(text: str) -> bool:
    """Whether a document is evaluated on and never trained on: one in `HOLDOUT_EVERY`, by hash of its text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % HOLDOUT_EVERY == 0


def document_number(text: str) -> int:
    """A document's number by its text alone, 63 bits: equal documents have one."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class DocumentSource:
    """The documents below ``place`` (a file, a folder or an fsspec URI) in order of file names and of rows.

    ``column`` holds the text; "" is ``text``, else the only column of strings. Plain text has none.
    """

    place: str
    column: str = ""

    def files(self) -> tuple[str, ...]:
        """Paths on the place's filesystem; raises ValueError where there is none to read."""
        with named_errors(self.place, what="text"):
            filesystem, root = filesystem_of(self.place)
            if not filesystem.exists(root):
                raise FileNotFoundError(root)
            found = [root] if filesystem.isfile(root) else sorted(filesystem.find(root))
        names, _ = visible(path[len(root) :].lstrip("/") for path in found)
        for kind in _KINDS:
            chosen = tuple(f"{root}/{name}" if name else root for name in names if (name or root).endswith(kind))
            if chosen:
                return chosen
        raise ValueError(f"text {self.place} holds no {', '.join(_KINDS)} file; give a folder or file that is one")

    def fingerprint(self, cache: Path | None = None) -> str:
        """Hash of the rule, the column and every file's content; local files are read whole for it, once."""
        filesystem, root = filesystem_of(self.place)
        lines = [TEXT_RULE, self.column]
        for path in self.files():
            with named_errors(self.place, path, what="text"):
                lines.append(f"{path[len(root) :]} {content_of(filesystem, path, cache)}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def documents(self, file: int = 0, row: int = 0) -> Iterator[tuple[int, int, str]]:
        """(number of the file, row in it, text) of every document that is not blank, from a place on.

        Raises ValueError where the column is missing, CorruptShard where a file cannot be read.
        """
        filesystem, _ = filesystem_of(self.place)
        for number, path in enumerate(self.files()):
            if number < file:
                continue
            start = row if number == file else 0
            with named_errors(self.place, path, what="text"):
                for at, text in self._rows(filesystem, path, start):
                    if text.strip():
                        yield number, at, text

    def _rows(self, filesystem: Any, path: str, start: int) -> Iterator[tuple[int, str]]:
        if path.endswith(".parquet"):
            return self._parquet(filesystem, path, start)
        if path.endswith(".jsonl"):
            return self._json_lines(filesystem, path, start)
        return _stretches(filesystem, path, start)

    def _parquet(self, filesystem: Any, path: str, start: int) -> Iterator[tuple[int, str]]:
        with pq.ParquetFile(filesystem.open(path, "rb"), pre_buffer=False) as file:
            column = self._column(path, file.schema_arrow)
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if before + rows > start:
                    at = before
                    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[column], use_threads=False):
                        texts = batch.column(0).to_pylist()
                        yield from ((at + i, text or "") for i, text in enumerate(texts) if at + i >= start)
                        at += len(texts)
                before += rows

    def _column(self, path: str, schema: pa.Schema) -> str:
        strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        return self._chosen(path, strings)

    def _chosen(self, path: str, names: list[str]) -> str:
        wanted = self.column or ("text" if "text" in names else names[0] if len(names) == 1 else "")
        if wanted in names:
            return wanted
        held = f"its columns of strings are {', '.join(names)}" if names else "it has no column of strings"
        missing = f"has no text column {wanted}" if wanted else "has several columns that may be the text"
        raise TextColumnMissing(f"{path} {missing}; {held}: choose one with --set text_column=NAME")

    def _json_lines(self, filesystem: Any, path: str, start: int) -> Iterator[tuple[int, str]]:
        column = ""
        with io.TextIOWrapper(filesystem.open(path, "rb"), encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file):
                if number < start or not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise CorruptShard(f"line {number + 1} of {path} is no JSON ({error})") from error
                if not isinstance(record, dict):
                    raise CorruptShard(f"line {number + 1} of {path} is no JSON object; expected one with a text")
                column = column or self._chosen(
                    path, [name for name, value in record.items() if isinstance(value, str)]
                )
                text = record.get(column)
                yield number, text if isinstance(text, str) else ""


def _stretches(filesystem: Any, path: str, start: int) -> Iterator[tuple[int, str]]:
    """Plain text cut at the first blank line after every `STRETCH` characters."""
    lines: list[str] = []
    number = size = 0
    with io.TextIOWrapper(filesystem.open(path, "rb"), encoding="utf-8", errors="replace", newline="") as file:
        for line in file:
            lines.append(line)
            size += len(line)
            if size >= STRETCH and not line.strip():
                if number >= start:
                    yield number, "".join(lines)
                lines, size, number = [], 0, number + 1
    if lines and number >= start:
        yield number, "".join(lines)
