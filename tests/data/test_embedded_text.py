"""The embedded corpus: identity decides split and order; the tokens are the text."""

from __future__ import annotations

import numpy as np
import pytest

from data import embedded_text
from data.document_coder import BYTE_VOCAB, SEPARATOR
from data.embedded_text import Document


def test_split_is_a_partition_of_the_documents():
    train, held_out = (embedded_text.split(held_out=side) for side in (False, True))
    names = {d.name for d in embedded_text.documents()}
    assert {d.name for d in train} | {d.name for d in held_out} == names
    assert not {d.name for d in train} & {d.name for d in held_out}
    assert len(names) == len(train) + len(held_out)
    assert 0.05 < len(held_out) / len(names) < 0.16


def test_identity_ignores_the_text_and_the_other_documents():
    document = embedded_text.documents()[5]
    edited = Document(document.name, "something else")
    assert (edited.identity, edited.shard) == (document.identity, document.shard)


def test_held_out_text_does_not_stand_in_the_training_text():
    """Of the windows of 64 bytes 17% did when names alone decided."""
    train, held_out = (windows_of(embedded_text.split(held_out=side)) for side in (False, True))
    at = np.searchsorted(train := np.unique(train), held_out).clip(max=len(train) - 1)
    assert (train[at] == held_out).mean() <= 0.02


def windows_of(documents: tuple[Document, ...]) -> np.ndarray:
    """uint64 hashes of every eighth window, chosen and named by another hash than the split's."""
    table = np.random.default_rng(0).integers(0, 2**63, 256, dtype=np.uint64)
    found = []
    for document in documents:
        hash_W, width = table[np.frombuffer(document.text.encode(), np.uint8)], 1
        while width < 64 and len(hash_W) > width:
            turned = (hash_W << np.uint64(width % 61)) | (hash_W >> np.uint64(64 - width % 61))
            hash_W = turned[:-width] * np.uint64(0xD6E8FEB86659FD93) + hash_W[width:]
            width *= 2
        found.append(hash_W[hash_W % np.uint64(8) == 0])
    return np.concatenate(found)


def test_fingerprint_knows_the_rule_of_the_split(monkeypatch):
    """So a ledger made on a split by name alone is refused, as one of another Python's text is."""
    known = embedded_text.fingerprint()
    monkeypatch.setattr(embedded_text, "_SPLIT", b"")
    embedded_text.fingerprint.cache_clear()
    assert embedded_text.fingerprint() != known
    embedded_text.fingerprint.cache_clear()


def test_near_duplicates_are_one_group_and_boilerplate_is_not():
    rng = np.random.default_rng(1)
    words = ["".join(chr(c) for c in rng.integers(97, 123, 8)) for _ in range(6000)]
    text = [" ".join(words[i * 1000 : (i + 1) * 1000]) for i in range(6)]
    licence = "# " + " ".join(words[:12])
    given = [
        Document("original", text[0]),
        Document("edited", text[0][:5000] + " changed " + text[0][5000:]),
        Document("chapter", text[1][:900] + text[0][2000:3500]),
        Document("apart", text[2]),
        Document("licensed", licence + text[3]),
        Document("licensed too", licence + text[4]),
        Document("short", "x"),
        Document("alike", text[5]),
    ]
    group, alone = embedded_text.near_duplicates(given)
    assert group[0] == group[1] == group[2]
    assert len(set(group.tolist())) == 6
    assert alone.tolist() == [True] * 8
    again, _ = embedded_text.near_duplicates(given[::-1])
    assert (group[:, None] == group).tolist() == (again[::-1, None] == again[::-1]).tolist()
    quoting = [
        *given[3:5],
        Document("quotes", text[5] + text[2][:300]),
        Document("quotes too", text[4] + text[5][:300]),
    ]
    group, alone = embedded_text.near_duplicates(quoting)
    assert len(set(group.tolist())) == 4
    assert not alone[[2, 3]].any()


def test_documentation_and_library_source_are_both_in_and_machine_files_are_not():
    names = [d.name for d in embedded_text.documents()]
    assert "stdlib:json/decoder.py" in names
    assert any(name.startswith("topic:") for name in names)
    assert not [n for n in names if "_sysconfigdata" in n or "/test/" in n or "site-packages" in n]


def test_order_is_by_hash_and_repeatable():
    first = [d.name for d in embedded_text.documents()]
    embedded_text.documents.cache_clear()
    assert [d.name for d in embedded_text.documents()] == first
    assert first != sorted(first)


def test_byte_corpus_decodes_to_the_documents():
    train_N, heldout_N = embedded_text.byte_corpus()
    assert max(train_N.max(), heldout_N.max()) == SEPARATOR < BYTE_VOCAB
    for tokens_N, held_out in ((train_N, False), (heldout_N, True)):
        documents = embedded_text.split(held_out=held_out)
        starts = np.flatnonzero(tokens_N == SEPARATOR)
        assert len(starts) == len(documents)
        assert starts[0] == 0
        second = tokens_N[starts[1] + 1 : starts[2]].astype(np.uint8).tobytes().decode()
        assert second == documents[1].text


def test_tokenizer_without_file_or_separator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        embedded_text.encode_documents(embedded_text.documents()[:1], str(tmp_path))
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="to separate documents"):
        embedded_text.encode_documents(embedded_text.documents()[:1], str(tmp_path))
