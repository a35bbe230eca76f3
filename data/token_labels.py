"""What the tokens of a held-out text are, by the text alone: classes of Python's tokens, and sections of documentation.

A document that Python's parser accepts and that has a keyword is Python: Python's own `tokenize` classes its
characters. Any other document is documentation: headings, examples and prose, by its lines. A token of a language model
gets a class where all classed characters that it covers have the same one, whatever the tokenizer. The words of a topic
are no class: a topic is one document, and probes are tested on documents that they were not trained on.

Shape suffixes: C characters of a document, N tokens of a document, K classes, S sequences, T context length.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data import embedded_text
from data.document_coder import Coder, coder_of
from data.documents import document_number, held_out
from data.text_shards import TokenisedText, stacks
from data.token_shards import embedded_order

PYTHON = ("keyword", "name", "string", "comment", "number", "operator")
DOCUMENTATION = ("heading", "example", "prose")
CLASSES = (*PYTHON, *DOCUMENTATION)
NONE = -1
"""Of what has no class: separators, BOS, white space between tokens, and tokens across two classes."""

_KINDS = {
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
    tokenize.NUMBER: "number",
    tokenize.OP: "operator",
    # from Python 3.12 on, the parts of an f-string
    **{getattr(tokenize, f"FSTRING_{part}", NONE): "string" for part in ("START", "MIDDLE", "END")},
}
_UNDERLINE = re.compile(r"([*=~^\"#+-])\1{2,}\s*")
_INDENTED = re.compile(r"( {3,}|\t)")


@dataclass(frozen=True)
class TokenLabels:
    """Of the first held-out sequences: their tokens, the class of each (a place in CLASSES, or NONE), and its document.

    document_ST: a hash by which documents are ordered and told apart, equal for near-duplicates; −1 for BOS.
    """

    tokens_ST: np.ndarray
    class_ST: np.ndarray
    document_ST: np.ndarray

    def last(self, n: int) -> TokenLabels:
        """Of the last ``n`` of these sequences."""
        return TokenLabels(self.tokens_ST[-n:], self.class_ST[-n:], self.document_ST[-n:])


def embedded_labels(tokenizer: str, context: int, n: int) -> TokenLabels:
    """Of the first ``n`` held-out sequences of `data.embedded_text` (`data.token_shards.EmbeddedShards`)."""
    documents = embedded_text.split(held_out=True)
    groups = embedded_text.duplicate_groups()
    packed = _Packed([d.text for d in documents], [groups[d.name] for d in documents], coder_of(tokenizer), context)
    return packed.labels(embedded_order(packed.n_sequences, None)[:n])


def text_labels(text: TokenisedText, n: int) -> TokenLabels:
    """Of the first ``n`` held-out sequences of a tokenised text; its shards must be made (`TokenisedText.extend`).

    Raises as `data.documents.DocumentSource.documents`.
    """
    coder, found = coder_of(text.tokenizer), []
    for (texts, _), _ in zip(stacks(text.source, 0, 0), text.state()["shards"], strict=False):
        texts = [t for t in texts if held_out(t)]
        packed = _Packed(texts, [document_number(t) for t in texts], coder, text.context)
        found.append(packed.labels(np.arange(min(n, packed.n_sequences))))
        n -= packed.n_sequences
        if n <= 0:
            break
    names = ("tokens_ST", "class_ST", "document_ST")
    return TokenLabels(*(np.concatenate([getattr(part, name) for part in found]) for name in names))


class _Packed:
    """Documents packed to sequences; classes are found for those documents alone that the asked sequences hold."""

    def __init__(self, texts: Sequence[str], identities: Sequence[int], coder: Coder, context: int) -> None:
        self._texts, self._coder, self._context = texts, coder, context
        self._parts = coder.encode_with_spans(texts)
        self._tokens_ST = coder.packed([ids_N for ids_N, _ in self._parts], context)
        self._number_ST = self._pack([np.full(len(ids_N), i) for i, (ids_N, _) in enumerate(self._parts)])
        self._identities = np.array([*identities, -1], np.int64)  # the last is that of BOS, whose number is −1
        self.n_sequences = len(self._tokens_ST)

    def _pack(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return self._coder.packed(parts, self._context, first=-1)

    def labels(self, rows: np.ndarray) -> TokenLabels:
        """Of these sequences, in this order."""
        number_ST = self._number_ST[rows]
        wanted = set(np.unique(number_ST).tolist())
        classes = [
            token_classes(span_N2, character_classes(text)) if i in wanted else np.full(len(span_N2), NONE, np.int8)
            for i, (text, (_, span_N2)) in enumerate(zip(self._texts, self._parts, strict=True))
        ]
        return TokenLabels(self._tokens_ST[rows], self._pack(classes)[rows], self._identities[number_ST])


def token_classes(span_N2: np.ndarray, class_C: np.ndarray) -> np.ndarray:
    """int8 [N]: the class of each token, from the characters [start, end) that it covers and their classes.

    NONE where the token covers no classed character, or characters of several classes.
    """
    has_CK = class_C[:, None] == np.arange(len(CLASSES))
    before_CK = np.concatenate([np.zeros((1, len(CLASSES)), np.int32), has_CK.cumsum(axis=0, dtype=np.int32)])
    within_NK = before_CK[span_N2[:, 1]] > before_CK[span_N2[:, 0]]
    return np.where(within_NK.sum(axis=1) == 1, within_NK.argmax(axis=1), NONE).astype(np.int8)


def character_classes(text: str) -> np.ndarray:
    """int8 [C]: the class of each character, NONE for white space between tokens and words."""
    python_C = _python_classes(text)
    return _documentation_classes(text) if python_C is None else python_C


def _python_classes(text: str) -> np.ndarray | None:
    """None where the text is no Python, or has no keyword (`{"a": 1}` is an expression, too)."""
    if not _parses(text):
        return None
    class_C = np.full(len(text), NONE, np.int8)
    try:
        for first, last, kind in _tokens(text):
            class_C[first:last] = CLASSES.index(kind)
    except (tokenize.TokenError, SyntaxError):  # what the parser accepts and `tokenize` does not
        return None
    return class_C if (class_C == CLASSES.index("keyword")).any() else None


def _tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """(first character, one past the last, class) of each token of Python source; lines end at line feeds alone."""
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    starts = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    for token in tokenize.generate_tokens(iter([*lines, ""]).__next__):
        kind = _KINDS.get(token.type)
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        if kind is not None:
            (first_row, first), (last_row, last) = token.start, token.end
            yield int(starts[first_row - 1]) + first, int(starts[last_row - 1]) + last, kind


def _parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes and comparisons in other people's source
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _documentation_classes(text: str) -> np.ndarray:
    """Headings are underlined lines (or begin with #); examples are indented paragraphs of Python, doctest or grammar;
    all other words are prose."""
    class_C = np.full(len(text), NONE, np.int8)
    at = 0
    for kind, part in _sections(text):
        class_C[at : at + len(part)] = CLASSES.index(kind)
        at += len(part)
    blank_C = np.fromiter((c.isspace() for c in text), bool, len(text))
    class_C[blank_C] = NONE
    return class_C


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(class, text) of the parts of a documentation, which joined are the text."""
    lines = text.split("\n")
    paragraph: list[str] = []
    number = 0
    while number < len(lines):
        line, last = lines[number], number + 1 == len(lines)
        following = "" if last else lines[number + 1]
        underlined = bool(line.strip()) and _underlines(following, line)
        if underlined or re.match(r"#{1,6} \S", line) or not line.strip():
            yield from _paragraph(paragraph)
            paragraph = []
            count = 2 if underlined else 1
            ends = number + count == len(lines)
            yield "heading", "\n".join(lines[number : number + count]) + ("" if ends else "\n")
            number += count
            continue
        paragraph.append(line + ("" if last else "\n"))
        number += 1
    yield from _paragraph(paragraph)


def _underlines(line: str, title: str) -> bool:
    return bool(_UNDERLINE.fullmatch(line)) and len(line.strip()) >= len(title.strip()) and not title[0].isspace()


def _paragraph(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    text = "".join(lines)
    if text:
        yield ("example" if _INDENTED.match(text) and _is_example(textwrap.dedent(text)) else "prose"), text


def _is_example(text: str) -> bool:
    return text.startswith(">>>") or "::=" in text or _parses(text)
