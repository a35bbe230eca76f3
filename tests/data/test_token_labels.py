"""Classes of tokens by the text alone: Python's tokens and sections of documentation, under any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data import embedded_text, text_shards
from data.document_coder import coder_of
from data.documents import DocumentSource
from data.text_shards import TokenisedText
from data.token_labels import CLASSES, NONE, character_classes, embedded_labels, text_labels, token_classes
from data.token_stream import EMBEDDED, TokenStream
from tests.data.test_text_shards import characters

SOURCE = 'if größe >= 10:  # 𝔘mlaut\n    s = "é𝔘" + f(x)\n'
#          if größe >= 10:  # 𝔘mlaut⏎    s = "é𝔘" + f(x)⏎
LETTERS = {"k": 0, "n": 1, "s": 2, "c": 3, "o": 5, ".": NONE}  # places in CLASSES
SPELLED = "kk.nnnnn.oo.nno..cccccccc.....n.o.ssss.o.nono."


def wanted() -> np.ndarray:
    codes = np.array([LETTERS[c] for c in SPELLED])
    codes[[SOURCE.index("1"), SOURCE.index("0")]] = CLASSES.index("number")
    return codes


def test_classes_of_python_are_exact_on_text_of_several_bytes() -> None:
    assert len(SPELLED) == len(SOURCE)
    np.testing.assert_array_equal(character_classes(SOURCE), wanted())


@pytest.mark.parametrize("end", ["\r\n", "\n\f\n"])
def test_lines_end_at_line_feeds_alone(end: str) -> None:
    text = SOURCE.replace("\n", end)
    classed = character_classes(text)
    kept = [i for i, c in enumerate(text) if c not in "\r\f\n"]
    np.testing.assert_array_equal(classed[kept], wanted()[[i for i, c in enumerate(SOURCE) if c != "\n"]])


def test_a_string_over_lines_is_one_and_what_is_no_python_has_sections() -> None:
    text = 'def f():\n    """Eins,\n    zwei."""\n'
    classed = character_classes(text)
    assert set(classed[text.index('"') : text.rindex('"') + 1]) == {CLASSES.index("string")}
    manual = "The title\n*********\n\nSome words here.\n\n   x = 1\n   y = x\n\n   words that are no code\n# Next\n"
    classed = character_classes(manual)
    for part, kind in (("The title", "heading"), ("***", "heading"), ("Some", "prose"), ("y = x", "example")):
        assert CLASSES[classed[manual.index(part)]] == kind, part
    assert CLASSES[classed[manual.index("no code")]] == "prose"
    assert CLASSES[classed[manual.index("Next")]] == "heading"
    assert classed[manual.index(" words here")] == NONE
    for text in ("{1: 2}", "def broken(:\n    return 1\n", "\0", "if x:\n    '''\n"):  # nothing of it is Python
        assert set(classed := character_classes(text)) <= {NONE, CLASSES.index("prose")}, text
        assert len(classed) == len(text)


def test_bytes_of_one_character_stand_for_it() -> None:
    ((ids, spans),) = coder_of("byte").encode_with_spans([SOURCE])
    assert bytes(ids[1:].tolist()).decode() == SOURCE
    assert spans[0].tolist() == [0, 0]
    at = [len(SOURCE[:i].encode()) for i in range(len(SOURCE))]
    classes = token_classes(spans, character_classes(SOURCE))
    for i, character in enumerate(SOURCE):
        for byte in range(len(character.encode())):
            assert spans[1 + at[i] + byte].tolist() == [i, i + 1]
            assert classes[1 + at[i] + byte] == wanted()[i]


def byte_pairs(folder: Path) -> Path:
    """A byte-level BPE tokenizer trained on the text, as GPT-2's and Qwen's are, which splits characters of bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["if x:\n    return f(x)\n"] * 3, trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def metaspace(folder: Path) -> Path:
    """A tokenizer that turns spaces into a letter of words, as Gemma's and Llama's do, with BOS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(vocab_size=45, special_tokens=["<unk>", "<bos>", "<|endoftext|>"])
    made.train_from_iterator([SOURCE, "if x:\n    return f(x)\n"], trainer)
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("make", [byte_pairs, metaspace])
def test_tokens_of_other_tokenizers_are_classed_by_the_characters_they_cover(make: object, tmp_path: Path) -> None:
    """Every token whose text lies inside one token of Python has that one's class; ids are those of the stream."""
    from tokenizers import Tokenizer

    folder = make(tmp_path / "tokenizer")  # type: ignore[operator]
    coder = coder_of(str(folder))
    ((ids, spans),) = coder.encode_with_spans([SOURCE])
    (plain,) = coder.encode([SOURCE])
    np.testing.assert_array_equal(ids, plain)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    classes, truth = token_classes(spans, character_classes(SOURCE)), wanted()
    covered = 0
    for id_, (start, end), found in zip(ids.tolist(), spans.tolist(), classes, strict=True):
        held = set(truth[start:end]) - {NONE}
        assert found == (held.pop() if len(held) == 1 else NONE)
        piece = fast.id_to_token(id_).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
        if piece.isascii() and id_ != coder.separator and not piece.startswith("<"):
            assert SOURCE[start:end].strip() == piece.strip()
            covered += 1
    assert covered > 15
    assert len(set(classes.tolist())) >= 5


def test_labels_lie_on_the_tokens_that_are_evaluated() -> None:
    found = embedded_labels("byte", 32, 40)
    stream = TokenStream(source=EMBEDDED, context=32, tokenizer="byte")
    np.testing.assert_array_equal(found.tokens_ST, stream.eval_sequences(40))
    assert found.tokens_ST.dtype == np.int32
    marks = found.class_ST[found.tokens_ST == ord("(")].tolist()
    assert set(marks) <= {CLASSES.index(c) for c in ("operator", "string", "comment", "prose", "example")}
    assert marks.count(CLASSES.index("operator")) > len(marks) / 2
    assert len(np.unique(found.document_ST)) > 10


def documents_of(folder: Path, text: Callable[[int], str]) -> DocumentSource:
    """250 files, each a document."""
    folder.mkdir()
    for i in range(250):
        (folder / f"{i:03d}.txt").write_text(text(i))
    return DocumentSource(str(folder))


@pytest.mark.parametrize("bos", [False, True])
def test_labels_of_documents_of_files(bos: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several shards and with BOS: the labels' tokens are the stream's, and classes fit their characters."""
    tokenizer = str(characters(tmp_path / "tokenizer", bos=bos))
    source = documents_of(tmp_path / "documents", lambda i: f"def f{i}(x):\n    return x * {i} * x\n\n\n" * 40)
    monkeypatch.setattr(text_shards, "SHARD_CHARACTERS", 40_000)
    text = TokenisedText(source, source.fingerprint(), tokenizer, 32, str(tmp_path / "tokens"))
    state = text.extend(1, 60)
    found = text_labels(text, 60)
    stream = TokenStream(source=str(text.folder), context=32, shards=len(state["shards"]))
    assert len(state["shards"]) > 1
    np.testing.assert_array_equal(found.tokens_ST, stream.eval_sequences(60))
    assert set(found.class_ST[found.tokens_ST == ord("*") - 29]) == {CLASSES.index("operator")}
    assert (found.class_ST[:, 0] == NONE).all() == bos
    assert (found.document_ST < 0).any() == bos
    assert len(np.unique(found.document_ST)) >= 2 + bos


def test_near_duplicates_are_one_document_of_the_labels() -> None:
    names = [d.name for d in embedded_text.documents()]
    groups, (group, _) = embedded_text.duplicate_groups(), embedded_text.near_duplicates(embedded_text.documents())
    pairs = {(groups[name], number) for name, number in zip(names, group.tolist(), strict=True)}
    assert len(pairs) == len(set(group.tolist())) == len(set(groups.values()))


def test_held_out_sequences_tell_their_document_whatever_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document of the middle token; ready-made tokens and shards from before the column tell none."""
    stream = TokenStream(source=EMBEDDED, context=32, tokenizer="byte")
    found = stream.held_out_documents(40)
    np.testing.assert_array_equal(found, embedded_labels("byte", 32, 40).document_ST[:, 16])
    source = documents_of(tmp_path / "documents", lambda i: f"{i} times the words of document {i} " * 30)
    monkeypatch.setattr(text_shards, "SHARD_CHARACTERS", 60_000)
    sets = []
    for tokenizer in ("byte", str(characters(tmp_path / "tokenizer", bos=True))):
        text = TokenisedText(source, source.fingerprint(), tokenizer, 32, str(tmp_path / "tokens"))
        shards = len(text.extend(1, 100)["shards"])
        assert shards > 1
        stream = TokenStream(source=str(text.folder), context=32, shards=shards)
        found = stream.held_out_documents(100)
        np.testing.assert_array_equal(found, text_labels(text, 100).document_ST[:, 16])
        sets.append(set(found.tolist()))
    assert len(sets[0]) > 2
    assert sets[0] & sets[1]
    first = sorted(text.folder.glob("*.parquet"))[0]
    pq.write_table(pq.read_table(first).drop_columns(["document"]), first)
    assert TokenStream(source=str(text.folder), context=32, shards=1).held_out_documents(5) is None
    assert TokenStream(source=str(text.folder), context=32).held_out_documents(5) is None
