"""The embedded corpus: identity decides split and order; the tokens are the text."""

from __future__ import annotations

import numpy as np
import pytest

from data import embedded_text
from data.embedded_text import BYTE_VOCAB, SEPARATOR, Document


def test_split_is_a_partition_by_name():
    train, held_out = (embedded_text.split(held_out=side) for side in (False, True))
    names = {d.name for d in embedded_text.documents()}
    assert {d.name for d in train} | {d.name for d in held_out} == names
    assert not {d.name for d in train} & {d.name for d in held_out}
    assert len(names) == len(train) + len(held_out)
    assert 0.05 < len(held_out) / len(names) < 0.16


def test_identity_ignores_the_text_and_the_other_documents():
    document = embedded_text.documents()[5]
    edited = Document(document.name, "something else")
    assert (edited.identity, edited.held_out, edited.shard) == (
        document.identity,
        document.held_out,
        document.shard,
    )


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
