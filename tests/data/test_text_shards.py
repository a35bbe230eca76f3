"""Documents of any text as token shards: order, split by document, packing, growth and restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import text_shards
from data._places import CorruptShard, TextColumnMissing
from data.document_coder import coder_of
from data.documents import DocumentSource, held_out, text_source
from data.text_shards import TokenisedText
from data.token_stream import TokenStream

T = 16


def words(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(chr(97 + c) for c in rng.integers(0, 26, 4)) for _ in range(int(rng.integers(5, 40))))


DOCUMENTS = [words(seed) for seed in range(300)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_shards, "SHARD_CHARACTERS", 2000)


def save(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "parquet":
        for i in range(3):
            table = pa.table({"id": list(range(100)), "text": DOCUMENTS[100 * i : 100 * i + 100]})
            pq.write_table(table, folder / f"part-{i}.parquet", row_group_size=30)
        (folder / "README.txt").write_text("no document")
    elif kind == "jsonl":
        lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(DOCUMENTS)]
        (folder / "all.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def characters(folder: Path, *, bos: bool) -> Path:
    """A tokenizer of single characters, whose texts begin with BOS or not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {chr(c): c - 29 for c in range(32, 127)} | {"<bos>": 0, "<eos>": 1, "<unk>": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return folder


def tokenised(folder: Path, root: Path, tokenizer: str = "byte", column: str = "") -> TokenisedText:
    source = DocumentSource(str(folder), column)
    return TokenisedText(source, source.fingerprint(), tokenizer, T, str(root))


def stream(text: TokenisedText, n_train: int, n_held_out: int) -> TokenStream:
    state = text.extend(n_train, n_held_out)
    return TokenStream(source=str(text.folder), context=T, shards=len(state["shards"]))


def training(of: TokenStream) -> np.ndarray:
    with of.sequences(use_ray=False) as reader:
        return np.concatenate([tokens for _, tokens in reader])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_documents_come_in_order_from_any_place(tmp_path: Path, kind: str) -> None:
    source = DocumentSource(str(save(tmp_path / "text", kind)))
    found = list(source.documents())
    assert [text for _, _, text in found] == DOCUMENTS
    for start in (0, 57, 100, 299):
        file, row, _ = found[start]
        assert list(source.documents(file, row)) == found[start:]


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.documents.STRETCH", 100)
    text = "\n\n".join(DOCUMENTS[:40])
    (tmp_path / "book.txt").write_text(text)
    pieces = [piece for _, _, piece in DocumentSource(str(tmp_path / "book.txt")).documents()]
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n\n") and len(piece) >= 100 for piece in pieces[:-1])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_each_side_holds_exactly_its_documents(tmp_path: Path, kind: str) -> None:
    """Bytes show which text a token is: shard by shard, each side's documents one after another, packed."""
    of = stream(tokenised(save(tmp_path / "text", kind), tmp_path / "cache"), 10**6, 1)
    separated: dict[bool, list[str]] = {True: [], False: []}
    for text in DOCUMENTS:
        separated[held_out(text)].append(text)
    assert len(separated[True]) > 3

    def texts(tokens_ST: np.ndarray) -> Iterator[str]:
        for part in np.split(tokens_ST.ravel(), np.flatnonzero(tokens_ST.ravel() == 256)):
            yield bytes(part[part < 256].astype(np.uint8)).decode()

    trained = [t for t in texts(training(of)) if t]
    assert sum(t in separated[False] for t in trained) > 0.8 * len(separated[False])
    held_out_ST = of.eval_sequences(
        sum(s[2] for s in json.loads((Path(of.source) / "tokens.json").read_text())["shards"])
    )
    for text in [*texts(held_out_ST)][1:]:  # whole, or cut at a shard's end
        assert any(document.startswith(text) for document in separated[True])
        assert not any(document.startswith(text) for document in separated[False] if len(text) > 8)


def test_a_longer_need_changes_nothing_that_is_there(tmp_path: Path) -> None:
    folder = save(tmp_path / "text", "parquet")
    short = stream(tokenised(folder, tmp_path / "a"), 100, 4)
    whole = stream(tokenised(folder, tmp_path / "b"), 10**6, 4)
    before = training(short)
    assert 100 <= len(before) < len(training(whole)) // 2
    assert np.array_equal(before, training(whole)[: len(before)])
    grown = stream(tokenised(folder, tmp_path / "a"), 10**6, 4)
    assert np.array_equal(training(grown), training(whole))
    assert np.array_equal(training(short), before)
    for start in (0, 7, len(before) - 1):
        with whole.sequences(start, use_ray=False) as reader:
            first, tokens_ST = next(reader)
        assert first == start
        assert np.array_equal(tokens_ST[0], training(whole)[start])


def test_tokenising_goes_on_after_the_last_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "text", "jsonl")
    whole = stream(tokenised(folder, tmp_path / "b"), 10**6, 4)
    text, made = tokenised(folder, tmp_path / "a"), []
    make = text_shards._shard

    def dies(texts: list[str], *how: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(texts)
        return make(texts, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(text_shards, "_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        text.extend(10**6, 4)
    assert len(text.state()["shards"]) == 2
    monkeypatch.setattr(text_shards, "_shard", make)
    assert np.array_equal(training(stream(text, 10**6, 4)), training(whole))


def test_two_tokenizers_read_the_same_documents_shard_by_shard(tmp_path: Path) -> None:
    folder = save(tmp_path / "text", "parquet")
    plain = tokenised(folder, tmp_path / "c", str(characters(tmp_path / "plain", bos=False)))
    begun = tokenised(folder, tmp_path / "c", str(characters(tmp_path / "begun", bos=True)))
    assert plain.folder != begun.folder
    states = [text.extend(10**6, 1) for text in (plain, begun)]
    assert len(states[0]["shards"]) == len(states[1]["shards"])
    for (name, *_), (other, *_) in zip(states[0]["shards"], states[1]["shards"], strict=True):
        one, two = (pq.read_table(text.folder / n)["tokens"] for text, n in ((plain, name), (begun, other)))
        flat = np.concatenate([np.array(row.as_py()) for row in one])
        rows = np.array([row.as_py() for row in two])
        assert (rows[:, 0] == 0).all()  # BOS first, and nowhere else
        assert (rows[:, 1:] != 0).all()
        assert abs(rows[:, 1:].size - flat.size) < 4 * T
        assert np.array_equal(flat[: T - 1], rows[0, 1:])
        assert flat[0] == 1  # a document begins with the separator


def test_bos_that_only_the_config_asks_for_is_found(tmp_path: Path) -> None:
    folder = characters(tmp_path / "t", bos=False)
    assert coder_of(str(folder)).bos is None
    options = {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"}
    coder_of.cache_clear()
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    assert coder_of(str(folder)).bos == 0


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "text", "parquet")
    with pytest.raises(TextColumnMissing, match=r"part-0\.parquet has no text column body; its columns of strings are"):
        list(DocumentSource(str(folder), "body").documents())
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "two.parquet")
    with pytest.raises(
        TextColumnMissing, match=r"several columns that may be the text; .* a, b: choose one with --set"
    ):
        list(DocumentSource(str(tmp_path / "two.parquet")).documents())
    pq.write_table(pa.table({"n": [1]}), tmp_path / "none.parquet")
    with pytest.raises(TextColumnMissing, match="it has no column of strings"):
        list(DocumentSource(str(tmp_path / "none.parquet")).documents())
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"te')
    with pytest.raises(CorruptShard, match=r"line 2 of .*bad\.jsonl is no JSON"):
        list(DocumentSource(str(tmp_path / "bad.jsonl")).documents())
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptShard, match=r"file .*cut\.parquet of .* cannot be read"):
        list(DocumentSource(str(tmp_path / "cut.parquet")).documents())
    with pytest.raises(ValueError, match="does not exist; give a file or folder of documents"):
        list(DocumentSource(str(tmp_path / "nowhere")).documents())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.parquet, \.jsonl, \.txt file"):
        list(DocumentSource(str(tmp_path / "empty")).documents())


def test_names_on_the_hub_become_addresses(tmp_path: Path) -> None:
    assert text_source("roneneldan/TinyStories") == "hf://datasets/roneneldan/TinyStories"
    assert text_source("a/b/data/en") == "hf://datasets/a/b/data/en"
    assert text_source(str(tmp_path)) == str(tmp_path)
    assert text_source("s3://bucket/text") == "s3://bucket/text"
