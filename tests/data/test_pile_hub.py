"""The hub path against a loopback server: the same sequences as local files, by byte ranges, never whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.token_stream import PILE_HUB, StreamUnavailable, TokenStream

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

T, ROW_LENGTH = 32, 1024


@pytest.fixture
def hub(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(3):
        rows = list(rng.integers(0, 50304, (3000, ROW_LENGTH), dtype=np.int32))
        table = pa.table({"tokens": pa.array(rows, pa.list_(pa.int32()))})
        pq.write_table(table, tmp_path / f"train-{i:05d}-of-00003.parquet", row_group_size=250)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server.HubServer(tmp_path).running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        from data import token_stream

        token_stream._open.cache_clear()
        yield server
        token_stream._open.cache_clear()


def test_hub_gives_the_sequences_of_the_local_files_by_ranges(hub, tmp_path):
    remote = TokenStream(source=PILE_HUB, context=T)
    local = TokenStream(source=str(tmp_path), context=T)
    assert np.array_equal(remote.eval_sequences(8), local.eval_sequences(8))
    start = local.n_train() - 40
    hub.bytes_sent.clear()
    with remote.sequences(start, use_ray=False) as reader:
        tail = np.concatenate([tokens_ST for _, tokens_ST in reader])
    with local.sequences(start, use_ray=False) as reader:
        expected = np.concatenate([tokens_ST for _, tokens_ST in reader])
    assert len(tail) == 40
    assert np.array_equal(tail, expected)
    sizes = {entry["path"].removeprefix("data/"): entry["size"] for entry in hub.entries()}
    for name, sent in hub.bytes_sent.items():
        assert sent < 0.7 * sizes[name], f"{name}: {sent} of {sizes[name]} bytes for a footer and a tail"
    assert all(r is not None for method, path, r in hub.requests if method == "GET" and "/resolve/" in path)


def test_first_sequences_need_only_the_first_shard(hub):
    stream = TokenStream(source=PILE_HUB, context=T)
    with stream.sequences(use_ray=False) as reader:
        first, tokens_ST = next(reader)
    assert first == 0
    assert len(tokens_ST)
    assert set(hub.bytes_sent) == {"train-00000-of-00003.parquet"}


def test_hub_that_refuses_is_unavailable_not_corrupt(hub):
    stream = TokenStream(source=PILE_HUB, context=T, on_corrupt="skip")
    reader = stream.sequences(1, use_ray=False)
    hub.refusing = True
    with pytest.raises(StreamUnavailable, match="--preset local"):
        next(reader)
